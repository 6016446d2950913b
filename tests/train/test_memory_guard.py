"""The ladder: each rung takes less memory and computes the same step; what cannot fit is refused in one line."""

import dataclasses
import logging
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BALANCE, MODEL, make_batch

from experiments.shared import loading
from moejax.checks import ConfigError
from moejax.config import BalanceConfig, OptimizerConfig, RouterConfig
from moejax.layout import DoesNotFitError, Layout
from moejax.mesh import MeshConfig, build_mesh
from moejax.overrides import apply_overrides
from moejax.program import Program
from moejax.train import sizes as sizes_module
from moejax.train.loop import Trainer
from moejax.train.memory_guard import MemoryUse, device_limit, fit, is_out_of_memory
from moejax.train.metrics import read_metrics
from moejax.train.sizes import StepSizes
from moejax.train.step import make_train_step

BATCH, SEQ_LEN = 8, 64
LINEAR = BalanceConfig(aux_loss_weight=0.0, sequence_loss_weight=0.05, z_loss_weight=0.01)
OPTIMIZER = OptimizerConfig(warmup_steps=1, eps=1e-3)  # which a gradient's rounding does not reach
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123 bytes."


LAYOUT = Layout(MeshConfig(4, 2, 2), SEQ_LEN, BATCH, num_microbatches=1)


def make_step(balance=LINEAR, **fields):
    model = dataclasses.replace(MODEL, num_layers=2, router=RouterConfig(bias=balance.bias_update_rate > 0))
    return make_train_step(Program(model, LAYOUT.replace(**fields), balance=balance), OPTIMIZER, steps=9)


@pytest.mark.full
def test_the_last_rung_is_the_same_step():
    first = make_step()
    last = first.with_layout(**vars(list(first.program.layout.smaller(first.program.model))[-1]))
    batch = make_batch(256, BATCH, SEQ_LEN)
    memory, states, losses = [], [], []
    for step in (first, last):
        ran = fit(step, 0)
        state, metrics = ran(step.init(jax.random.key(0)), step.put_batch(batch))
        memory.append(ran.memory.total)
        states.append(jax.device_get(state.params))
        losses.append(float(metrics["loss"]))
    assert memory[1] < 0.7 * memory[0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    for one, other in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text").write_text("".join(f"{i} and then {i * i}\n" for i in range(2000)))
    overrides = {
        "model.num_layers": "2", "model.d_model": "32",
        "model.attention.head_dim": "8", "model.attention.num_kv_heads": "4",
        "model.d_ff": "32", "data.paths": str(folder), "layout.seq_len": "64", "layout.batch_size": "8", "steps": "3",
        "layout.num_microbatches": "1", "optimizer.warmup_steps": "1", "balance.capacity_factors": "",
        "optimizer.eps": "1e-3", "eval_batches": "1", "sample_tokens": "0",
    }  # fmt: skip
    return apply_overrides(loading.load_config("tiny"), overrides).with_layout(mesh=MeshConfig(4, 2, 2))


@pytest.mark.slow
def test_a_run_under_a_small_limit_steps_down_and_computes_the_same(config, tmp_path, caplog):
    free = Trainer(config, tmp_path / "free").run()
    assert not [r for r in caplog.records if "Memory guard" in r.getMessage()]
    limit = free.device_memory_bytes - 1
    held = Trainer(dataclasses.replace(config, memory_limit_bytes=limit), tmp_path / "held").run()
    (bucket,) = held.buckets
    assert bucket.device_memory_bytes <= limit
    assert (bucket.num_microbatches, bucket.grad_accumulation_steps, bucket.remat) != (1, 1, "none")
    for one, other in zip(read_metrics(tmp_path / "free"), read_metrics(tmp_path / "held"), strict=True):
        # What the steps before have changed differs by rounding, which training amplifies.
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-6 if one["step"] == 1 else 2e-3)
    said = [r.getMessage() for r in caplog.records if "Memory guard" in r.getMessage()]
    size = r"[\d,.]+ MiB"
    assert re.fullmatch(
        "Memory guard, 64 tokens: num_microbatches=1 grad_accumulation_steps=1 remat=none "
        rf"needs {size}, limit {size}; stepping down to num_microbatches=2 grad_accumulation_steps=1 remat=none",
        said[0],
    )

    near_the_end = config.with_layout(num_microbatches=2, remat="full")
    small = dataclasses.replace(near_the_end, memory_limit_bytes=10_000)
    with pytest.raises(ConfigError) as error:
        Trainer(small, tmp_path / "none").run()
    assert re.fullmatch(
        rf"a step of 8 sequences of 64 tokens needs {size} a device with num_microbatches=1 grad_accumulation_steps=2 "
        rf"remat=full, where the ladder ends, and the limit is 0\.0 MiB; the most is temporaries .*, {size}; "
        r"by proportion, [\d,]+ devices instead of 16 would fit",
        str(error.value),
    )
    assert not (tmp_path / "none" / "checkpoints" / "1").exists()


def memory(arguments, temporaries, peak=0):
    return SimpleNamespace(
        memory_analysis=lambda: SimpleNamespace(
            argument_size_in_bytes=arguments,
            output_size_in_bytes=arguments,
            alias_size_in_bytes=arguments,
            temp_size_in_bytes=temporaries,
            peak_memory_in_bytes=peak,
        )
    )


class TestRefusal:
    """The advice, from figures that no compiler gave."""

    @pytest.mark.parametrize(
        ("arguments", "temporaries", "limit", "num_microbatches", "largest", "advice"),
        [
            (1, 9, 4, 1, "temporaries", "seq_len=20 would fit"),
            (1, 8, 5, 2, "temporaries", "batch_size=4 would fit"),
            (9, 1, 5, 1, "arguments", "32 devices instead of 16 would fit"),
        ],
    )
    def test_it_names_the_largest_category_and_a_change(
        self, monkeypatch, arguments, temporaries, limit, num_microbatches, largest, advice
    ):
        step = make_step(
            BALANCE,
            batch_size=4 * num_microbatches,
            num_microbatches=num_microbatches,
            remat="full",
            strategy="capacity",
        )
        compiled = memory(arguments << 20, temporaries << 20)
        monkeypatch.setattr(type(step), "lower", lambda *_: SimpleNamespace(compile=lambda: compiled))
        with pytest.raises(DoesNotFitError, match=rf"the most is {largest} .*; by proportion, {advice}$"):
            fit(step, limit << 20)

    def test_the_total_is_the_peak_where_that_is_more(self):
        assert MemoryUse.of(memory(2, 3)).total == 5
        assert MemoryUse.of(memory(2, 3, peak=7)).total == 7


class TestOutOfMemory:
    """What XLA says itself; only its status counts."""

    def test_when_compiling(self, monkeypatch, caplog):
        attempts = []

        def lower(step):
            def compile_it():
                attempts.append(step.program.layout.num_microbatches)
                if len(attempts) == 1:
                    raise jax.errors.JaxRuntimeError(OUT_OF_MEMORY)
                return memory(1, 1)

            return SimpleNamespace(compile=compile_it)

        step = make_step()
        monkeypatch.setattr(type(step), "lower", lower)
        assert fit(step, 0).step.program.layout.num_microbatches == 2
        assert attempts == [1, 2]
        assert "needs more than the compiler has, limit the compiler's" in caplog.text

    def test_any_other_fault_is_raised(self, monkeypatch):
        def lower(*_):
            raise jax.errors.JaxRuntimeError("INTERNAL: RESOURCE_EXHAUSTED is only mentioned here")

        step = make_step()
        monkeypatch.setattr(type(step), "lower", lower)
        with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
            fit(step, 0)
        assert not is_out_of_memory(jax.errors.JaxRuntimeError("INTERNAL: no"))

    @pytest.mark.parametrize(
        ("donated", "status"), [(False, OUT_OF_MEMORY), (True, OUT_OF_MEMORY), (False, "INTERNAL: no")]
    )
    def test_when_the_step_starts(self, monkeypatch, donated, status):
        """It steps down if the state is still there, and only then."""
        state = jnp.ones(3)

        class Ran:
            def __init__(self, level):
                self.level, self.step, self.memory = level, self, SimpleNamespace(total=0)

            def __call__(self, state, batch):
                if self.level:
                    return "state", "metrics"
                if donated:
                    state.delete()
                raise jax.errors.JaxRuntimeError(status)

        def fake_fit(step, *_, refused=False):
            return Ran(1 if refused else 0)

        monkeypatch.setattr(sizes_module, "fit", fake_fit)
        with StepSizes([make_step()]) as sizes:
            sizes.use(0, 0)
            if donated or status != OUT_OF_MEMORY:
                with pytest.raises(jax.errors.JaxRuntimeError):
                    sizes.run(state, None)
            else:
                assert sizes.run(state, None)[1] == ("state", "metrics")
                assert sizes.use(0, 0).level == 1


def test_buffers_that_do_not_fit_give_way_to_the_next_smaller(monkeypatch, caplog):
    step = make_step()
    factors = step.program.balancer.capacity_factors

    def fake_fit(step, *_):
        if step.program.layout.dispatch.capacity_factor > factors[1]:
            raise DoesNotFitError("too much")
        return SimpleNamespace(step=step, memory=SimpleNamespace(total=1))

    monkeypatch.setattr(sizes_module, "fit", fake_fit)
    with caplog.at_level(logging.WARNING), StepSizes([step], 1) as sizes:
        for _ in range(2):
            assert sizes.use(0, 3).step.program.layout.dispatch.capacity_factor == factors[1]
    assert caplog.text.count(f"Buffers of capacity {factors[3]:g} do not fit, {factors[2]:g} is tried") == 1


def test_cpus_have_no_limit_of_their_own():
    assert device_limit(build_mesh(MeshConfig(4, 2, 2))) == 0
