"""Published inference runs: time to first token and time per output token, of engines that batch continuously.

    times = predict_serving(parse_run({"layout": "vLLM TP4 isl1024 osl8192 conc4", ...}))
    times.first_token, times.per_token

The forward pass is a list of `Work`, as in training: of one prompt for the first token, of one token for each request
in flight for the others. Requests arrive as others leave, so a prompt meets the others' decoding, and other prompts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from experiments.published_runs.architecture import Attention, Experts, FeedForward, LatentAttention, Layer, StateSpace
from experiments.published_runs.runs import Run
from experiments.published_runs.training import spans
from moejax.checks import check
from moejax.planner.costs import Assumptions
from moejax.planner.hardware import Constant
from moejax.planner.time import predict_time
from moejax.planner.work import Collective, Matmul, MemoryOp, Phase, Work

# An engine's own time for a step (scheduling, sampling).
STEP_S = 1.0e-3
# By engine: its own time for a request (tokenizer, queue, the way back), and the part of the other requests that start
# together with one: benchmarks send as many at once as are to be in flight, and those of equal length keep step.
# Chosen on 1,200 of the 2,500 runs in aiconfigurator's silicon_sample.csv that have at most 64 requests.
REQUESTS = {"vllm": (25e-3, 0.2), "trtllm": (60e-3, 0.1), "sglang": (150e-3, 0.3)}
# A kernel's start inside a captured graph, against one from the host.
GRAPH_LAUNCH = 0.5


Linear = Callable[..., None]


@dataclasses.dataclass(frozen=True)
class ServingTime:
    """Seconds. `prefill` is one prompt's forward pass, `decode` one step of all requests in flight, both undisturbed;
    `first_token` and `per_token` hold what requests do to each other.
    """

    prefill: float
    decode: float
    first_token: float
    per_token: float


def forward_work(run: Run, requests: float, tokens: float, seen: float) -> Work:
    """The forward pass of `requests`, each with `tokens` new tokens that see `seen` on average, on one device."""
    work: Work = []
    rows, d, dtype = requests * tokens, run.model.d_model, run.dtype

    def linear(phase: Phase, m: float, n: float, k: float, times: float, groups: float = 1) -> None:
        work.append(Matmul(phase, "forward", m, n, k, groups, times, dtype))

    def reduce(phase: Phase, times: float) -> None:
        if run.tp > 1:
            work.append(Collective(phase, "forward", "all_reduce", ("tensor",), 2.0 * rows * d, run.tp, times))

    for count, layer in run.model:
        work.append(MemoryOp("attention", "forward", 16.0 * rows * d, 2 * count))
        _mix(work, run, layer, count, requests, tokens, seen, linear)
        if layer.mixer is not None:
            reduce("attention", count)
        if isinstance(layer.ffn, FeedForward):
            linear("expert", rows, layer.ffn.d_ff * (1 + layer.ffn.gated) / run.tp, d, count)
            linear("expert", rows, d, layer.ffn.d_ff / run.tp, count)
            work.append(MemoryOp("expert", "forward", 6.0 * rows * layer.ffn.d_ff / run.tp, count))
        elif layer.ffn is not None:
            _experts(work, run, layer.ffn, count, rows, linear)
        if layer.ffn is not None:
            reduce("expert", count)
    work.append(
        Matmul("logits", "forward", requests, run.model.vocab_size / run.tp, d, dtype="bfloat16")
    )  # only the last token's
    return work


def _mix(
    work: Work, run: Run, layer: Layer, count: int, requests: float, tokens: float, seen: float, linear: Linear
) -> None:
    mixer, rows, d = layer.mixer, requests * tokens, run.model.d_model
    if mixer is None:
        return
    *inputs, (inner, _) = mixer.projections(d)
    for d_in, d_out in inputs:
        linear("attention", rows, d_out / run.tp, d_in, count)
    linear("attention", rows, d, inner / run.tp, count)
    if isinstance(mixer, StateSpace):
        state = 4.0 * mixer.inner * mixer.state / run.tp  # float32, read and written once a request
        work.append(
            MemoryOp("attention", "forward", requests * 2 * state + 12.0 * rows * mixer.inner / run.tp, 2 * count)
        )
        return
    window = min(seen, mixer.window) if mixer.window else seen
    latent, score, value = False, mixer.score_dim, mixer.value_dim
    if isinstance(mixer, LatentAttention) and tokens == 1:  # absorbed: heads share one latent key
        latent, score, value = True, mixer.cache_dim, mixer.kv_rank
    shared = mixer.num_heads / mixer.num_kv_heads if isinstance(mixer, Attention) else 1.0
    if tokens == 1:  # the cache is what costs: heads of one group read the same keys
        heads = 1.0 if latent else max(1.0, mixer.num_kv_heads / run.tp)
        per = mixer.num_heads / run.tp if latent else shared
        work.append(Matmul("attention", "forward", per, window, score, requests * heads, count))
        work.append(Matmul("attention", "forward", per, value, window, 0 if latent else requests * heads, count))
    else:
        heads = mixer.num_heads / run.tp
        work.append(Matmul("attention", "forward", tokens, window, score, requests * heads, count))
        work.append(Matmul("attention", "forward", tokens, value, window, requests * heads, count))
    work.append(MemoryOp("attention", "forward", 8.0 * rows * (mixer.q_dim + mixer.kv_dim) / run.tp, count))


def _experts(work: Work, run: Run, ffn: Experts, count: int, rows: float, linear: Linear) -> None:
    """Only the experts that somebody chose are read."""
    d, width = run.model.d_model, ffn.width(run.model.d_model)
    split = max(1, run.tp // run.ep) if run.ep > 1 else run.tp
    chosen = ffn.num * (1 - (1 - ffn.per_token / ffn.num) ** rows)
    groups, each = chosen / run.ep, rows * ffn.per_token / chosen
    work.append(Matmul("route", "forward", rows, ffn.num, d, times=count))
    work.append(MemoryOp("route", "forward", 8.0 * rows * ffn.num, 3 * count))  # scores, choice, order
    for a, b in ((d, width), (width, d)) if ffn.latent else ():
        linear("expert", rows, b, a, count)
    linear("expert", each, ffn.d_ff * (1 + ffn.gated) / split, width, count, groups)
    linear("expert", each, width, ffn.d_ff / split, count, groups)
    if ffn.shared_d_ff:
        linear("expert", rows, ffn.shared_d_ff * (1 + ffn.gated) / run.tp, d, count)
        linear("expert", rows, d, ffn.shared_d_ff / run.tp, count)
    moved = 4.0 * rows * ffn.per_token / run.ep * (width + ffn.d_ff / split)
    work.append(MemoryOp("dispatch", "forward", moved, 2 * count))


def predict_serving(run: Run, assumptions: Assumptions = Assumptions()) -> ServingTime:
    """Times of a run with `run.concurrency` requests of `run.isl` tokens in and `run.osl` out.

    A prompt's forward pass holds up the others' decoding; over the life of a request each of the others starts once.
    A new prompt waits for half a decode step and for half of those that came with it. An engine that is not known is
    taken for vLLM.

    Raises:
      ConfigError: the prompt's length is not known.
    """
    check(run.isl > 0, "layout says no isl, the tokens of a prompt, and seq is empty")
    concurrency, out = max(1, run.concurrency), max(1, run.osl)
    request_s, together = REQUESTS[run.engine]
    where, device = spans(run), run.cluster.device
    launch = Constant(GRAPH_LAUNCH * device.launch_s, "assumed", "inside a graph")
    graphs = dataclasses.replace(run.cluster, device=dataclasses.replace(device, launch_s=launch))

    def seconds(work: Work) -> float:
        return predict_time(work, graphs, where, assumptions).expected + STEP_S

    prefill = seconds(forward_work(run, 1, run.isl, run.isl / 2))
    decode = seconds(forward_work(run, concurrency, 1, run.isl + out / 2))
    return ServingTime(
        prefill,
        decode,
        first_token=request_s + prefill * (1 + together * (concurrency - 1) / 2) + decode / 2,
        per_token=decode + (concurrency - 1) * prefill / out,
    )
