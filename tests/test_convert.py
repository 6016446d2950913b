"""A run leaves as a Hugging Face checkpoint and another begins with it."""

import json

import numpy as np
import pytest
import tokenizers
from scripts import DENSE, load_script, parse_command, run_script, write_model_folder

from moejax.checks import ConfigError
from moejax.data import ByteTokenizer
from moejax.interop.tensors import find_tensors

pytestmark = pytest.mark.full  # all of them need a run

CONFIG = """
from moejax.config import AttentionConfig, DataConfig, ModelConfig
from moejax.layout import Layout
from moejax.train.config import TrainConfig


def get_config():
    model = ModelConfig(
        num_layers=2, d_model=16, attention=AttentionConfig(2, 2, 8), d_ff=16, num_experts=16, max_seq_len=64
    )
    return TrainConfig(model=model, layouts=(Layout(seq_len=16, batch_size=8),), data=DataConfig(paths=("text.txt",)))
"""
SHORT = ("--config.steps=1", "--config.eval_batches=1", "--config.sample_tokens=0")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with a run of one step in `run`, and that run as a checkpoint in `exported`."""
    folder = tmp_path_factory.mktemp("convert")
    (folder / "config.py").write_text(CONFIG)
    (folder / "text.txt").write_text("a text of some length to train on\n" * 99)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_script("train", "--config=config.py", "--workdir=run", *SHORT)
        done = run_script("convert", "--workdir=run", "--out=exported", "--dtype=float32")
    assert done.figures == {"step": 1, "model_type": "mixtral", "out": "exported"}
    return folder


def test_a_run_begins_with_what_another_left(exported, monkeypatch):
    monkeypatch.chdir(exported)
    begun = ("--init=exported", "--data=text.txt", "--config.layout.seq_len=16", "--config.layout.batch_size=8")
    done = run_script("train", *begun, "--workdir=further", *SHORT, "--config.optimizer.learning_rate=1e-30")
    first = json.loads((exported / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    # The weights hardly move, so the held-out loss is the one that the first run ended with.
    assert done.figures["eval_loss"] == pytest.approx(first["eval_loss"], rel=1e-5)


def test_the_checkpoint_is_in_float32_with_its_tokenizer(exported):
    assert {tensor.dtype for tensor in find_tensors(exported / "exported").values()} == {"F32"}
    text = "bytes are ids: \x01 é \n"
    ids = tokenizers.Tokenizer.from_file(str(exported / "exported" / "tokenizer.json")).encode(text).ids
    np.testing.assert_array_equal(ids, ByteTokenizer().encode(text))


def test_a_checkpoint_without_a_tokenizer_needs_one(exported, tmp_path):
    (tmp_path / "config.json").write_bytes((exported / "exported" / "config.json").read_bytes())
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json; give its model's tokenizer with --tokenizer"):
        parse_command("train", [f"--init={tmp_path}"])
    with pytest.raises(ConfigError, match="both say the model; give one"):
        parse_command("train", [f"--init={tmp_path}", "--config=tiny"])


def test_a_dense_checkpoint_begins_a_run_as_a_mixture_of_experts(tmp_path):
    write_model_folder(tmp_path, DENSE)
    text = "num_experts=16,experts_per_token=4,granularity=2"
    config = load_script("train").FLAGS.parse_config(["train", f"--init={tmp_path}", f"--upcycle={text}"])
    assert (config.model.num_experts, config.model.experts_per_token, config.model.d_ff) == (16, 4, DENSE.d_ff // 2)
    assert (config.init, config.upcycle) == (str(tmp_path), text)
    with pytest.raises(ConfigError, match="has no weights to begin with; give a dense checkpoint with --init"):
        parse_command("train", [f"--upcycle={text}"])
    with pytest.raises(ConfigError, match="experts_per_token=3 must be a multiple of granularity=2"):
        parse_command("train", [f"--init={tmp_path}", "--upcycle=experts_per_token=3,granularity=2"])


def test_what_cannot_be_converted_gets_one_line(exported, tmp_path, monkeypatch):
    assert run_script("convert", "--out=x", status=2).error == "--workdir is missing; name the folder of a run"
    assert "has no run with a checkpoint" in run_script("convert", f"--workdir={tmp_path}", "--out=x", status=2).error
    monkeypatch.chdir(exported)
    again = run_script("convert", "--workdir=no run at all", "--out=exported", status=2)
    assert "is there and not empty; name a new folder" in again.error  # before anything is read
