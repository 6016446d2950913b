"""Other systems' training steps as `Work`: Megatron (1F1B, ZeRO-1, folded experts), FSDP in torch, MaxText.

    run = parse_run(row)
    time = predict_training(run)

What a framework does that the layout text does not say is one of the few constants below, each with its reason. One
device of the busiest pipeline stage is described; `StepFacts.bubble` adds what it waits.
"""

from __future__ import annotations

import dataclasses

from experiments.published_runs.architecture import (
    Architecture,
    Attention,
    Experts,
    FeedForward,
    LatentAttention,
    Layer,
    StateSpace,
    attended,
)
from experiments.published_runs.runs import Run
from moejax.planner.costs import Assumptions
from moejax.planner.time import AxisSpans, StepFacts, StepTime, predict_time
from moejax.planner.work import Collective, Kind, Matmul, MemoryOp, Pass, Phase, Work

_EXCHANGES: tuple[Phase, ...] = ("dispatch", "combine")

# Bytes of one Adam update a parameter: gradient read; master, two moments read and written; the compute copy written.
OPTIMIZER_BYTES = 4 + 3 * 4 + 3 * 4 + 2
# Natural routing: tokens of the busiest expert over the mean, less 1 (MaxVio), with an auxiliary loss and with a
# selection bias (arXiv 2408.15664, table 2: 64 experts, 6 a token). In proportion to the spread of a choice by chance,
# sqrt((1 - p) / p) where a token visits the part p of all experts; a device's experts even out by a square root.
AUXILIARY_VIOLATION, BIAS_VIOLATION, VIOLATION_SPREAD = 0.6, 0.04, (58 / 6) ** 0.5
# Elementwise passes of eager torch against fused ones (torch.compile, Transformer Engine, XLA).
EAGER_PASSES = 2.0

# Tensor collectives that run behind the products they feed, where the framework cuts both up (user buffers of
# Transformer Engine, AsyncTP of torch, collective matmul of XLA).
TENSOR_HIDDEN = 0.6
# torch's scaled_dot_product_attention is FlashAttention-2, which reaches 35% on H100 where FlashAttention-3 has 75%
# (arXiv 2407.08608, abstract).
SDPA, HOPPER = 35 / 75, ("h100", "h100_96gb", "h200")
# What eager PyTorch starts in a layer forward and backward, twice that in an expert layer, and for each expert: two
# products three times, and with float8 their casts and transposes. A launch through Python and Transformer Engine takes
# the host about 10 µs. Dropless layers ask the device how many tokens came: half of the host's time is then exposed.
LAYER_LAUNCHES = 150
EXPERT_LAUNCHES = 6
HOST_LAUNCH_S = 10e-6
HOST_WAITS = 0.5


def distinct(devices: float, choices: int) -> float:
    """How many of `devices` a token visits whose `choices` experts are spread evenly over them, on average."""
    return devices * (1 - (1 - 1 / devices) ** choices) if devices > 1 else 1.0


@dataclasses.dataclass
class _Builder:
    """Collects the work of one device; `tokens` are those of one microbatch on it, before the tensor axis."""

    run: Run

    def __post_init__(self) -> None:
        self.work: Work = []
        self.tokens = self.run.mbs * self.run.seq / self.run.cp
        self.spread = self.tokens / self.run.tp if self.run.sequence_parallel else self.tokens
        self.passes = self.run.microbatches / self.run.pp  # layers are counted over all stages
        self.eager = 1.0 if self.run.compiled else EAGER_PASSES

    def linear(
        self, phase: Phase, rows: float, d_in: float, d_out: float, times: float, *,
        again: float = 0.0, groups: float = 1, dtype: str = "",
    ) -> None:  # fmt: skip
        """A weight's three products, and `again` of its forward one once more."""
        dtype = dtype or self.run.dtype
        products: tuple[tuple[Pass, float, float, float, float], ...] = (
            ("forward", rows, d_out, d_in, times),
            ("recompute", rows, d_out, d_in, times * again),
            ("backward", rows, d_in, d_out, times),
            ("backward", d_in, d_out, rows, times),
        )
        self.work += [Matmul(phase, pass_, m, n, k, groups, t, dtype) for pass_, m, n, k, t in products if t]
        if dtype != "bfloat16":  # casts of what goes in and of its gradient, and their transposes
            self.memory_op(phase, 4.0 * rows * groups * (d_in + d_out), times, backward=0.0)

    def memory_op(self, phase: Phase, moved: float, times: float, *, backward: float = 2.0, again: float = 0.0) -> None:
        """A pass over memory, its backward pass `backward` times as large."""
        passes: tuple[tuple[Pass, float], ...] = (("forward", 1.0), ("backward", backward), ("recompute", again))
        self.work += [MemoryOp(phase, pass_, moved * size * self.eager, times) for pass_, size in passes if size]

    def collective(
        self, phase: Phase, pass_: Pass, kind: Kind, axis: str, size: float, devices: int, times: float
    ) -> None:
        if devices > 1 and size and times:
            self.work.append(Collective(phase, pass_, kind, (axis,), size, devices, times))

    def recomputed(self, what: str) -> float:
        """How much of the forward products of "attention", "scores", "ffn" or "experts" is done twice."""
        policy = self.run.recompute
        if policy == "full":
            return 1.0
        if policy == "half":  # torchtitan's selective: every second product is saved, and attention's result
            return 0.0 if what == "scores" else 0.5
        if policy == "custom":  # MaxText's: projections of attention are kept (on the host), the feed-forward is not
            return {"attention": 0.0, "scores": 1.0, "ffn": 2 / 3, "experts": 2 / 3}[what]
        return 1.0 if policy == "selective" and what == "experts" else 0.0  # Megatron's, of an MoE model

    def layer(self, layer: Layer, times: float) -> None:
        d, ends = self.run.model.d_model, (layer.mixer is not None) + (layer.ffn is not None)
        again = 1.0 if self.run.recompute in ("full", "half", "custom", "minimal") else 0.0
        self.memory_op("attention", 10.0 * d * self.spread * ends, times, again=again)  # norms and residual sums
        if isinstance(layer.mixer, StateSpace):
            self.state_space(layer.mixer, times)
        elif layer.mixer is not None:
            self.attention(layer.mixer, times)
        if isinstance(layer.ffn, FeedForward):
            self.dense(layer.ffn, times)
        elif layer.ffn is not None:
            self.experts(layer.ffn, times)

    def tensor_collectives(self, phase: Phase, times: float) -> None:
        """Of one block: with sequence parallelism a gather and a scatter each way and the input once more."""
        run, size = self.run, 2.0 * self.tokens * self.run.model.d_model
        again = 1 + (run.recompute == "full")
        if run.sequence_parallel:
            self.collective(phase, "forward", "all_gather", "tensor", size / run.tp, run.tp, times * (again + 2))
            self.collective(phase, "forward", "reduce_scatter", "tensor", size, run.tp, times * (again + 1))
        else:
            self.collective(phase, "forward", "all_reduce", "tensor", size, run.tp, times * (again + 1))

    def attention(self, mixer: Attention | LatentAttention, times: float) -> None:
        run, d, again = self.run, self.run.model.d_model, self.recomputed("attention")
        tp = run.tp
        *inputs, output = mixer.projections(d)
        for d_in, d_out in inputs:
            whole = isinstance(mixer, LatentAttention) and d_out < d  # down-projections are not split
            self.linear("attention", self.tokens, d_in, d_out / (1 if whole else tp), times, again=again)
        self.linear("attention", self.tokens, output[0] / tp, output[1], times, again=again)
        seen, groups = attended(mixer, run.seq), run.mbs * mixer.num_heads / tp
        rows, core = run.seq / run.cp, times * (1 + self.recomputed("scores"))
        products: tuple[tuple[Pass, float, float, float], ...] = (
            ("forward", seen, mixer.score_dim, core),
            ("forward", mixer.value_dim, seen, core),
            ("backward", seen, mixer.score_dim, 3 * times),  # scores again, their gradient into queries and keys
            ("backward", mixer.value_dim, seen, 2 * times),
        )
        for pass_, n, k, repeats in products:
            self.work.append(Matmul("attention", pass_, rows, n, k, groups, repeats))
        rope = 4.0 * self.tokens * (mixer.q_dim + mixer.kv_dim) / tp
        normed = isinstance(mixer, LatentAttention) or mixer.qk_norm != "none"
        self.memory_op("attention", rope * (1 + normed), times, again=again, backward=1.5)
        if run.cp > 1:
            size = 2.0 * self.tokens * mixer.cache_dim / tp
            self.collective("attention", "forward", "all_gather", "context", size, run.cp, 2 * times)
        self.tensor_collectives("attention", times)

    def state_space(self, mixer: StateSpace, times: float) -> None:
        """Projections, and Mamba-2's chunked products (arXiv 2405.21060, section 6)."""
        d, again, tp = self.run.model.d_model, self.recomputed("attention"), self.run.tp
        (_, wide), (inner, _) = mixer.projections(d)
        self.linear("attention", self.tokens, d, wide / tp, times, again=again)
        self.linear("attention", self.tokens, inner / tp, d, times, again=again)
        chunks, heads, q = self.tokens / mixer.chunk, mixer.num_heads / tp, mixer.chunk
        passes: tuple[tuple[Pass, float], ...] = (("forward", times * (1 + again)), ("backward", 2 * times))
        for pass_, repeats in passes:
            for n, k, count in ((mixer.head_dim, q, 1), (mixer.head_dim, mixer.state, 2)):
                self.work.append(Matmul("attention", pass_, q, n, k, chunks * heads, repeats * count))
        self.memory_op("attention", 2.0 * self.tokens * (3 * wide + 4 * inner) / tp, times, again=again)
        self.tensor_collectives("attention", times)

    def dense(self, ffn: FeedForward, times: float) -> None:
        d, tp, again = self.run.model.d_model, self.run.tp, self.recomputed("ffn")
        self.linear("expert", self.tokens, d, ffn.d_ff * (1 + ffn.gated) / tp, times, again=again)
        self.linear("expert", self.tokens, ffn.d_ff / tp, d, times, again=again)
        self.memory_op("expert", (4.0 + 2 * ffn.gated) * ffn.d_ff * self.tokens / tp, times, again=again)
        self.tensor_collectives("expert", times)

    def experts(self, ffn: Experts, times: float) -> None:
        run, d, again = self.run, self.run.model.d_model, self.recomputed("experts")
        tokens = self.tokens / run.tp  # the tensor axis holds other tokens, or the same work split
        width, local = ffn.width(d), max(1.0, ffn.num / run.ep)
        self.linear("route", tokens, d, ffn.num, times, again=again, dtype="bfloat16")
        self.memory_op("route", 16.0 * tokens * ffn.num, times, again=again)
        if ffn.latent:
            self.linear("expert", tokens, d, width, times, again=again)
            self.linear("expert", tokens, width, d, times, again=again)
        if ffn.shared_d_ff:
            self.linear("expert", tokens, d, ffn.shared_d_ff * (1 + ffn.gated), times, again=again)
            self.linear("expert", tokens, ffn.shared_d_ff, d, times, again=again)
        rows = tokens * ffn.per_token * (run.capacity if run.capacity and run.dense_dispatch else 1.0)
        if run.etp > 1:  # the tokens of all who share an expert's width come together, and the results are summed
            size = 2.0 * width * rows
            self.collective("expert", "forward", "all_gather", "tensor", size, run.etp, times * (2 + again))
            self.collective(
                "expert", "forward", "reduce_scatter", "tensor", size * run.etp, run.etp, times * (2 + again)
            )
        rows *= run.etp
        self.linear(
            "expert", rows / local, width, ffn.d_ff * (1 + ffn.gated) / run.etp, times, again=again, groups=local
        )
        self.linear("expert", rows / local, ffn.d_ff / run.etp, width, times, again=again, groups=local)
        self.memory_op("expert", (4.0 + 2 * ffn.gated) * ffn.d_ff * rows / run.etp, times, again=again)
        if ffn.bias:  # added to what grouped products return, read and written
            self.memory_op(
                "expert", 4.0 * rows * (ffn.d_ff * (1 + ffn.gated) + width), times, backward=0.5, again=again
            )
        self.move_tokens(ffn, tokens, rows / run.etp, times, again)

    def move_tokens(self, ffn: Experts, tokens: float, rows: float, times: float, again: float) -> None:
        """Dispatch and combine: by one-hot products, or sorted into buffers and exchanged."""
        run, width = self.run, ffn.width(self.run.model.d_model)
        if run.dense_dispatch:  # [slots, tokens] × [tokens, width] a sequence, and back; slots for every expert
            slots = run.seq * ffn.per_token * (run.capacity or 1.0)
            passes: tuple[tuple[Pass, float], ...] = (("forward", times * (1 + again)), ("backward", times))
            for phase in _EXCHANGES:
                for pass_, repeats in passes:
                    self.work.append(Matmul(phase, pass_, slots, width, run.seq, run.mbs, repeats))
            self.memory_op("dispatch", 4.0 * tokens * slots, times, again=again)
            return
        copies = 1 if run.deduplicated or run.ep == 1 else 2  # sorted by device before, by expert after
        for phase in _EXCHANGES:
            self.memory_op(phase, 2.0 * width * (tokens + (2 * copies - 1) * rows), times, backward=1.0, again=again)
        inside, hosts = _span(run, run.ep, run.etp)
        wire = 1.0 if run.dtype != "bfloat16" and run.deduplicated else 2.0
        repeats = times * (2 + again)
        for phase in _EXCHANGES:
            size = wire * width if phase == "dispatch" else 2.0 * width
            if not run.deduplicated or hosts == 1:
                sent = distinct(run.ep, ffn.per_token) * tokens if run.deduplicated else rows
                self.collective(phase, "forward", "all_to_all", "expert", size * sent, run.ep, repeats)
                continue
            # Once to every host that wants it, then inside the host to every device that does.
            across = distinct(hosts, ffn.per_token) * tokens
            self.collective(phase, "forward", "all_to_all", "expert_hosts", size * across, hosts, repeats)
            spread = distinct(run.ep, ffn.per_token) * tokens
            self.collective(phase, "forward", "all_to_all", "expert_inside", size * spread, inside, repeats)

    def logits(self, times: float) -> None:
        run = self.run
        vocab = run.model.vocab_size / run.tp
        self.linear("logits", self.tokens, run.model.d_model, vocab, times, dtype="bfloat16")
        self.memory_op("loss", 12.0 * self.tokens * vocab, times, backward=0.5)
        self.memory_op("embed", 4.0 * self.tokens * run.model.d_model, times)

    def parameters(self) -> None:
        """Gathers of parameters, sums of gradients, and the update."""
        run, model = self.run, self.run.model
        always = model.always_parameters / (run.tp * run.pp)
        routed = model.expert_parameters / (run.ep * run.etp * run.pp)
        gradient = 2.0 if run.small_gradients or run.system != "megatron" else 4.0
        for size, axis, devices in (
            (always, "data", run.shards),
            (routed, "expert_data", max(1, run.devices // (run.pp * run.ep * run.etp))),
        ):
            if run.sharded:  # forward and backward each gather; every microbatch
                gathers, sums = 2 * run.microbatches, run.microbatches
            else:
                gathers = sums = 1
            self.collective("gather", "forward", "all_gather", axis, 2.0 * size / devices, devices, gathers)
            self.collective("gather", "backward", "reduce_scatter", axis, gradient * size, devices, sums)
            self.work.append(MemoryOp("optimizer", "update", OPTIMIZER_BYTES * size / devices))
            self.work.append(MemoryOp("optimizer", "update", 2 * gradient * size))  # zeroed, and its norm taken


def _span(run: Run, size: int, stride: int) -> tuple[int, int]:
    """(devices inside a host, hosts) of `size` devices that stand `stride` apart."""
    per_host = run.cluster.devices_per_host
    inside = max(1, min(size, per_host // stride))
    return inside, max(1, -(-size // inside))


def spans(run: Run) -> AxisSpans:
    """As Megatron orders ranks: tensor, context, data (experts fold over tensor and data), pipeline outermost."""
    axes = {
        "tensor": (run.tp, _span(run, run.tp, 1)[1]),
        "context": (run.cp, _span(run, run.cp, run.tp)[1]),
        "data": (run.shards, _span(run, run.shards, run.tp)[1]),
        "expert": (run.ep, _span(run, run.ep, run.etp)[1]),
        "expert_hosts": (_span(run, run.ep, run.etp)[1],) * 2,
        "expert_inside": (_span(run, run.ep, run.etp)[0], 1),
        "pipeline": (run.pp, run.pp if run.devices // run.pp >= run.cluster.devices_per_host else 1),
    }
    replicas = max(1, run.devices // (run.pp * run.ep * run.etp))
    axes["expert_data"] = (replicas, _span(run, replicas, run.ep * run.etp)[1])
    return AxisSpans(axes)


def predicting_block(model: Architecture) -> Layer | None:
    """The block that predicts tokens beyond the next: attention and what follows it in the model's last layers."""
    if not model.predicted:
        return None
    mixers = [layer.mixer for _, layer in model if layer.mixer is not None and not isinstance(layer.mixer, StateSpace)]
    return Layer(mixers[-1], [layer.ffn for _, layer in model if layer.ffn is not None][-1])


def training_work(run: Run) -> Work:
    """What one device of the busiest stage does in a step."""
    builder = _Builder(run)
    for count, layer in run.model:
        builder.layer(layer, builder.passes * count)
    more = run.model.predicted if run.system == "megatron" and run.predicts_more else 0
    block = predicting_block(run.model)
    if block:
        for _ in range(more):  # with logits of its own, on the last stage; layouts even it out
            d = run.model.d_model
            builder.linear("attention", builder.tokens, 2 * d, d / run.tp, builder.passes)
            builder.layer(block, builder.passes)
    # The last stage has the logits beside its layers, unless the layers do not divide: then others took theirs.
    even = run.model.num_layers % (run.pp * run.vp) != 0
    share = run.microbatches / (run.pp if even else 1)
    builder.logits(share + more * builder.passes)
    if run.pp > 1:
        size = 2.0 * builder.spread * run.model.d_model
        builder.collective("pipeline", "forward", "ppermute", "pipeline", size, run.pp, 2 * run.microbatches * run.vp)
    builder.parameters()
    return builder.work


def training_step(run: Run) -> StepFacts:
    model_flops = 3.0 * run.gbs * run.seq * run.model.flops_per_token(run.seq)
    waits = run.pp - 1
    routed = [layer.ffn for _, layer in run.model if isinstance(layer.ffn, Experts)]
    load = 1.0
    if routed and run.ep > 1 and not run.balanced and not run.capacity:
        ffn = routed[0]
        violation = BIAS_VIOLATION if ffn.router_bias and not ffn.bias else AUXILIARY_VIOLATION
        spread = ((ffn.num - ffn.per_token) / ffn.per_token) ** 0.5 / VIOLATION_SPREAD
        load += violation * spread / max(1.0, ffn.num / run.ep) ** 0.5
    return StepFacts(
        tokens=run.gbs * run.seq,
        model_flops=model_flops,
        bubble=waits / (run.vp * run.microbatches + waits),
        bubble_counted=False,
        parts=8 if run.overlapped else 1,
        load=load,
        host_s=host_seconds(run),
        host_waits=HOST_WAITS if routed else 0.0,
    )


def host_seconds(run: Run) -> float:
    """Seconds that Python takes to start a step's operations, where no compiler or graph has made them one."""
    if run.system == "jax":
        return 0.0
    float8 = 1 if run.dtype == "bfloat16" else 3
    launches = 0.0
    for count, layer in run.model:
        launches += count * LAYER_LAUNCHES * ((layer.mixer is not None) + (layer.ffn is not None)) / 2
        if isinstance(layer.ffn, Experts):
            launches += count * (LAYER_LAUNCHES + EXPERT_LAUNCHES * float8 * max(1.0, layer.ffn.num / run.ep))
    return HOST_LAUNCH_S * (1 - run.captured) * launches * run.microbatches / run.pp


def predict_training(run: Run, assumptions: Assumptions = Assumptions()) -> StepTime:
    """The time of one optimizer step of `run`."""
    changes = {"tensor_hidden": TENSOR_HIDDEN} if run.tensor_overlap else {}
    if run.system == "torch" and run.cluster.device.name in HOPPER:
        changes["attention"] = SDPA
    assumptions = dataclasses.replace(assumptions, **changes)
    return predict_time(training_work(run), run.cluster, spans(run), assumptions, step=training_step(run))
