"""Peak memory of published training runs, by category, on the device that needs most.

    memory = training_memory(parse_run(row))
    sum(memory.values()) / 2**30

What is kept of a layer for its backward pass follows Korthikanti et al. (arXiv 2205.05198) with a fused attention,
counted for grouped queries, gates and experts. A first stage of a pipeline holds as many microbatches as there are
stages (1F1B), in the interleaved schedule a part of a stage more (arXiv 2104.04473).
"""

from __future__ import annotations

from moejax.planner.architecture import Attention, Experts, FeedForward, LatentAttention, Layer, StateSpace
from moejax.planner.layouts import Run

# What an allocator holds beside what is asked of it: peaks that frameworks report as allocated (Megatron) leave it out,
# torchtitan reports what is reserved.
RESERVED_FRACTION = 0.05


def training_memory(run: Run) -> dict[str, float]:
    """Bytes by category of the fullest device."""
    model = run.model
    always = stage_parameters(run)
    routed = model.expert_parameters / (run.ep * run.etp * run.pp)
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
    gathered = 2.0 * max((layer_parameters(layer, run) for _, layer in model), default=0.0) if run.sharded else 0.0
    if run.sharded:  # this layer's and the next's copies and gradients; both tables
        gathered = 4.0 * gathered + 2.0 * model.vocab_size * model.d_model * (1 + (not model.tie_embeddings)) / run.tp
    found = {
        "parameters": parameters,
        "gradients": gradients,
        "optimizer": optimizer,
        "gathered": gathered,
        "activations": activation_bytes(run),
        "logits": logit_bytes(run),
    }
    found["reserved"] = RESERVED_FRACTION * sum(found.values()) if run.system == "torch" else 0.0
    return found


def stage_parameters(run: Run) -> float:
    """Of the first stage, without experts: its layers and the input table."""
    model = run.model
    if run.pp == 1:
        return model.always_parameters / run.tp
    tables = model.embedding_parameters * (1 if model.tie_embeddings else 2)
    return ((model.always_parameters - tables) / run.pp + model.embedding_parameters) / run.tp


def layer_parameters(layer: Layer, run: Run) -> float:
    d = run.model.d_model
    return layer.always_parameters(d) / run.tp + layer.expert_parameters(d) / (run.ep * run.etp)


def activation_bytes(run: Run) -> float:
    """Kept between forward and backward: all layers of a stage, for the microbatches in flight, and the one at work."""
    tokens = run.mbs * run.seq / run.cp
    stored = sum(count * kept_bytes(layer, run) for count, layer in run.model) * tokens / run.pp
    in_flight = min(run.pp, run.microbatches)
    if run.vp > 1:
        in_flight = min(run.pp * (1 + (run.pp - 1) / (run.pp * run.vp)), run.microbatches)
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
    """Bytes that a token leaves in one layer without rematerialisation."""
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
    twice = 2 if mixer.qk_norm else 1  # what the norm takes and gives
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
    routed = 2.0 * k * (width + ffn.d_ff * (2 + ffn.gated) / run.etp)  # sent tokens, products' results, activation
    shared = 2.0 * ffn.shared_d_ff * (2 + ffn.gated)
    return ends + (routed + shared + 8.0 * ffn.num + 4.0 * ffn.latent) / run.tp


def logit_bytes(run: Run) -> float:
    """Of the last stage: bfloat16 logits, their float32 copy and its gradient; XLA and torch alike hold the three."""
    if run.pp > 1:  # the first stage, with more microbatches in flight, is fuller than the last
        return 0.0
    tokens = run.mbs * run.seq / run.cp
    sizes = 10.0 if run.system != "megatron" else 6.0  # Megatron's loss works in place
    return sizes * tokens * run.model.vocab_size / run.tp
