"""The search for a layout, and why it is the one.

Two stages. First every mesh × crossing axis × folding × repeats × microbatches, each with the weakest rematerialization
that fits, for a stronger one only adds work; then, for the best of them, every choice that changes a step less:
gathering, dispatch, hops, chunks, parts of a microbatch, and the other policies. Closed forms judge them all.

What is left out, and why: `tensor` never crosses hosts (its collectives wait for products in every layer); tokens
travel as `wire_dtype` says (float8 changes results, which is the user's choice); buffers have the configured headroom.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import operator
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, cast, get_args

from moejax.checks import ConfigError
from moejax.config import DispatchConfig, ExpertAxis, ModelConfig
from moejax.layout import REMAT_LADDER, DoesNotFitError, Layout
from moejax.mesh import EXPERT, PIPELINE, REPLICA, Hardware, HostAxis, MeshConfig
from moejax.planner.costs import Assumptions
from moejax.planner.hardware import Cluster, Constant
from moejax.planner.memory import Memory, predict_memory
from moejax.planner.predict import Prediction, is_legal, most, predict_step, smallest_changes
from moejax.planner.time import StepTime
from moejax.planner.units import quantity
from moejax.planner.work import Mode

ACCUMULATE = (1, 2, 4, 8, 16, 32)
REFINED = 8  # layouts that the second stage looks at
REMAT_FROM, TENSOR_FROM = 2048, 4096  # tokens, the rules of the strategy


def default_batch_size(seq_len: int, num_devices: int = 16) -> int:
    """Sequences of a step on 16 devices, more on more: 128 of up to 128 tokens, 64 of 1,024, 32 of 10,240.

    It shrinks with the cube root of the length, to a power of two: longer sequences still bring more tokens.
    """
    sequences = 2 ** round(7 - math.log2(max(seq_len, 128) / 128) / 3)
    return max(32, sequences) * max(1, num_devices // 16)


@dataclasses.dataclass(frozen=True)
class Flip:
    """A constant whose change would make another plan the fastest: from `value` to `flips_at`."""

    constant: str
    value: float
    flips_at: float
    kind: str

    @property
    def factor(self) -> float:
        return self.flips_at / self.value


@dataclasses.dataclass(frozen=True)
class Choice:
    """The best plan and what it was chosen from.

    `runner_up` is the fastest on another mesh, `by_rules` the fastest that follows the strategy's rules (full
    rematerialization from 2,048 tokens, tensor parallelism from 4,096), `unfit` the fastest of those that need more
    memory than there is. `rejected` counts plans that do not fit by their largest category of memory.
    """

    best: Prediction
    runner_up: Prediction | None
    by_rules: Prediction | None
    unfit: Prediction | None
    rejected: dict[str, int]
    flips: tuple[Flip, ...]
    evaluated: int
    seconds: float

    @property
    def margin(self) -> float | None:
        """How much longer the runner-up takes, as a fraction."""
        return self.runner_up.time.expected / self.best.time.expected - 1 if self.runner_up else None

    @property
    def binding(self) -> str:
        """What keeps the step from being faster: memory, where a faster plan does not fit, else what takes longest."""
        if self.unfit and self.unfit.time.expected < self.best.time.expected:
            return f"room in memory for {self.unfit.memory.largest.replace('_', ' ')}"
        by_category = self.best.time.by_category
        longest = max(by_category, key=by_category.__getitem__)
        return {"memory": "memory bandwidth"}.get(longest, longest)


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked: a model on a cluster, with a batch."""

    model: ModelConfig
    cluster: Cluster
    seq_len: int
    batch_size: int
    mode: Mode = "train"
    assumptions: Assumptions = Assumptions()
    dispatch: DispatchConfig = DispatchConfig()  # capacity_factor and wire_dtype, which are not searched over

    def __post_init__(self) -> None:
        longest = self.model.max_seq_len
        if self.seq_len > longest and self.mode != "decode":
            raise ConfigError(f"seq_len={self.seq_len} must be at most the model's max_seq_len={longest}")

    @property
    def limit_bytes(self) -> float:
        return self.cluster.device.usable_bytes

    def memory(self, layout: Layout) -> Memory:
        return predict_memory(self.model, layout, self.mode)

    def time(self, layout: Layout, cluster: Cluster | None = None) -> StepTime:
        return predict_step(self.model, layout, cluster or self.cluster, self.assumptions, self.mode)

    def prediction(self, layout: Layout, memory: Memory) -> Prediction:
        return Prediction(layout, memory, self.time(layout), self.mode)


def find_plan(request: Request) -> Choice:
    """The fastest plan that fits, and why.

    Raises:
      DoesNotFitError: none fits; or no mesh of the cluster can hold the model.
    """
    began = time.perf_counter()
    seen = _Seen(request)
    for accumulate in ACCUMULATE if request.mode == "train" else (1,):
        seen.consider(_by_remat(request, layout) for layout in _layouts(request, accumulate))
        if seen.fitting:
            break
    if not seen.fitting:
        raise DoesNotFitError(_why_none(request, seen))
    for prediction in _best_by(seen.fitting, _kind_of)[:REFINED]:
        seen.consider([layout] for layout in _variants(request, prediction.layout))
    best = min(seen.fitting, key=_seconds)
    others = [p for p in seen.fitting if p.layout.mesh.shape != best.layout.mesh.shape]
    runner_up = min(others, key=_seconds, default=None)
    rules = [p for p in seen.fitting if follows_rules(p.layout)] + _by_rules(request, seen)
    return Choice(
        best,
        runner_up,
        min(rules, key=_seconds, default=None),
        min(seen.unfit(), key=_seconds, default=None),
        dict(seen.rejected),
        flips(request, best, runner_up) if runner_up else (),
        seen.evaluated,
        time.perf_counter() - began,
    )


def follows_rules(layout: Layout) -> bool:
    """Whether a training layout rematerializes from 2,048 tokens up and is tensor-parallel from 4,096 up."""
    full = layout.resolve().remat == "full"
    return (layout.seq_len < REMAT_FROM or full) and (layout.seq_len < TENSOR_FROM or layout.mesh.tensor > 1)


class _Seen:
    """The layouts that were looked at."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.fitting: list[Prediction] = []
        self.rejected: Counter[str] = Counter()
        self.evaluated = 0
        self._unfit: list[tuple[Layout, Memory]] = []
        self._layouts: set[Layout] = set()

    def consider(self, groups: Iterable[Iterable[Layout]]) -> None:
        """Of each group the first layout that fits."""
        for group in groups:
            for layout in group:
                if layout in self._layouts:
                    continue
                self._layouts.add(layout)
                if self.add(layout):
                    break

    def add(self, layout: Layout) -> bool:
        self.evaluated += 1
        memory = self.request.memory(layout)
        if memory.peak_bytes > self.request.limit_bytes:
            self.rejected[memory.largest] += 1
            self._unfit.append((layout, memory))
            return False
        self.fitting.append(self.request.prediction(layout, memory))
        return True

    def unfit(self) -> list[Prediction]:
        """Those nearest to fitting, timed."""
        nearest = sorted(self._unfit, key=lambda found: found[1].peak_bytes)[:64]
        return [self.request.prediction(layout, memory) for layout, memory in nearest]

    def nearest(self) -> tuple[Layout, Memory] | None:
        return min(self._unfit, key=lambda found: found[1].peak_bytes, default=None)


def meshes(cluster: Cluster, model: ModelConfig) -> Iterator[MeshConfig]:
    """Every mesh of all the cluster's devices that the model could be divided over, with each axis that can cross."""
    num_devices, hosts = cluster.num_devices, cluster.hosts
    known = cluster.device.name in get_args(Hardware)
    hardware = cast(Hardware, cluster.device.name if known else "custom")
    for tensor, pipeline in itertools.product(_divisors(num_devices), repeat=2):
        kv_heads, layers = model.attention.num_kv_heads, model.num_moe_layers
        stages = math.ceil(layers / math.ceil(layers / pipeline))  # that have a layer
        if tensor > cluster.devices_per_host or kv_heads % tensor or stages < pipeline:
            continue
        for expert in _divisors(num_devices // (tensor * pipeline) if num_devices % (tensor * pipeline) == 0 else 0):
            if model.num_experts % expert:
                continue
            replica = num_devices // (tensor * pipeline * expert)
            shape = {PIPELINE: pipeline, EXPERT: expert, REPLICA: replica}
            for axis in _crossing_axes(shape, hosts):
                yield MeshConfig(expert, pipeline, tensor, replica, hardware, hosts, axis)


def _crossing_axes(shape: dict[str, int], hosts: int) -> list[HostAxis]:
    """The axes that can be `MeshConfig.host_axis`, one of which is enough where they come to the same."""
    if hosts == 1:
        return [EXPERT]
    if shape[REPLICA] % hosts == 0:
        return [REPLICA]
    if hosts % shape[REPLICA]:
        return []
    return [axis for axis in (PIPELINE, EXPERT) if shape[axis] % (hosts // shape[REPLICA]) == 0]


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _layouts(request: Request, grad_accumulation_steps: int) -> Iterator[Layout]:
    """The first stage: layouts that differ in mesh, folding, repeats and microbatches."""
    r, m = request, request.model
    for mesh in meshes(r.cluster, m):
        sequences = r.batch_size // (mesh.replica * mesh.expert * grad_accumulation_steps)
        folded: list[tuple[ExpertAxis, ...]] = [("expert", "tensor")]
        folded += [("expert",)] if mesh.tensor > 1 else []
        places = math.ceil(m.num_moe_layers / mesh.pipeline)  # for a stage's layers; interleaving must not add to them
        repeats = [n for n in (1, 2, 4) if places % n == 0] if mesh.pipeline > 1 and r.mode != "decode" else [1]
        powers = [2**i for i in range(sequences.bit_length()) if sequences % 2**i == 0]
        microbatches = powers if r.mode != "decode" else [1]
        for axes, repeat, count in itertools.product(folded, repeats, microbatches):
            if mesh.pipeline == 1 and r.mode == "prefill" and count > 8:
                continue
            split = 2 if mesh.expert * mesh.tensor > 1 and (sequences // count) % 2 == 0 and r.mode == "train" else 1
            dispatch = dataclasses.replace(
                r.dispatch, strategy="dropless", expert_axes=axes, hierarchical=False, chunks=1
            )
            layout = Layout(
                mesh,
                r.seq_len,
                r.batch_size,
                grad_accumulation_steps,
                num_microbatches=count,
                pipeline_repeats=repeat,
                remat="none",
                batch_split=split,
                dispatch=dispatch,
            )
            if is_legal(m, layout, r.mode):
                yield layout


def _by_remat(request: Request, layout: Layout) -> list[Layout]:
    """The layout under each policy, the weakest first."""
    policies = REMAT_LADDER if request.mode == "train" else ("none",)
    return [layout.replace(remat=policy) for policy in policies]


def _variants(request: Request, layout: Layout) -> Iterator[Layout]:
    """The second stage: the smaller choices around a layout."""
    mesh, train, exchanges = layout.mesh, request.mode == "train", layout.exchanges
    gathers = ("step", "layer") if train else ("step",)
    ragged = exchanges and mesh.hardware != "cpu"  # whose ragged exchange is a gather of everything, for tests
    strategies = ("dropless", "ragged") if ragged else ("dropless",)
    splits = (1, 2) if exchanges and train else (layout.batch_split,)
    chunks = (1, 2, 4) if exchanges and train else (1,)
    hops = (False, True) if mesh.hosts_along(EXPERT) > 1 else (False,)
    policies = REMAT_LADDER if train else ("none",)
    policies = policies[policies.index(layout.remat) :][:2]
    choices = itertools.product(gathers, strategies, splits, chunks, hops, policies)
    for gather, strategy, split, count, hierarchical, policy in choices:
        if strategy == "ragged" and count > 1:
            continue
        variant = layout.replace(
            gather=gather, batch_split=split, remat=policy, strategy=strategy, chunks=count, hierarchical=hierarchical
        )
        if is_legal(request.model, variant, request.mode):
            yield variant


def _by_rules(request: Request, seen: _Seen) -> list[Prediction]:
    """The fastest layout of each kind once more, with full rematerialization where the rules ask for it."""
    if request.mode != "train" or request.seq_len < REMAT_FROM:
        return []
    found = []
    for prediction in _best_by(seen.fitting, _kind_of):
        layout = prediction.layout.replace(remat="full")
        if follows_rules(layout):
            found.append(request.prediction(layout, request.memory(layout)))
    return found


def _seconds(prediction: Prediction) -> float:
    return prediction.time.expected


def _kind_of(layout: Layout) -> Any:
    return layout.mesh, layout.dispatch.expert_axes, layout.pipeline_repeats


def _best_by(predictions: list[Prediction], key: Any) -> list[Prediction]:
    """The fastest of each kind, fastest first."""
    best: dict[Any, Prediction] = {}
    for prediction in sorted(predictions, key=_seconds):
        best.setdefault(key(prediction.layout), prediction)
    return list(best.values())


def _why_none(request: Request, seen: _Seen) -> str:
    nearest = seen.nearest()
    cluster, limit, m = request.cluster, request.limit_bytes, request.model
    what = f"{request.batch_size:,} sequences of {request.seq_len:,} tokens"
    if nearest is None:
        return (
            f"no mesh of {cluster.num_devices} devices divides the model's {m.num_experts} experts and "
            f"{m.attention.num_kv_heads} key-value heads for {what}; "
            "try another batch_size"
        )
    layout, memory = nearest
    need = memory.peak_bytes
    fits = [
        *smallest_changes(request.model, layout, limit, request.mode),
        f"about {math.ceil(cluster.num_devices * need / limit)} devices",
    ]
    return (
        f"{what} do not fit on {cluster.name}: the smallest of {seen.evaluated:,} plans needs "
        f"{quantity(need, 'B')} per device, and a device has {quantity(limit, 'B')}; {most(memory)}; "
        f"they would fit with {' or with '.join(fits)}"
    )


# Constants of the cluster that a choice can hang on: name, how to scale it.
_SCALED = {
    "matmul_flops": ("matmul_flops",),
    "copy_bytes_per_s": ("copy_bytes_per_s",),
    "inside.bytes_per_s": ("inside", "bytes_per_s"),
    "across.bytes_per_s": ("across", "bytes_per_s"),
    "inside.latency_s": ("inside", "latency_s"),
    "launch_s": ("launch_s",),
}


def flips(request: Request, best: Prediction, other: Prediction, most: float = 8.0) -> tuple[Flip, ...]:
    """Which constant, changed by at most a factor of `most`, would make `other` the faster one; the nearest first."""
    found = []
    for name, path in _SCALED.items():
        value = operator.attrgetter(".".join(path))(request.cluster.device)
        for limit in (most, 1 / most):
            factor = _crossing(functools.partial(_lead, request, best, other, path), limit)
            if factor is not None:
                found.append(Flip(name, float(value), float(value) * factor, value.kind))
    return tuple(sorted(found, key=lambda flip: max(flip.factor, 1 / flip.factor)))


def _lead(request: Request, best: Prediction, other: Prediction, path: tuple[str, ...], factor: float) -> float:
    """Seconds that `best` is ahead once the constant is scaled."""
    cluster = dataclasses.replace(request.cluster, device=_scaled(request.cluster.device, path, factor))
    ours, theirs = (request.time(p.layout, cluster).expected for p in (best, other))
    return theirs - ours


def _scaled(target: Any, path: tuple[str, ...], factor: float) -> Any:
    name, *rest = path
    value = getattr(target, name)
    new = _scaled(value, tuple(rest), factor) if rest else Constant(value * factor, value.kind, value.source)
    return dataclasses.replace(target, **{name: new})


def _crossing(lead: Any, limit: float) -> float | None:
    """The factor between 1 and `limit` at which the lead is gone, to 1%; None if it is not."""
    if lead(limit) > 0:
        return None
    near, far = 1.0, limit
    while max(near / far, far / near) > 1.01:
        middle = (near * far) ** 0.5
        near, far = (middle, far) if lead(middle) > 0 else (near, middle)
    return far
