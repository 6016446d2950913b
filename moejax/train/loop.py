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

from moejax.balance import BalanceReport
from moejax.config import ConfigError, TrainConfig, check
from moejax.data import Data, load_data, make_loader
from moejax.model import Program
from moejax.train.checkpoint import Checkpointer
from moejax.train.metrics import MetricsWriter
from moejax.train.progress import Progress
from moejax.train.sample import generate
from moejax.train.sizes import StepSizes
from moejax.train.step import TrainState, make_train_step

PROMPT_TOKENS = 32
FROM_METRICS = (  # of the last step, or of the window that ends with it: fields of `Summary`
    "loss", "eval_loss", "eval_bits_per_byte", "window_tokens", "window_load_cv", "window_load_cv_worst",
    "window_load_cv_floor", "window_load_max_over_mean_worst", "window_dropped_fraction", "window_rounds",
    "window_idle_experts", "capacity_factor",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a run came to. Seconds are wall clock; losses are nats a token, or bits a byte of text.

    The figures from `window_tokens` to `window_idle_experts` are over so many of the last tokens (see
    `moejax.balance.BalanceReport`); `capacity_factor` is the size of the dispatch's buffers in the last step, and
    `capacity_seconds_waited` what the switches to other sizes cost.
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
    window_tokens: float
    window_load_cv: float
    window_load_cv_worst: float
    window_load_cv_floor: float
    window_load_max_over_mean_worst: float
    window_dropped_fraction: float
    window_rounds: float
    window_idle_experts: float
    capacity_factor: float
    capacity_switches: int
    capacity_seconds_waited: float
    device_memory_bytes: int
    sample: str | None


class Timing:
    """Seconds of each step, and of everything up to the end of the first; and the sizes that they ran with."""

    def __init__(self, sizes: StepSizes) -> None:
        self.sizes, self.steps, self.first_step = sizes, [], math.nan

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
        self._outside: dict[str, str] = {}  # figures of the balance that are out of their bounds
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
        sizes = StepSizes(self.train_step, config.data.batch_size, config.data.seq_len)
        timing = Timing(sizes)
        with Progress(config.steps, first) as progress, sizes:
            progress.message("compiling the train step")
            index = int(self.train_step.program.balancer.capacity_index(state.balance))
            for step in range(first + 1, config.steps + 1):
                compiled = self._compiled(sizes, index, step)
                began = time.perf_counter()
                batch = next(batches)
                state, metrics = compiled(state, self.train_step.put_batch(batch))
                line = self._line(metrics, batch)
                index = int(line.pop("next_capacity_index"))
                timing.add(time.perf_counter() - began, since=self._start)
                line |= {"step_seconds": timing.steps[-1], "tokens_per_second": self.tokens_per_step / timing.steps[-1]}
                if step % config.eval_every == 0 or step == config.steps:
                    line |= evaluate(state.params)
                if writer is not None:
                    writer.write(step, line)
                progress.step(step, line)
                self._check_finite(step, line, checkpointer)
                self._warn(step, jax.device_get(metrics["balance"]))
                if checkpointer.due(step):
                    checkpointer.save(step, state, batches, metadata=self._metadata())
                if self._stop:
                    break
            if "eval_loss" not in line and not self._stop:  # resumed where it had ended
                line |= evaluate(state.params)
        return state, line, timing

    def _compiled(self, sizes: StepSizes, index: int, step: int) -> Any:
        """The step to run at `step`; others are made ready as long as a window ends before the last step."""
        window = self.config.balance.window
        return sizes.use(index, last=math.ceil(step / window) * window >= self.config.steps)

    def _check_finite(self, step: int, line: dict[str, float], checkpointer: Checkpointer) -> None:
        if math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) and line["invalid_tokens"] == 0:
            return
        raise FloatingPointError(
            f"loss={line['loss']} and grad_norm={line['grad_norm']} at step {step}, and router logits that are not "
            f"finite for {line['invalid_tokens']:.0f} tokens, over layers: training has diverged; checkpoints "
            f"of steps {checkpointer.steps()} are whole; try a lower optimizer.learning_rate or more warmup_steps"
        )

    def _warn(self, step: int, report: BalanceReport) -> None:
        """Says which figures of the balance have left their bounds since the last step, and which have returned."""
        outside = self.program.balancer.breaches(report)
        for name in outside.keys() - self._outside.keys():
            logging.warning("Step %d, %s.", step, outside[name])
        for name in self._outside.keys() - outside.keys():
            logging.warning("Step %d: every layer is within balance.%s again.", step, name)
        self._outside = outside

    def _line(self, metrics: dict[str, Any], batch: dict[str, np.ndarray]) -> dict[str, float]:
        """One line of metrics.jsonl, but for the time it took; waits for the step to end."""
        scalars = {k: v for k, v in metrics.items() if isinstance(v, jax.Array) and v.ndim == 0}
        scalars = {k: float(v) for k, v in jax.device_get(scalars).items()}
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
        figures = line | jax.device_get(self.program.balancer.report(state.balance).scalars())
        return Summary(
            step=int(state.step),
            resumed_from=first,
            interrupted=self._stop,
            tokens_per_second=self.tokens_per_step / timing.median,
            step_seconds=timing.median,
            first_step_seconds=timing.first_step,
            capacity_switches=timing.sizes.switches,
            capacity_seconds_waited=timing.sizes.seconds_waited,
            device_memory_bytes=timing.sizes.device_memory_bytes,
            sample=None if self._stop else self._sample(state),
            total_seconds=time.perf_counter() - self._start,
            **{name: float(figures.get(name, math.nan)) for name in FROM_METRICS},
        )


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
