"""The trainer: data, steps, evaluation, checkpoints and metrics of one run in one work directory."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import pathlib
import signal
import statistics
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from moejax.balance import load_cv_floor
from moejax.config import ConfigError, TrainConfig, check
from moejax.data import Data, load_data, make_loader
from moejax.model import Program
from moejax.train.checkpoint import Checkpointer
from moejax.train.metrics import MetricsWriter
from moejax.train.progress import Progress
from moejax.train.sample import generate
from moejax.train.step import TrainState, make_train_step

PROMPT_TOKENS = 32


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a run came to. Seconds are wall clock; losses are nats a token, or bits a byte of text.

    `load_cv` is over the last step's `load_cv_window_tokens` tokens, beside the floor that sampling noise sets.
    """

    step: int
    resumed_from: int
    interrupted: bool
    loss: float
    eval_loss: float
    eval_bits_per_byte: float
    tokens_per_second: float
    step_seconds: float
    first_step_seconds: float
    total_seconds: float
    load_cv: float
    load_cv_floor: float
    load_cv_window_tokens: int
    load_max_over_mean: float
    dropped_fraction: float
    device_memory_bytes: int
    sample: str | None


class Timing:
    """Seconds of each step, and of everything up to the end of the first."""

    def __init__(self, memory_bytes: int) -> None:
        self.memory_bytes, self.steps, self.first_step = memory_bytes, [], math.nan

    def add(self, seconds: float, since: float) -> None:
        if not self.steps:
            self.first_step = time.perf_counter() - since
        self.steps.append(seconds)

    @property
    def median(self) -> float:
        """Of the steps after the first, which warms up."""
        return statistics.median(self.steps[1:] or self.steps or [math.nan])


class Trainer:
    """Trains as `config` says on `mesh`, in `workdir`; a run that was stopped there goes on where it was.

    Raises:
      ConfigError: the configuration, the mesh or the data cannot work; before anything is compiled or written.
    """

    def __init__(self, config: TrainConfig, mesh: Mesh, workdir: str | pathlib.Path) -> None:
        self.config, self.workdir = config, pathlib.Path(workdir)
        self.program = Program.from_config(config, mesh)
        self.data: Data = load_data(config.data)
        check(
            self.data.tokenizer.vocab_size <= config.model.vocab_size,
            f"model.vocab_size={config.model.vocab_size} must be at least the tokenizer's "
            f"{self.data.tokenizer.vocab_size}",
        )
        self.train_step = make_train_step(
            self.program, config.optimizer, steps=config.steps, accumulate=config.accumulate
        )
        self.tokens_per_step = config.data.batch_size * config.data.seq_len
        self._stop = False
        self._start = time.perf_counter()

    def run(self) -> Summary:
        """Trains to `config.steps`, or to a SIGTERM or SIGINT, which save and end the run after the step in hand."""
        batches = make_loader(self.config.data, self.data.train_documents, self.data.tokenizer)
        checkpoint = self.config.checkpoint
        with (
            Checkpointer(self.workdir / "checkpoints", keep=checkpoint.keep, every=checkpoint.every) as checkpointer,
            _Signals(self._request_stop),
        ):
            state, first = self._restore_or_init(checkpointer, batches)
            with self._open_writer(first) as writer:
                state, last, timing = self._steps(state, first, batches, checkpointer, writer)
            step = int(state.step)
            if step > first:
                checkpointer.save(step, state, batches, metadata=self._metadata())
        return self._summarise(state, first, last, timing)

    def _open_writer(self, first: int) -> contextlib.AbstractContextManager[MetricsWriter | None]:
        """The writer of metrics.jsonl, and config.json beside it; None in all processes but the first."""
        if jax.process_index() > 0:
            return contextlib.nullcontext()
        (self.workdir / "config.json").write_text(json.dumps(dataclasses.asdict(self.config), indent=1))
        return MetricsWriter(self.workdir, resume_step=first)

    def _request_stop(self) -> None:
        self._stop = True

    def _metadata(self) -> dict[str, Any]:
        return {
            "config": dataclasses.asdict(self.config),
            "mesh": dict(self.program.mesh.shape),
            "data": self.data.fingerprint,
            "versions": {"jax": jax.__version__},
        }

    def _restore_or_init(self, checkpointer: Checkpointer, batches: Any) -> tuple[TrainState, int]:
        restored = checkpointer.restore(self.train_step.state_shapes, batches)
        if restored is None:
            return self.train_step.init(jax.random.key(self.config.seed)), 0
        state, step, metadata = restored
        saved = metadata["config"]["data"]
        ours = dataclasses.asdict(self.config.data)
        for name in ("batch_size", "seq_len", "seed"):
            check(
                saved[name] == ours[name],
                f"data.{name}={ours[name]} must be {saved[name]}, as in the run that {self.workdir} holds; "
                "use that, or another workdir",
            )
        if metadata["data"] != self.data.fingerprint:
            raise ConfigError(
                f"the training text or tokenizer is not the one that the run in {self.workdir} was started with; "
                "give the same data.paths and data.tokenizer, or use another workdir"
            )
        logging.info("Resumed %s at step %d.", self.workdir, step)
        return state, step

    def _steps(
        self, state: TrainState, first: int, batches: Any, checkpointer: Checkpointer, writer: MetricsWriter | None
    ) -> tuple[TrainState, dict[str, float], Timing]:
        """Runs the steps after `first`; returns the state, the last step's line of metrics and the times taken."""
        config, line = self.config, {}
        evaluate = self._make_evaluate()
        with Progress(config.steps, first) as progress:
            progress.message("compiling the train step")
            compiled = self.train_step.lower(config.data.batch_size, config.data.seq_len).compile()
            timing = Timing(device_memory_bytes(compiled))
            for step in range(first + 1, config.steps + 1):
                began = time.perf_counter()
                batch = next(batches)
                state, metrics = compiled(state, self.train_step.put_batch(batch))
                line = self._line(metrics, batch)
                timing.add(time.perf_counter() - began, since=self._start)
                line |= {"step_seconds": timing.steps[-1], "tokens_per_second": self.tokens_per_step / timing.steps[-1]}
                if step % config.eval_every == 0 or step == config.steps:
                    line |= evaluate(state.params)
                if writer is not None:
                    writer.write(step, line)
                progress.step(step, line)
                self._check_finite(step, line, checkpointer)
                if checkpointer.due(step):
                    checkpointer.save(step, state, batches, metadata=self._metadata())
                if self._stop:
                    break
            if "eval_loss" not in line and not self._stop:  # resumed where it had ended
                line |= evaluate(state.params)
        return state, line, timing

    def _check_finite(self, step: int, line: dict[str, float], checkpointer: Checkpointer) -> None:
        if math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]):
            return
        raise FloatingPointError(
            f"loss={line['loss']} and grad_norm={line['grad_norm']} at step {step}: training has diverged; checkpoints "
            f"of steps {checkpointer.steps()} are whole; try a lower optimizer.learning_rate or more warmup_steps"
        )

    def _line(self, metrics: dict[str, Any], batch: dict[str, np.ndarray]) -> dict[str, float]:
        """One line of metrics.jsonl, but for the time it took; waits for the step to end."""
        scalars = {k: float(v) for k, v in jax.device_get({k: v for k, v in metrics.items() if v.ndim == 0}).items()}
        bits = scalars["cross_entropy"] * self.tokens_per_step / math.log(2)
        num_bytes = self.data.tokenizer.num_bytes(batch["targets"])
        return scalars | {"bits_per_byte": bits / num_bytes, "load_cv_window_tokens": self.tokens_per_step}

    def _make_evaluate(self) -> Callable[[Any], dict[str, float]]:
        """A function from parameters to held-out figures, over the same batches every time."""
        tokenizer = self.data.tokenizer
        loader = make_loader(self.config.data, self.data.eval_documents, tokenizer, train=False)
        held_out = list(itertools.islice(loader, self.config.eval_batches))
        num_bytes = sum(tokenizer.num_bytes(batch["targets"]) for batch in held_out)

        def evaluate(params: Any) -> dict[str, float]:
            batches = map(self.train_step.put_batch, held_out)
            nats = [float(self.train_step.evaluate(params, batch)["cross_entropy"]) for batch in batches]
            bits = sum(nats) * self.tokens_per_step / math.log(2)
            return {"eval_loss": statistics.fmean(nats), "eval_bits_per_byte": bits / num_bytes}

        return evaluate

    def _sample(self, state: TrainState) -> str | None:
        """The beginning of a held-out document, and how the model goes on."""
        if not self.config.sample_tokens:
            return None
        tokenizer = self.data.tokenizer
        text_ids = tokenizer.encode(self.data.eval_documents[0].text[: 8 * PROMPT_TOKENS])
        prompt = np.asarray([tokenizer.separator, *text_ids[: PROMPT_TOKENS - 1]], np.int32)
        tokens_BS = generate(
            self.program, state.params, prompt, self.config.sample_tokens, vocab_size=tokenizer.vocab_size
        )
        return tokenizer.decode(tokens_BS[0])

    def _summarise(self, state: TrainState, first: int, line: dict[str, float], timing: Timing) -> Summary:
        model = self.config.model
        names = ("loss", "eval_loss", "eval_bits_per_byte", "load_cv", "load_max_over_mean", "dropped_fraction")
        return Summary(
            step=int(state.step),
            resumed_from=first,
            interrupted=self._stop,
            tokens_per_second=self.tokens_per_step / timing.median,
            step_seconds=timing.median,
            first_step_seconds=timing.first_step,
            load_cv_floor=load_cv_floor(self.tokens_per_step, model.experts_per_token, model.num_experts),
            load_cv_window_tokens=self.tokens_per_step,
            device_memory_bytes=timing.memory_bytes,
            sample=None if self._stop else self._sample(state),
            total_seconds=time.perf_counter() - self._start,
            **{name: line.get(name, math.nan) for name in names},
        )


def device_memory_bytes(compiled: Any) -> int:
    """What the compiled step takes on one device: arguments, outputs that are not arguments' memory, temporaries.

    On CPU XLA's own peak figure leaves temporaries out, so the parts are added up.
    """
    m = compiled.memory_analysis()
    total = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
    return max(total, m.peak_memory_in_bytes)


class _Signals:
    """Turns SIGTERM and the first SIGINT into a call, for as long as it is entered; a second SIGINT interrupts."""

    def __init__(self, request_stop: Callable[[], None]) -> None:
        self._request_stop = request_stop
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self._previous = {n: signal.signal(n, self._handle) for n in (signal.SIGTERM, signal.SIGINT)}

    def _handle(self, number: int, _: FrameType | None) -> None:
        self._request_stop()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
