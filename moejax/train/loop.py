"""The trainer: data, steps, evaluation, checkpoints and metrics of one run in one work directory."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import math
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax

from moejax.balance import BoundWatch
from moejax.batch import counted_targets
from moejax.checks import ConfigError, check, expand, one_line
from moejax.config import BalanceConfig
from moejax.data import Data, load_data
from moejax.interop import Upcycling, load_hf
from moejax.overrides import from_record
from moejax.train.checkpoint import Checkpointer, CheckpointError
from moejax.train.config import TrainConfig
from moejax.train.memory_guard import device_limit, memory_in_use
from moejax.train.metrics import MetricsWriter
from moejax.train.progress import Progress
from moejax.train.record import append_start, describe_start
from moejax.train.resume import CHECKPOINTS, check_data, check_run, compare, read_record
from moejax.train.sample import Sample, sample_text
from moejax.train.schedule import Schedule
from moejax.train.signals import Signals
from moejax.train.sizes import StepSizes
from moejax.train.step import TrainState
from moejax.train.step_record import Evaluation, StepRecord, bits_per_byte
from moejax.train.summary import FROM_METRICS, Summary, Timing
from moejax.train.workdir import WorkdirLock

SAVING = "saving a checkpoint"
_log = logging.getLogger(__name__)


class Trainer:
    """Trains as `config` says in `workdir`; a run that was stopped there goes on where it was.

    Where the configuration is not that of the run in `workdir`, a line says so for each field. Fields that would make
    it another run need `override` (see `moejax.train.resume`). `devices` are by default all that JAX finds.

    With several layouts, each step's batch is of one of them. Held-out text is then in rows of the longest, and
    evaluated on its mesh.

    `around_step(number, step)` is a context in which each step runs and ends, for what looks on
    (`moejax.profiling.capture.StepCapture.step`).

    Raises:
      ConfigError: the configuration, the devices or the data cannot work; before anything is compiled or written.
    """

    def __init__(
        self,
        config: TrainConfig,
        workdir: str | pathlib.Path,
        around_step: Callable[..., contextlib.AbstractContextManager[None]] = lambda *_: contextlib.nullcontext(),
        *,
        devices: Sequence[jax.Device] | None = None,
        override: bool = False,
    ) -> None:
        self._start = time.perf_counter()
        self.workdir = expand(workdir, "workdir")
        self.config = config
        self._progress = Progress(config.steps)
        self._lock = WorkdirLock(self.workdir)
        self._lock.check_possible()
        record = read_record(self.workdir)
        if record is not None:
            self._say(check_run(record, config, self.workdir, override=override))
        self.schedule = Schedule(config, devices)
        self.train_step = self.schedule.train_steps[-1]
        self.program = self.train_step.program
        try:
            with self._preparing("reading the text and its tokenizer") as report:
                self.data: Data = load_data(config.data, workdir=self.workdir, report=report)
        except ConfigError as error:
            if record is None or any(difference.kind == "data" for difference in compare(record.config, config)):
                raise
            raise ConfigError(f"{error} (the run in {self.workdir} recorded this value)") from None
        if record is not None:
            self._say(check_data(record, config, self.data.fingerprint, self.workdir))
        check(
            self.data.tokenizer.vocab_size <= config.model.vocab_size,
            f"model.vocab_size={config.model.vocab_size} must be at least the tokenizer's "
            f"{self.data.tokenizer.vocab_size}; set it to that or more",
        )
        self._around_step = around_step
        self._watch = BoundWatch(config.balance.window)

    @contextlib.contextmanager
    def _preparing(self, what: str) -> Iterator[Callable[[str], None]]:
        """Shows `what` is being done before there is anything to save; yields a function that shows how far it is."""
        with self._progress as progress, Signals(progress.say), progress.waiting(what):
            yield progress.update

    def _say(self, lines: Iterable[str]) -> None:
        for line in lines:
            self._progress.say(line)

    def run(self) -> Summary:
        """Trains to `config.steps`, or until a SIGTERM or SIGINT, after which it saves and returns.

        Before the first step has ended, a signal ends the process; so does a second SIGINT at any time. See
        `moejax.train.signals.Signals`.
        """
        config, progress = self.config, self._progress
        with self._preparing("encoding the text") as report:
            batches = self.schedule.make_loader(self.data, report)
        limit = config.memory_limit_bytes or device_limit(self.schedule.mesh)
        directory = self.workdir / CHECKPOINTS
        with (
            self._lock,
            progress,
            Checkpointer(directory, keep=config.checkpoint.keep, every=config.checkpoint.every) as checkpointer,
            self._take_signals(checkpointer) as self._signals,
            StepSizes(self.schedule.train_steps, limit) as sizes,
        ):
            with progress.waiting("restoring the checkpoint" if checkpointer.steps() else "making the parameters"):
                state, first = self._restore_or_init(checkpointer, batches)
            progress.begin(first)
            with self._open_writer(first) as writer:
                state, last, timing = self._steps(state, first, batches, checkpointer, writer, sizes)
            step = int(state.step)
            if step > first:
                with progress.waiting(SAVING):
                    self._save(checkpointer, step, state, batches)
                    checkpointer.wait()
            if sizes.compiling:
                with progress.waiting("ending the compilation in the background"):
                    sizes.close()
            return self._summarize(state, first, last, timing)

    def _take_signals(self, checkpointer: Checkpointer) -> Signals:
        progress = self._progress

        def saved() -> int:
            return max(checkpointer.steps(), default=0)

        def awaited() -> str | None:
            if not progress.trained:
                return None
            is_safe = progress.awaited == SAVING or saved() == progress.done
            return progress.awaited + ("" if is_safe else " and saving")

        def lost() -> str:
            if not progress.trained or saved() == progress.done:
                return "nothing is lost"
            return f"steps after checkpoint {saved()} are not saved" if saved() else "no step is saved"

        return Signals(progress.say, awaited, lost)

    def _open_writer(self, first: int) -> contextlib.AbstractContextManager[MetricsWriter | None]:
        """The writer of metrics.jsonl, with this start in run.json beside it; None in all processes but the first."""
        if jax.process_index() > 0:
            return contextlib.nullcontext()
        start = describe_start(
            self.config, self.schedule.mesh, resumed_from=first, data_fingerprint=self.data.fingerprint
        )
        try:
            writer = MetricsWriter(self.workdir, resume_step=first)
            append_start(self.workdir, start)
        except OSError as error:
            why = f"{error.strerror}: {error.filename}"
            raise ConfigError(
                f"workdir={self.workdir} cannot be written to ({why}); make room there, or give another"
            ) from None
        return writer

    def _save(self, checkpointer: Checkpointer, step: int, state: TrainState, batches: Any) -> None:
        """Begins a checkpoint. Where the one before could not be written, that is a warning: this one is the retry."""
        try:
            checkpointer.wait()
        except CheckpointError as error:
            _log.warning("%s. The newest whole ones are of steps %s. Trying again.", error, checkpointer.steps())
        checkpointer.save(step, state, batches, metadata=self._metadata())

    def _metadata(self) -> dict[str, Any]:
        return {
            "config": dataclasses.asdict(self.config),
            "mesh": self.schedule.at.program.layout.mesh.shape,
            "draws": self._draws(),
            "data": self.data.fingerprint,
            "versions": {"jax": jax.__version__},
        }

    def _draws(self) -> list[list[int]]:
        """What decides, beside the data, which batch comes when: [seq_len, batch_size, group] and `block_steps`."""
        shapes = self.schedule.shapes
        return [*map(list, shapes), [self.config.data.block_steps]] if len(shapes) > 1 else []

    def _restore_or_init(self, checkpointer: Checkpointer, batches: Any) -> tuple[TrainState, int]:
        metadata = checkpointer.read_metadata()
        if metadata is None:
            return self._init(), 0
        draws = metadata.get("draws", [])
        check(
            draws == self._draws(),
            f"buckets of [seq_len, batch_size, group], [block_steps] are {self._draws()} and must be {draws}, as in "
            f"the run that {self.workdir} holds; use its plan, or another workdir",
        )
        template = self.train_step.state_shapes
        changed = self._changed_windows(metadata)
        if changed:
            self._progress.say(f"the balancer's windows start anew: {changed}")
            balance = jax.device_put(self.program.balancer.init(), self.train_step.state_shardings.balance)
            template = dataclasses.replace(template, balance=balance)
        restored = checkpointer.restore(template, batches, fresh=("balance",) if changed else ())
        assert restored is not None, "there is a checkpoint: its metadata was read"
        state, step, _ = restored
        check(
            step <= self.config.steps,
            f"--config.steps={self.config.steps} is less than the {step} steps that the run in {self.workdir} has "
            "done; ask for as many or more, or use another workdir",
        )
        self._progress.say(f"resumed {self.workdir} at step {step}")
        return state, step

    def _init(self) -> TrainState:
        if not self.config.init:
            return self.train_step.init(jax.random.key(self.config.seed))
        upcycling = Upcycling.parse(self.config.upcycle) if self.config.upcycle else None
        loaded = load_hf(
            self.config.init, self.program, self._progress.update, upcycling=upcycling, seed=self.config.seed
        )
        self._progress.say(f"{self.config.init}: {loaded}")
        return self.train_step.init_from(loaded.params)

    def _changed_windows(self, metadata: dict[str, Any]) -> str:
        """Returns the fields whose change leaves a checkpoint's balancer state without a meaning, "" if none did."""
        saved, _ = from_record(BalanceConfig, metadata["config"]["balance"], "balance")
        before, now = dataclasses.asdict(saved), dataclasses.asdict(self.config.balance)
        fields = ("window", "capacity_factors")
        return ", ".join(f"balance.{f}={before[f]} became {now[f]}" for f in fields if before[f] != now[f])

    def _steps(
        self,
        state: TrainState,
        first: int,
        batches: Any,
        checkpointer: Checkpointer,
        writer: MetricsWriter | None,
        sizes: StepSizes,
    ) -> tuple[TrainState, dict[str, Any], Timing]:
        """Runs the steps after `first`; returns the state, the last step's line of metrics and the times taken."""
        config, progress = self.config, self._progress
        record: StepRecord | None = None
        evaluate = self._make_evaluate()
        timing = Timing(sizes, self.schedule)
        index = int(self.program.balancer.wanted_index(state.balance))
        if sizes.memory_limit_bytes:
            with progress.waiting("compiling the train step"):
                sizes.prepare(index)
        for step in range(first + 1, config.steps + 1):
            state, record = self._step(state, step, batches, sizes, index, timing)
            index = record.next_capacity_index
            progress.done = step
            if step % config.eval_every == 0 or step == config.steps:
                record = dataclasses.replace(record, evaluation=evaluate(state.params))
            if writer is not None:
                self._write(writer, record, state)
            progress.step(step, record.line())
            self._check_finite(record, checkpointer)
            for warning in self._watch.update(step, self.program.balancer.figures(record.report)):
                _log.warning("%s", warning)
            if checkpointer.due(step):
                with progress.waiting(SAVING):
                    self._save(checkpointer, step, state, batches)
            if self._signals.stop:
                break
        line = record.line() if record else {}
        if "eval_loss" not in line and not self._signals.stop:  # resumed where it had ended
            line |= evaluate(state.params).line()
        return state, line, timing

    def _write(self, writer: MetricsWriter, record: StepRecord, state: TrainState) -> None:
        writer.write(record.step, record.line(), self.program.balancer.last_load(state.balance))
        if record.evaluation:
            figures = {"window_load_cv": record.report.cv_L, "window_rounds": record.report.rounds_L}
            writer.write_by_layer(record.step, figures, record.report.load_LE)

    def _step(
        self, state: TrainState, step: int, batches: Iterator[Any], sizes: StepSizes, index: int, timing: Timing
    ) -> tuple[TrainState, StepRecord]:
        """Runs one step with the buffers of size `index`, and waits for it to end."""
        began = time.perf_counter()
        batch = next(batches)
        data_seconds = time.perf_counter() - began
        bucket = int(batch.get("bucket", 0))
        with (
            self._progress.waiting("compiling the train step")
            if not sizes.ready(bucket, index)
            else contextlib.nullcontext()
        ):
            fitted = sizes.use(bucket, index, last=self._last_window(step))
        state, reshard_seconds = self.schedule.move(state, bucket)
        with self._around_step(step, fitted):
            began = time.perf_counter()
            ran, (state, metrics) = sizes.run(state, self.schedule.at.put_batch(batch))
            arrays = {k: v for k, v in metrics.items() if isinstance(v, jax.Array) and v.ndim == 0}
            scalars = {k: float(v) for k, v in jax.device_get(arrays).items()}
            seconds = data_seconds + time.perf_counter() - began
        timing.add(bucket, seconds, since=self._start)
        num_bytes = self.data.tokenizer.num_bytes(counted_targets(batch))
        return state, StepRecord(
            step=step,
            scalars=scalars,
            report=jax.device_get(metrics["balance"]),
            bits_per_byte=bits_per_byte(scalars["cross_entropy"] * scalars["num_targets"], num_bytes),
            seq_len=batch["tokens"].shape[1],
            num_tokens=batch["tokens"].size,
            remat=ran.step.program.resolved.remat,
            seconds=seconds,
            reshard_seconds=reshard_seconds,
            device_memory_bytes=memory_in_use(self.schedule.mesh) or ran.memory.total,
        )

    def _last_window(self, step: int) -> bool:
        """Whether no window of the balancer ends between `step` and the last step: no further size is wanted then."""
        window = self.config.balance.window
        return math.ceil(step / window) * window >= self.config.steps

    def _check_finite(self, record: StepRecord, checkpointer: Checkpointer) -> None:
        if record.is_finite:
            return
        s = record.scalars
        raise FloatingPointError(
            f"loss={s['loss']} and grad_norm={s['grad_norm']} at step {record.step}, and router logits that are not "
            f"finite for {s['invalid_tokens']:.0f} tokens, over layers: training has diverged; checkpoints "
            f"of steps {checkpointer.steps()} are whole; try a lower optimizer.learning_rate or more warmup_steps"
        )

    def _make_evaluate(self) -> Callable[[Any], Evaluation]:
        """A function from parameters to held-out figures, over the same batches every time."""
        tokenizer = self.data.tokenizer
        layout = self.config.layout
        loader = self.data.batches(seq_len=layout.seq_len, batch_size=layout.batch_size, train=False)
        held_out = list(itertools.islice(loader, self.config.eval_batches))
        num_targets = sum(counted_targets(batch).size for batch in held_out)
        num_bytes = sum(tokenizer.num_bytes(counted_targets(batch)) for batch in held_out)
        last = len(self.schedule.train_steps) - 1

        def evaluate(params: Any) -> Evaluation:
            with self._progress.waiting("evaluating on held-out text"):
                params = self.schedule.params_for(params, last)
                batches = map(self.train_step.put_batch, held_out)
                metrics = (self.train_step.evaluate(params, batch) for batch in batches)
                nats = sum(float(m["cross_entropy"]) * int(m["num_targets"]) for m in metrics)
            return Evaluation(nats / num_targets, bits_per_byte(nats, num_bytes))

        return evaluate

    def _sample(self, state: TrainState) -> Sample | None:
        """Returns how the model continues a held-out document; None, with a warning, if that fails."""
        if self._signals.stop or not self.config.sample_tokens:
            return None
        text, num_tokens = self.data.eval_documents[0].text, self.config.sample_tokens
        try:
            with self._progress.waiting("writing a sample"):
                return sample_text(self.schedule.at.program, state.params, self.data.tokenizer, text, num_tokens)
        except Exception as error:  # the run has ended well and is saved; its summary must come
            _log.warning("the run has no sample: %s", one_line(error))
            return None

    def _summarize(self, state: TrainState, first: int, line: dict[str, float], timing: Timing) -> Summary:
        figures = line | jax.device_get(self.program.balancer.report(state.balance).scalars())
        return Summary(
            step=int(state.step),
            resumed_from=first,
            interrupted=int(state.step) < self.config.steps,
            tokens_per_second=timing.tokens_per_second,
            step_seconds=timing.step_seconds,
            first_step_seconds=timing.first_step,
            capacity_switches=timing.sizes.switches,
            capacity_seconds_waited=timing.sizes.seconds_waited,
            device_memory_bytes=timing.sizes.device_memory_bytes,
            reshards=self.schedule.reshards,
            reshard_seconds=self.schedule.reshard_seconds,
            buckets=timing.buckets(),
            sample=self._sample(state),
            total_seconds=time.perf_counter() - self._start,
            **{name: float(figures.get(name, math.nan)) for name in FROM_METRICS},
        )
