"""The train step compiled for each size of the dispatch's buffers, ahead of need, so that a switch does not wait.

Compiling leaves Python's lock alone for most of its time, so a thread beside the training loop can do it. The sizes
next to the one in use are compiled there, the larger first. A switch to one that is not ready waits for it, so which
step runs with which size never depends on the machine's speed.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from moejax.train.step import TrainStep


class StepSizes:
    """`sizes.use(index)` is the step compiled for that size; use it as a context manager.

    `switches` counts the changes of size and `seconds_waited` is what they cost in all; `device_memory_bytes` is that
    of the largest size used.

    Args:
        train_step: the step, and with its balancer the sizes.
        batch_size: sequences of a batch.
        seq_len: tokens of a sequence.
    """

    def __init__(self, train_step: TrainStep, batch_size: int, seq_len: int) -> None:
        self._train_step, self._shape = train_step, (batch_size, seq_len)
        self._factors = train_step.program.balancer.capacity_factors
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compile")
        self._steps: dict[int, Future[Any]] = {}
        self._current: int | None = None
        self.switches, self.seconds_waited, self.device_memory_bytes = 0, 0.0, 0

    def use(self, index: int, *, last: bool = False) -> Any:
        """The compiled step of a size; waits until there is one. After the `last` switch nothing more is compiled."""
        if index != self._current:
            began = time.perf_counter()
            self._cancel_others(index)
            compiled = self._submit(index).result()
            self.device_memory_bytes = max(self.device_memory_bytes, device_memory_bytes(compiled))
            if self._current is not None:
                self.switches += 1
                self.seconds_waited += time.perf_counter() - began
            self._current = index
            for neighbour in () if last else (index + 1, index - 1):
                if 0 <= neighbour < len(self._factors):
                    self._submit(neighbour)
        return self._steps[index].result()

    def __enter__(self) -> StepSizes:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _submit(self, index: int) -> Future[Any]:
        if index not in self._steps:
            step = self._train_step.with_capacity(self._factors[index])
            self._steps[index] = self._pool.submit(lambda: step.lower(*self._shape).compile())
        return self._steps[index]

    def _cancel_others(self, index: int) -> None:
        """Takes out of the queue what is not wanted first; what is being compiled goes on."""
        self._steps = {i: step for i, step in self._steps.items() if i == index or not step.cancel()}


def device_memory_bytes(compiled: Any) -> int:
    """What the compiled step takes on one device: arguments, outputs that are not arguments' memory, temporaries.

    On CPU XLA's own peak figure leaves temporaries out, so the parts are added up.
    """
    m = compiled.memory_analysis()
    total = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
    return max(total, m.peak_memory_in_bytes)
