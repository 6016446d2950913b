"""The train step compiled for each bucket and size of the dispatch's buffers, ahead of need, so that none waits.

Compiling leaves Python's lock alone for most of its time, so a thread beside the training loop can do it. The other
buckets at the size in use are compiled there first, then the sizes next to it, the larger first. A switch to a step
that is not ready waits for it, so which step runs when never depends on the machine's speed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
from absl import logging

from moejax.layout import DoesNotFitError
from moejax.train.memory_guard import FittedStep, fit, is_out_of_memory
from moejax.train.step import TrainStep

Key = tuple[int, int]  # bucket, size


class StepSizes:
    """`sizes.use(bucket, index)` is the step compiled for that; use it as a context manager.

    Each is made to fit in `memory_limit_bytes` (see `moejax.train.memory_guard`). `switches` counts the changes of size
    and `seconds_waited` is what they, and the first use of a bucket after the first, cost in all.

    Args:
        train_steps: of each bucket, the step, and with its balancer the sizes.
        memory_limit_bytes: of one device, 0 for no limit.
    """

    def __init__(self, train_steps: Sequence[TrainStep], memory_limit_bytes: int = 0) -> None:
        self._train_steps, self.memory_limit_bytes = tuple(train_steps), memory_limit_bytes
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compile")
        self._steps: dict[Key, Future[FittedStep]] = {}
        self._current: Key | None = None
        self._instead: dict[Key, Key] = {}  # of sizes that do not fit
        self.used: dict[Key, FittedStep] = {}
        self.switches, self.seconds_waited = 0, 0.0

    @property
    def device_memory_bytes(self) -> int:
        """That of the largest step used."""
        return max((step.memory.total for step in self.used.values()), default=0)

    def ready(self, bucket: int, index: int) -> bool:
        """Whether `use` returns at once."""
        key = self._clamped(bucket, index)
        key = self._instead.get(key, key)
        return key == self._current or (key in self._steps and self._steps[key].done())

    @property
    def compiling(self) -> bool:
        """Whether a step is being compiled, so that `close` takes long."""
        return any(step.running() for step in self._steps.values())

    def use(self, bucket: int, index: int, *, last: bool = False) -> FittedStep:
        """The compiled step of a bucket and size; waits until there is one.

        A bucket that has fewer sizes uses its last. After the `last` switch no further size is compiled.

        Raises:
            DoesNotFitError: a `ConfigError`, where no step down brings the memory below the limit.
        """
        key = self._clamped(bucket, index)
        key = self._instead.get(key, key)
        if key != self._current:
            began = time.perf_counter()
            self._cancel_others(key)
            key = self._fitting(key)
            if self._current is not None:
                self.switches += key[1] != self._current[1]
                self.seconds_waited += time.perf_counter() - began
            self._current = key
            for other in self._wanted_next(key, last):
                self._submit(other)
        return self.used[key]

    def run(self, state: Any, batch: Any) -> tuple[FittedStep, Any]:
        """Runs the step in use; where memory runs out as it starts, the next one down the ladder that does.

        Raises:
            JaxRuntimeError: the step failed otherwise, or after it had taken the state's memory for its own.
        """
        assert self._current is not None, "`use` comes first"
        while True:
            step = self.used[self._current]
            try:
                return step, step(state, batch)
            except jax.errors.JaxRuntimeError as error:
                if not is_out_of_memory(error) or any(leaf.is_deleted() for leaf in jax.tree.leaves(state)):
                    raise
            self.used[self._current] = fit(step.step, self.memory_limit_bytes, refused=True)

    def prepare(self, index: int) -> None:
        """Compiles every bucket at a size, so that what cannot fit is known before anything is trained.

        Raises:
            DoesNotFitError: as `use`.
        """
        keys = [self._clamped(bucket, index) for bucket in range(len(self._train_steps))]
        for key in keys:
            self._submit(key)
        for key in keys:
            self._fitting(key)

    def __enter__(self) -> StepSizes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Waits for the compilation in hand, which cannot be interrupted, and leaves out the rest."""
        self._pool.shutdown(cancel_futures=True)

    def _sizes(self, bucket: int) -> tuple[float, ...]:
        return self._train_steps[bucket].program.balancer.capacity_factors

    def _clamped(self, bucket: int, index: int) -> Key:
        return bucket, min(index, len(self._sizes(bucket)) - 1)

    def _wanted_next(self, key: Key, last: bool) -> Iterator[Key]:
        """What may be asked for after `key`, the soonest first."""
        bucket, index = key
        for other in range(len(self._train_steps)):
            yield self._clamped(other, index)
        if not last:
            yield from ((bucket, near) for near in (index + 1, index - 1) if 0 <= near < len(self._sizes(bucket)))

    def _fitting(self, key: Key) -> Key:
        """`key`, or the next smaller size of its bucket that fits in memory; it is then in `used`."""
        bucket, index = key
        try:
            self.used[key] = self._submit(key).result()
        except DoesNotFitError as error:
            if index == 0:
                raise
            factor, smaller = (self._sizes(bucket)[i] for i in (index, index - 1))
            logging.warning("Buffers of capacity %g do not fit, %g is tried: %s", factor, smaller, error)
            self._instead[key] = self._fitting((bucket, index - 1))
            return self._instead[key]
        return key

    def _submit(self, key: Key) -> Future[FittedStep]:
        if key not in self._steps:
            bucket, index = key
            step = self._train_steps[bucket].with_capacity(self._sizes(bucket)[index])
            self._steps[key] = self._pool.submit(fit, step, self.memory_limit_bytes)
        return self._steps[key]

    def _cancel_others(self, key: Key) -> None:
        """Takes out of the queue what is not wanted first; what is being compiled goes on."""
        self._steps = {other: step for other, step in self._steps.items() if other == key or not step.cancel()}
