"""An upcycled model computes at first what the dense one does, whatever its routers say."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from interop.test_checkpoints import MODEL, params_of, program_of

from moejax.checks import ConfigError
from moejax.config import DispatchConfig
from moejax.interop import Upcycling, load_hf, read_model_config, save_hf

DENSE = dataclasses.replace(MODEL, num_layers=5, num_experts=1, experts_per_token=1)  # which two stages don't divide
TOKENS_BS = np.random.default_rng(0).integers(0, MODEL.vocab_size, (16, 16)).astype(np.int32)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A dense checkpoint, and its logits."""
    program = program_of((1, 1, 1), DENSE)
    params = params_of(program)
    folder = tmp_path_factory.mktemp("dense") / "checkpoint"
    assert save_hf(folder, program, params, dtype="float32") == "llama"
    return folder, logits_of(program, params)


def logits_of(program, params):
    specs = (program.param_specs, program.batch_spec, program.batch_spec)
    logits = jax.jit(program.sharded(program.logits, specs, program.logits_spec))
    return np.asarray(logits(params, TOKENS_BS, np.ones_like(TOKENS_BS)))


def test_a_dense_checkpoint_is_a_model_of_one_expert(dense):
    folder, logits_BSV = dense
    assert dataclasses.replace(read_model_config(folder), dtype="float32") == DENSE
    program = program_of((1, 2, 2), DENSE, dispatch=DispatchConfig(expert_axes=("expert",)))
    loaded = load_hf(folder, program)
    assert loaded.bytes_read == loaded.bytes_on_disk
    np.testing.assert_allclose(logits_of(program, loaded.params), logits_BSV, atol=1e-5)


@pytest.mark.parametrize(
    ("axes", "text"),
    [
        ((1, 1, 1), "num_experts=8"),
        ((4, 2, 2), "num_experts=16,experts_per_token=4"),
        ((4, 2, 2), "num_experts=16,experts_per_token=4,granularity=4"),
        ((2, 1, 2), "num_experts=8, experts_per_token=4, granularity=2"),
    ],
)
def test_an_upcycled_model_has_the_logits_of_the_dense_one(dense, axes, text):
    folder, logits_BSV = dense
    upcycling = Upcycling.parse(text)
    program = program_of(axes, upcycling.model(DENSE))
    params = load_hf(folder, program, upcycling=upcycling).params
    router_DE = np.asarray(params["layers"]["moe"]["w_router_DE"])[0, 0, 0]
    groups_DGg = router_DE.reshape(len(router_DE), -1, upcycling.granularity)
    assert (groups_DGg == groups_DGg[..., :1]).all()
    assert len(np.unique(groups_DGg[0, :, 0])) == upcycling.num_experts // upcycling.granularity
    np.testing.assert_allclose(logits_of(program, params), logits_BSV, atol=2e-5)


def test_a_share_of_the_hidden_units_can_start_at_random(dense):
    upcycling = Upcycling(num_experts=16, granularity=2, reinit_ratio=0.25)

    def experts(upcycling, axes):
        program = program_of(axes, upcycling.model(DENSE))
        found = load_hf(dense[0], program, upcycling=upcycling).params["layers"]["moe"]["experts"]
        stacked = {name: w.reshape(-1, *w.shape[3:]) for name, w in jax.device_get(found).items()}
        assert not any(w[5:].any() for w in stacked.values())
        return {name: w[:5] for name, w in stacked.items()}

    copies, drawn = experts(dataclasses.replace(upcycling, reinit_ratio=0.0), (1, 1, 1)), experts(upcycling, (1, 1, 1))
    changed_LEDGF, changed_LEFD = (copies[name] != drawn[name] for name in ("w_in_EDGF", "w_out_EFD"))
    np.testing.assert_array_equal(changed_LEDGF.any((2, 3)), changed_LEFD.any(3))
    assert (changed_LEDGF.all((2, 3)).sum(-1) == 2).all(), "of 8 units, with all weights of each"
    assert len(np.unique(changed_LEFD.any(3).reshape(-1, 8), axis=0)) > 20, "other units in other experts"
    for name, changed in (("w_in_EDGF", changed_LEDGF), ("w_out_EFD", changed_LEFD)):
        assert drawn[name][changed].std() == pytest.approx(copies[name].std(), rel=0.05)
        assert abs(drawn[name][changed].mean()) < 0.05 * copies[name].std()
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    jax.tree.map(close, experts(upcycling, (4, 2, 2)), drawn)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8", r"upcycle=.8. has .8.; write num_experts=8,experts_per_token=2"),
        ("experts=8", "experts does not exist"),
        ("num_experts=8,experts_per_token=3,granularity=2", "experts_per_token=3 must be a multiple of granularity=2"),
        ("num_experts=8,experts_per_token=1", "experts_per_token=1 must be more than 1"),
        ("num_experts=0", "num_experts=0 must be positive"),
        ("reinit_ratio=1.5", "reinit_ratio=1.5 must be from 0 to 1"),
    ],
)
def test_what_cannot_be_upcycled_is_one_line(text, message):
    with pytest.raises(ConfigError, match=message):
        Upcycling.parse(text)


def test_a_model_that_does_not_fit_is_refused(dense):
    with pytest.raises(ConfigError, match="a model of 16 experts cannot be upcycled; give a dense one"):
        Upcycling().model(MODEL)
    with pytest.raises(ConfigError, match="granularity=3 must divide the feed-forward's width, 16"):
        Upcycling(6, 3, 3).model(DENSE)
    with pytest.raises(ConfigError, match=r"reinit_ratio=0\.01 is less than one of an expert's 16 units"):
        Upcycling(reinit_ratio=0.01).model(DENSE)
    with pytest.raises(ConfigError, match=r"num_experts=16 \(not 8\)"):
        load_hf(dense[0], program_of((1, 1, 1)), upcycling=Upcycling())
