"""Peak memory of published training runs, by category, on the device whose figure is reported.

    memory = training_memory(parse_run(row))
    sum(memory.values()) / 2**30

What is kept of a layer for its backward pass follows Korthikanti et al. (arXiv 2205.05198) with a fused attention,
counted for grouped queries, gates and experts. A first stage of a pipeline holds as many microbatches as there are
stages (1F1B), a last one a single microbatch and the logits. Megatron logs what its last rank has allocated, so that
its runs are the last stage's; of other systems' runs the fuller stage counts.
"""

from __future__ import annotations

from experiments.published_runs.architecture import Attention, Experts, FeedForward, LatentAttention, Layer, StateSpace
from experiments.published_runs.runs import Run
from experiments.published_runs.training import predicting_block

# What an allocator holds beside what is asked of it: peaks that frameworks report as allocated (Megatron) leave it out,
# torchtitan reports what is reserved.
RESERVED_FRACTION = 0.05


def training_memory(run: Run) -> dict[str, float]:
    """Bytes by category of the device whose peak is reported."""
    stages = [stage_memory(run, last=True)]
    if run.pp > 1 and run.system != "megatron":
        stages.append(stage_memory(run, last=False))
    return max(stages, key=lambda found: sum(found.values()))


def stage_memory(run: Run, *, last: bool) -> dict[str, float]:
    """Bytes by category of a device in the first or the last stage (the same one without a pipeline)."""
    model, tokens = run.model, run.mbs * run.seq / run.cp
    always, routed = stage_parameters(run, last)
    copies = run.shards, max(1, run.devices // (run.pp * run.ep * run.etp))
    parameters = gradients = optimizer = 0.0
    for size, shards in zip((always, routed), copies, strict=True):
        if run.sharded:  # float32 masters, gradients and moments, all in shards
            parameters += 4.0 * size / shards
            gradients += 4.0 * size / shards
            optimizer += 8.0 * size / shards
        else:  # compute copies and gradients whole, masters and moments in shards
            parameters += 2.0 * size
            gradients += (2.0 if run.small_gradients else 4.0) * size
            optimizer += 12.0 * size / shards
    gathered = 0.0
    if run.sharded:  # this layer's and the next's copies and gradients; both tables
        tables = 2.0 * model.vocab_size * model.d_model * (1 + (not model.tie_embeddings)) / run.tp
        gathered = 8.0 * max((layer_parameters(layer, run) for _, layer in model), default=0.0) + tables
    more = extra_block(run)
    repeats = model.predicted if last and more else 0
    found = {
        "parameters": parameters,
        "gradients": gradients,
        "optimizer": optimizer,
        "gathered": gathered,
        "activations": activation_bytes(run, last) + (repeats * kept_bytes(more, run) * tokens if more else 0.0),
        "logits": logit_bytes(run, repeats) if last else 0.0,
    }
    found["reserved"] = RESERVED_FRACTION * sum(found.values()) if run.system == "torch" else 0.0
    return found


def extra_block(run: Run) -> Layer | None:
    """The layer that predicts tokens beyond the next, where Megatron trains one."""
    return predicting_block(run.model) if run.system == "megatron" and run.predicts_more else None


def stage_parameters(run: Run, last: bool) -> tuple[float, float]:
    """Parameters of a device, (without routed experts, of routed experts): a stage's layers and the tables it holds."""
    model = run.model
    tables = model.embedding_parameters * (1 if model.tie_embeddings else 2)
    held = tables if run.pp == 1 else model.embedding_parameters
    always = ((model.always_parameters - tables) / run.pp + held) / run.tp
    routed = model.expert_parameters / (run.ep * run.etp * run.pp)
    more = extra_block(run)
    if more and last:
        always += (more.always_parameters(model.d_model) + 2 * model.d_model**2) / run.tp
        routed += more.expert_parameters(model.d_model) / (run.ep * run.etp)
    return always, routed


def layer_parameters(layer: Layer, run: Run) -> float:
    d = run.model.d_model
    return layer.always_parameters(d) / run.tp + layer.expert_parameters(d) / (run.ep * run.etp)


def activation_bytes(run: Run, last: bool) -> float:
    """Kept between forward and backward: all layers of a stage, for the microbatches in flight, and the one at work."""
    tokens = run.mbs * run.seq / run.cp
    stored = sum(count * kept_bytes(layer, run) for count, layer in run.model) * tokens / run.pp
    # Of a stage's v chunks, the first stage has (v + 1) p - 1 in flight when it turns back, the last (v - 1) p + 1.
    chunks = (run.vp - 1) * run.pp + (1 if last else 2 * run.pp - 1 if run.vp > 1 else run.pp)
    in_flight = min(chunks / run.vp, run.microbatches)
    working = 0.0
    if run.recompute != "none":  # the layer that is being computed again, and the gradients of what was thrown away
        thrown = 1.0 if run.recompute == "half" else 2.0
        working = thrown * max(full_bytes(layer, run) for _, layer in run.model) * tokens
    if run.offload:
        stored = 0.0
    return stored * in_flight + working


def kept_bytes(layer: Layer, run: Run) -> float:
    """Bytes that a token of a microbatch leaves in one layer, under the run's policy."""
    d = run.model.d_model
    whole = full_bytes(layer, run)
    entry = 2.0 * d * ((layer.mixer is not None) + (layer.ffn is not None)) / 2 / _split(run)
    if run.recompute in ("full", "custom"):
        return entry
    if run.recompute == "half":  # every second product's result and attention's
        return entry + 0.5 * whole
    if run.recompute == "minimal":  # products' results, nothing elementwise
        return 0.7 * whole
    if run.recompute == "selective" and isinstance(layer.ffn, Experts):
        return mixer_bytes(layer, run) + 2.0 * d / _split(run)
    return whole


def _split(run: Run) -> int:
    return run.tp if run.sequence_parallel else 1


def full_bytes(layer: Layer, run: Run) -> float:
    """Bytes that a token leaves in one layer without rematerialization."""
    return mixer_bytes(layer, run) + ffn_bytes(layer, run)


def mixer_bytes(layer: Layer, run: Run) -> float:
    """The residual, its norm, and what the mixer's products and kernel take and give, all bfloat16.

    Megatron-LM's models of the GPT kind (LayerNorm, no gate) train with dropout, whose mask is a byte an element.
    """
    mixer, d = layer.mixer, run.model.d_model
    if mixer is None:
        return 0.0
    mask = d if run.model.layer_norm and run.system == "megatron" else 0
    ends = (4.0 * d + mask) / _split(run)
    if isinstance(mixer, StateSpace):
        (_, wide), (inner, _) = mixer.projections(d)
        return ends + 2.0 * (2 * wide + 2 * inner) / run.tp
    if isinstance(mixer, LatentAttention):
        latents = 4.0 * (mixer.q_rank + mixer.kv_rank)
        inner = mixer.q_dim + mixer.num_heads * (mixer.score_dim + 2 * mixer.value_dim)
        return ends + latents + 2.0 * inner / run.tp
    assert isinstance(mixer, Attention)
    twice = 2 if mixer.qk_norm != "none" else 1  # what the norm takes and gives
    return ends + 2.0 * (twice * (mixer.q_dim + mixer.kv_dim) + mixer.kv_dim + mixer.q_dim) / run.tp


def ffn_bytes(layer: Layer, run: Run) -> float:
    ffn, d = layer.ffn, run.model.d_model
    if ffn is None:
        return 0.0
    mask = d if run.model.layer_norm and run.system == "megatron" else 0
    ends = (4.0 * d + mask) / _split(run)
    if isinstance(ffn, FeedForward):
        return ends + 2.0 * ffn.d_ff * (2 + ffn.gated) / run.tp
    width, k = ffn.width(d), ffn.per_token * (1.0 if run.balanced or run.ep == 1 else 1.1)
    # Sent tokens, products' results, activation; with split experts, the tokens of all who share them.
    routed = 2.0 * k * (width * run.etp + ffn.d_ff * (2 + ffn.gated))
    shared = 2.0 * ffn.shared_d_ff * (2 + ffn.gated)
    return ends + (routed + shared + 8.0 * ffn.num + 4.0 * ffn.latent) / run.tp


def logit_bytes(run: Run, others: int) -> float:
    """bfloat16 logits, their float32 copy and its gradient: XLA and torch hold the three, Megatron works in place.

    Of `others`, logits of further tokens, the gradient alone is left by then.
    """
    tokens = run.mbs * run.seq / run.cp
    sizes = 10.0 if run.system != "megatron" else 6.0
    return (sizes + 2.0 * others) * tokens * run.model.vocab_size / run.tp
