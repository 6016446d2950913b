"""Sizes of the step: the one asked for is waited for, its neighbors are compiled beside the loop, none is twice."""

import threading
from types import SimpleNamespace

import pytest

from moejax.config import ModelConfig
from moejax.layout import Layout
from moejax.train.sizes import StepSizes

FACTORS = (1.0, 1.5, 2.0, 3.0, 4.0)


class FakeStep:
    """Stands for a `TrainStep`: notes what is compiled, as much as `permits` allow."""

    def __init__(self, permits=100):
        self.program = SimpleNamespace(balancer=SimpleNamespace(capacity_factors=FACTORS))
        self.compiled, self.permits = [], threading.Semaphore(permits)

    def with_capacity(self, factor):
        def compile_it():
            self.permits.acquire()
            self.compiled.append(factor)
            if factor == 4.0:
                raise RuntimeError("does not fit")
            memory = dict.fromkeys(("output_size", "alias_size", "temp_size", "peak_memory"), 0)
            memory = {f"{name}_in_bytes": value for name, value in memory.items()}
            analysis = SimpleNamespace(argument_size_in_bytes=int(100 * factor), **memory)
            return SimpleNamespace(factor=factor, memory_analysis=lambda: analysis)

        program = SimpleNamespace(layout=Layout(), model=ModelConfig())
        return SimpleNamespace(program=program, lower=lambda: SimpleNamespace(compile=compile_it))


def test_neighbors_are_compiled_the_larger_first_and_nothing_twice():
    step = FakeStep()
    with StepSizes([step]) as sizes:
        assert sizes.use(0, 1).compiled.factor == 1.5
        assert sizes.use(0, 1).compiled.factor == 1.5
        assert (sizes.switches, sizes.seconds_waited) == (0, 0.0)
        assert sizes.use(0, 2).compiled.factor == 2.0
        assert sizes.use(0, 1, last=True).compiled.factor == 1.5
        assert sizes.switches == 2
        assert sizes.device_memory_bytes == 200
    assert step.compiled[:2] == [1.5, 2.0]
    assert len(step.compiled) == len(set(step.compiled))


def test_a_size_that_is_asked_for_comes_before_those_in_the_queue():
    step = FakeStep(permits=1)
    with StepSizes([step]) as sizes:
        sizes.use(0, 1)
        make = step.with_capacity

        def asked_for(factor):  # only now may what is in hand be finished
            step.permits.release(2)
            return make(factor)

        step.with_capacity = asked_for
        assert sizes.use(0, 3, last=True).compiled.factor == 3.0
    assert step.compiled in ([1.5, 3.0], [1.5, 2.0, 3.0]), "after what may be in hand, before 1.0"


def test_it_says_what_is_ready_and_whether_it_still_compiles():
    step = FakeStep(permits=1)
    with StepSizes([step]) as sizes:
        assert not sizes.ready(0, 1)
        sizes.use(0, 1)
        assert sizes.ready(0, 1)
        while not sizes.compiling:  # 2.0, until there is a permit
            pass
        assert not sizes.ready(0, 2)
        step.permits.release(2)
        sizes.use(0, 2, last=True)
        assert sizes.ready(0, 2)
        sizes.close()
        assert not sizes.compiling


def test_the_last_size_has_no_neighbors_made():
    step = FakeStep()
    with StepSizes([step]) as sizes:
        sizes.use(0, 2, last=True)
    assert step.compiled == [2.0]


def test_a_size_that_cannot_be_compiled_fails_only_when_it_is_asked_for():
    step = FakeStep()
    with StepSizes([step]) as sizes:
        assert sizes.use(0, 3).compiled.factor == 3.0
        with pytest.raises(RuntimeError, match="does not fit"):
            sizes.use(0, 4)
