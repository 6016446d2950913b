"""The trainer: data, steps, evaluation, checkpoints and metrics of one run in one work directory."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from moejax.balance import BalanceReport
from moejax.config import ConfigError, TrainConfig, check
from moejax.data import Data, load_data, make_loader
from moejax.model import counted_targets
from moejax.train.checkpoint import Checkpointer
from moejax.train.memory_guard import device_limit, memory_in_use
from moejax.train.metrics import MetricsWriter
from moejax.train.progress import Progress
from moejax.train.record import append_start, describe_start
from moejax.train.sample import generate
from moejax.train.schedule import Bucket, Schedule
from moejax.train.sizes import StepSizes
from moejax.train.step import TrainState
from moejax.train.summary import FROM_METRICS, Summary, Timing

PROMPT_TOKENS = 32


class Trainer:
    """Trains as `config` says on `mesh`, in `workdir`; a run that was stopped there goes on where it was.

    With the `buckets` of a plan, they say how on the mesh's devices, and each step's batch is of one of them. Held-out
    text is then in rows of the longest, and evaluated on its mesh.

    `around_step(number, step, tokens_BS)` is a context in which each step runs and ends, for what looks on
    (`moejax.profiling.capture.StepCapture.step`).

    Raises:
      ConfigError: the configuration, the mesh or the data cannot work; before anything is compiled or written.
    """

    def __init__(
        self,
        config: TrainConfig,
        mesh: Mesh,
        workdir: str | pathlib.Path,
        buckets: Sequence[Bucket] = (),
        around_step: Callable[..., contextlib.AbstractContextManager[None]] = lambda *_: contextlib.nullcontext(),
    ) -> None:
        self.workdir = pathlib.Path(workdir)
        self.mesh, self.buckets = mesh, tuple(buckets)
        self.schedule = Schedule.of_buckets(config, buckets, mesh)
        self.config = config = self.schedule.configs[-1]
        self.train_step = self.schedule.train_steps[-1]
        self.program = self.train_step.program
        self.data: Data = load_data(config.data)
        check(
            self.data.tokenizer.vocab_size <= config.model.vocab_size,
            f"model.vocab_size={config.model.vocab_size} must be at least the tokenizer's "
            f"{self.data.tokenizer.vocab_size}",
        )
        self._around_step = around_step
        self._stop = False
        self._outside: dict[str, str] = {}  # figures of the balance that are out of their bounds
        self._start = time.perf_counter()

    def run(self) -> Summary:
        """Trains to `config.steps`, or to a SIGTERM or SIGINT, which save and end the run after the step in hand."""
        batches = self.schedule.make_loader(self.data)
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
        """The writer of metrics.jsonl, with this start in run.json beside it; None in all processes but the first."""
        if jax.process_index() > 0:
            return contextlib.nullcontext()
        writer = MetricsWriter(self.workdir, resume_step=first)
        start = describe_start(
            self.config, self.mesh, self.buckets, resumed_from=first, data_fingerprint=self.data.fingerprint
        )
        append_start(self.workdir, start)
        return writer

    def _request_stop(self) -> None:
        self._stop = True

    def _metadata(self) -> dict[str, Any]:
        return {
            "config": dataclasses.asdict(self.config),
            "mesh": dict(self.schedule.at.program.mesh.shape),
            "draws": self._draws(),
            "data": self.data.fingerprint,
            "versions": {"jax": jax.__version__},
        }

    def _draws(self) -> list[list[int]]:
        """What decides, beside the data, which batch comes when: [seq_len, batch_size, group] and `block_steps`."""
        shapes = self.schedule.shapes
        return [*map(list, shapes), [self.config.data.block_steps]] if len(shapes) > 1 else []

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
        draws = metadata.get("draws", [])
        check(
            draws == self._draws(),
            f"buckets of [seq_len, batch_size, group], [block_steps] are {self._draws()} and must be {draws}, as in "
            f"the run that {self.workdir} holds; use its plan, or another workdir",
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
        config = self.config
        line: dict[str, Any] = {}
        evaluate = self._make_evaluate()
        limit = config.memory_limit_bytes or device_limit(self.mesh)
        sizes = StepSizes(self.schedule.train_steps, self.schedule.shapes, limit)
        timing = Timing(sizes, self.schedule)
        with Progress(config.steps, first) as progress, sizes:
            progress.message("compiling the train step")
            index = int(self.program.balancer.wanted_index(state.balance))
            if limit:
                sizes.prepare(index)
            for step in range(first + 1, config.steps + 1):
                began = time.perf_counter()
                batch = next(batches)
                data_seconds = time.perf_counter() - began
                bucket = int(batch.get("bucket", 0))
                fitted = sizes.use(bucket, index, last=self._last_window(step))
                state, reshard_seconds = self.schedule.move(state, bucket)
                with self._around_step(step, fitted, batch["tokens"]):
                    began = time.perf_counter()
                    ran, (state, metrics) = sizes.run(state, self.schedule.at.put_batch(batch))
                    line = self._line(metrics, batch)
                    seconds = data_seconds + time.perf_counter() - began
                index = int(line.pop("next_capacity_index"))
                timing.add(bucket, seconds, since=self._start)
                seq_len = batch["tokens"].shape[1]
                line |= {
                    "step_seconds": seconds,
                    "tokens_per_second": batch["tokens"].size / seconds,
                    "bucket_seq_len": seq_len,
                    "remat": ran.step.program.parallel.remat_policy(seq_len),
                    "reshard_seconds": reshard_seconds,
                    "device_memory_bytes": memory_in_use(self.mesh) or ran.memory.total,
                }
                if step % config.eval_every == 0 or step == config.steps:
                    line |= evaluate(state.params)
                report = jax.device_get(metrics["balance"])
                if writer is not None:
                    writer.write(step, line, self.program.balancer.last_load(state.balance))
                    if "eval_loss" in line:
                        figures = {"window_load_cv": report.cv_L, "window_rounds": report.rounds_L}
                        writer.write_by_layer(step, figures, report.load_LE)
                progress.step(step, line)
                self._check_finite(step, line, checkpointer)
                self._warn(step, report)
                if checkpointer.due(step):
                    checkpointer.save(step, state, batches, metadata=self._metadata())
                if self._stop:
                    break
            if "eval_loss" not in line and not self._stop:  # resumed where it had ended
                line |= evaluate(state.params)
        return state, line, timing

    def _last_window(self, step: int) -> bool:
        """Whether no window of the balancer ends between `step` and the last step: no further size is wanted then."""
        window = self.config.balance.window
        return math.ceil(step / window) * window >= self.config.steps

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

    def _line(self, metrics: dict[str, Any], batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """One line of metrics.jsonl, but for the time it took; waits for the step to end."""
        scalars = {k: v for k, v in metrics.items() if isinstance(v, jax.Array) and v.ndim == 0}
        line = {k: float(v) for k, v in jax.device_get(scalars).items()}
        num_tokens = batch["targets"].size
        bits = line["cross_entropy"] * line["num_targets"] / math.log(2)
        num_bytes = self.data.tokenizer.num_bytes(counted_targets(batch))
        return line | {"bits_per_byte": bits / num_bytes, "load_cv_window_tokens": num_tokens}

    def _make_evaluate(self) -> Callable[[Any], dict[str, float]]:
        """A function from parameters to held-out figures, over the same batches every time."""
        tokenizer = self.data.tokenizer
        loader = make_loader(self.config.data, self.data.eval_documents, tokenizer, train=False)
        held_out = list(itertools.islice(loader, self.config.eval_batches))
        num_targets = sum(counted_targets(batch).size for batch in held_out)
        num_bytes = sum(tokenizer.num_bytes(counted_targets(batch)) for batch in held_out)
        last = len(self.schedule.train_steps) - 1

        def evaluate(params: Any) -> dict[str, float]:
            params = self.schedule.params_for(params, last)
            batches = map(self.train_step.put_batch, held_out)
            metrics = (self.train_step.evaluate(params, batch) for batch in batches)
            nats = sum(float(m["cross_entropy"]) * int(m["num_targets"]) for m in metrics)
            return {"eval_loss": nats / num_targets, "eval_bits_per_byte": nats / math.log(2) / num_bytes}

        return evaluate

    def _sample(self, state: TrainState) -> str | None:
        """The beginning of a held-out document, and how the model goes on."""
        if not self.config.sample_tokens:
            return None
        tokenizer = self.data.tokenizer
        text_ids = tokenizer.encode(self.data.eval_documents[0].text[: 8 * PROMPT_TOKENS])
        prompt = np.asarray([tokenizer.separator, *text_ids[: PROMPT_TOKENS - 1]], np.int32)
        tokens_BS = generate(
            self.schedule.at.program, state.params, prompt, self.config.sample_tokens, vocab_size=tokenizer.vocab_size
        )
        return tokenizer.decode(tokens_BS[0])

    def _summarise(self, state: TrainState, first: int, line: dict[str, float], timing: Timing) -> Summary:
        figures = line | jax.device_get(self.program.balancer.report(state.balance).scalars())
        return Summary(
            step=int(state.step),
            resumed_from=first,
            interrupted=self._stop,
            tokens_per_second=timing.tokens_per_second,
            step_seconds=timing.step_seconds,
            first_step_seconds=timing.first_step,
            capacity_switches=timing.sizes.switches,
            capacity_seconds_waited=timing.sizes.seconds_waited,
            device_memory_bytes=timing.sizes.device_memory_bytes,
            reshards=self.schedule.reshards,
            reshard_seconds=self.schedule.reshard_seconds,
            buckets=timing.buckets(),
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
