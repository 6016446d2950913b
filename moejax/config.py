"""Configuration: frozen dataclasses, checked when they are made. The comment beside a field is its meaning in --help.

A wrong value raises `ConfigError`, with one line that names the field, its value and what would be right. A variant
of a configuration is a function that calls `dataclasses.replace`. What depends on the mesh as well (divisibility of
experts, heads, layers, vocabulary, batch) is checked by `moejax.layout.Layout.check`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import TYPE_CHECKING, Any, Literal

from moejax.checks import ConfigError, check, check_not_negative, check_positive, check_types

Dtype = Literal["float32", "bfloat16", "float16"]
RouterScore = Literal["softmax", "sigmoid"]
QkNorm = Literal["none", "head", "projection"]
AttentionKind = Literal["grouped", "latent"]
RopeScaling = Literal["none", "linear", "llama3", "yarn", "longrope"]
Strategy = Literal["capacity", "dropless", "ragged"]
WireDtype = Literal["compute", "float8"]
ExpertAxis = Literal["expert", "tensor"]

MAX_CAPACITY_FACTOR = 1e6
VOCAB_UNIT, VOCAB_PADDING = 16, 128  # a vocabulary that is no multiple of the first is padded to one of the second
_MOVED = {  # names of version 0.1
    "ParallelConfig": "is moejax.layout.Layout now, which also has the mesh, the batch's shape and the dispatch",
    "TrainConfig": "is in moejax.train.config now",
}
MOVED_FIELDS = {  # of ModelConfig, in version 0.1: where they are now
    "num_heads": "attention.num_heads",
    "num_kv_heads": "attention.num_kv_heads",
    "head_dim": "attention.head_dim",
    "router_score": "router.score",
    "router_renormalize": "router.renormalize",
    "router_bias": "router.bias",
    "rope_theta": "rope.theta",
}


if not TYPE_CHECKING:  # or every name would exist for a type checker

    def __getattr__(name: str) -> Any:
        """Raises `ConfigError` for what was here in version 0.1, so that old configuration files learn its new home."""
        if name in _MOVED:
            raise ConfigError(f"moejax.config.{name} {_MOVED[name]}")
        raise AttributeError(f"module 'moejax.config' has no attribute {name!r}")


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention (MLA, DeepSeek-V2, arXiv 2405.04434), off with a `kv_rank` of 0.

    Keys and values of all heads are made from one latent vector of a token, and queries from another if there is a
    `q_rank`. RoPE rotates only the last `rope_head_dim` dims of a head; all heads have these dims of keys in common,
    made from the token itself. A cache then holds `kv_rank` + `rope_head_dim` numbers per token for all heads together.
    """

    kv_rank: int = 0  # width of the latent of keys and values; 0: no latent attention
    q_rank: int = 0  # width of the latent of queries; 0: none, they are made from the token
    rope_head_dim: int = 0  # dims of a head's queries and keys that RoPE rotates, even; keys of all heads share them
    value_head_dim: int = 0  # width of a head's values; at most attention.head_dim

    def __post_init__(self) -> None:
        check_types(self)
        check_not_negative(self, "kv_rank", "q_rank", "rope_head_dim", "value_head_dim")
        for name in ("rope_head_dim", "value_head_dim"):
            check(
                (getattr(self, name) > 0) == (self.kv_rank > 0),
                f"{name}={getattr(self, name)} must be positive exactly when kv_rank={self.kv_rank} is",
            )
        check(self.kv_rank > 0 or not self.q_rank, f"q_rank={self.q_rank} must be 0 with kv_rank=0")
        check(self.rope_head_dim % 2 == 0, f"rope_head_dim={self.rope_head_dim} must be even: RoPE rotates pairs")


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Causal attention in which groups of query heads share a head of keys and values (arXiv 2305.13245).

    `qk_norm` is an RMSNorm of queries and one of keys, before positions come in: "head" normalizes each head by itself,
    all with the same scales (Qwen3, arXiv 2505.09388), "projection" all heads as one vector (OLMoE, 2409.02060).

    With `latent`, each head has keys and values of its own, made from a latent vector; there is no `qk_norm` and no
    `bias` then.
    """

    num_heads: int = 4  # attention heads, of queries
    num_kv_heads: int = 2  # attention heads of keys and values; divides num_heads
    head_dim: int = 32  # width of a head; even
    qk_norm: QkNorm = "none"  # norms of queries and keys: of each head, or of all heads as one vector
    bias: bool = False  # add a bias to queries, keys and values
    output_bias: bool = False  # add a bias to the output projection
    multiplier: float = 0.0  # of the scores before the softmax; 0: head_dim**-0.5
    latent: LatentConfig = LatentConfig()  # the latent vectors of multi-head latent attention

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(self, "num_heads", "num_kv_heads", "head_dim")
        check_not_negative(self, "multiplier")
        check(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}",
        )
        check(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even: RoPE rotates pairs")
        if self.kind == "latent":
            self._check_latent()

    def _check_latent(self) -> None:
        latent = self.latent
        with_latent = f"with latent.kv_rank={latent.kv_rank}"
        check(
            self.num_kv_heads == self.num_heads,
            f"num_kv_heads={self.num_kv_heads} must be num_heads={self.num_heads} {with_latent}: each head has keys of "
            "its own",
        )
        check(self.qk_norm == "none", f"qk_norm={self.qk_norm!r} must be 'none' {with_latent}, which has its own norms")
        check(not self.bias, f"bias=True must be False {with_latent}")
        check(
            latent.rope_head_dim < self.head_dim,
            f"latent.rope_head_dim={latent.rope_head_dim} must be less than head_dim={self.head_dim}: it is a part of "
            "a head",
        )
        check(
            latent.value_head_dim <= self.head_dim,
            f"latent.value_head_dim={latent.value_head_dim} must be at most head_dim={self.head_dim}",
        )

    @property
    def kind(self) -> AttentionKind:
        return "latent" if self.latent.kv_rank else "grouped"

    @property
    def heads_dim(self) -> int:
        """Elements of a token's queries, keys, values and results, all heads together, as the kernel has them."""
        return 2 * (self.num_heads + self.num_kv_heads) * self.head_dim

    @property
    def value_dim(self) -> int:
        """Width of a head's values and results."""
        return self.latent.value_head_dim or self.head_dim

    def cache_dim(self, tensor: int = 1) -> int:
        """Returns elements that a token leaves in one device's KV cache, with heads split over `tensor` devices."""
        if self.kind == "latent":
            return self.latent.kv_rank + self.latent.rope_head_dim
        return 2 * (self.num_kv_heads // tensor) * self.head_dim

    def projections(self, d_model: int, tensor: int = 1) -> list[tuple[int, int]]:
        """Returns (inputs, outputs) of the matrices that a token passes on one device, the output projection last.

        Heads are split over `tensor` devices; what makes the latents is not.
        """
        heads, kv_heads, latent = self.num_heads // tensor, self.num_kv_heads // tensor, self.latent
        if self.kind == "grouped":
            inward = [(d_model, heads * self.head_dim), (d_model, 2 * kv_heads * self.head_dim)]
        else:
            ranks = [d_model, latent.q_rank] if latent.q_rank else [d_model]
            inward = [
                *itertools.pairwise([*ranks, heads * self.head_dim]),
                (d_model, latent.kv_rank + latent.rope_head_dim),
                (latent.kv_rank, heads * (self.head_dim - latent.rope_head_dim + latent.value_head_dim)),
            ]
        return [*inward, (heads * self.value_dim, d_model)]

    @property
    def query_scale(self) -> float:
        """What to multiply queries with for a kernel that multiplies scores with head_dim**-0.5."""
        return self.multiplier * self.head_dim**0.5 if self.multiplier else 1.0


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """How a router scores experts and weighs the chosen ones.

    Experts are scored by a softmax over them (Mixtral, arXiv 2401.04088) or by a sigmoid each (DeepSeek-V3,
    2412.19437); a chosen expert's gate is its score, divided by the sum over the chosen with `renormalize`. With one
    expert per token that would be 1 whatever the score, so then it must be False (Switch, 2101.03961, eq. 2).

    With `bias`, a bias for each expert is added to the scores when experts are chosen, and only then: the means of
    loss-free balancing (2408.15664), moved by `BalanceConfig.bias_update_rate` or, at a rate of 0, left as it is.

    `scaling` is a factor on every gate, after renormalizing (DeepSeek-V3's routed scaling factor).

    With `num_groups` equal groups of experts, a token visits only experts of its `groups_per_token` best groups. A
    group is as good as the sum of its two best scores, the bias included or, without a bias, as its best score
    (DeepSeek-V3, section 2.1.2; V2, 2405.04434, section 2.2.2).
    """

    score: RouterScore = "softmax"  # how the router scores experts: against each other, or one by one
    renormalize: bool = True  # divide a token's gates by their sum
    bias: bool = False  # a selection bias per expert, moved by balance.bias_update_rate
    scaling: float = 1.0  # of every gate
    num_groups: int = 1  # groups of experts; 1: no groups
    groups_per_token: int = 1  # groups that a token's experts may be in

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(self, "scaling", "num_groups", "groups_per_token")
        check(
            self.groups_per_token <= self.num_groups,
            f"groups_per_token={self.groups_per_token} must be at most num_groups={self.num_groups}",
        )


@dataclasses.dataclass(frozen=True)
class RopeScalingConfig:
    """How the frequencies of RoPE are stretched, so that a model reads longer sequences than it first learned from.

    "linear" divides every frequency by `factor`. "llama3" (arXiv 2407.21783) and "yarn" (2309.00071) leave the high
    frequencies alone, divide the low ones by `factor`, and blend in between. "longrope" (2402.13753) divides each
    frequency by a number of its own, of which there are two sets. The last two also scale cos and sin.
    """

    kind: RopeScaling = "none"  # how frequencies are stretched
    factor: float = 1.0  # how many times longer sequences get
    original_max_seq_len: int = 0  # the longest sequence before, in tokens; all but linear need it
    low_freq_factor: float = 1.0  # llama3: a wave that fits less often into that sequence is stretched in full
    high_freq_factor: float = 4.0  # llama3: a wave that fits more often is left alone
    beta_fast: float = 32.0  # yarn: a dim that turns more often over that sequence is left alone
    beta_slow: float = 1.0  # yarn: a dim that turns less often is stretched in full
    truncate: bool = True  # yarn: round these bounds to whole dims
    attention_factor: float = 0.0  # yarn, longrope: of cos and sin; 0: by factor, as in their papers
    short_factors: tuple[float, ...] = ()  # longrope: divisors of frequencies, up to original_max_seq_len
    long_factors: tuple[float, ...] = ()  # longrope: the same for longer sequences

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(self, "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow")
        check_not_negative(self, "original_max_seq_len", "attention_factor")
        check(self.factor >= 1, f"factor={self.factor} must be at least 1: sequences get longer")
        check(
            self.kind in ("none", "linear") or self.original_max_seq_len > 1,
            f"original_max_seq_len={self.original_max_seq_len} must be more than 1 with kind={self.kind!r}",
        )
        check(
            self.low_freq_factor < self.high_freq_factor,
            f"low_freq_factor={self.low_freq_factor} must be less than high_freq_factor={self.high_freq_factor}",
        )
        check(
            self.beta_slow <= self.beta_fast,
            f"beta_slow={self.beta_slow} must be at most beta_fast={self.beta_fast}",
        )
        for name in ("short_factors", "long_factors"):
            factors = getattr(self, name)
            check(all(factor > 0 for factor in factors), f"{name}={factors} must all be more than 0")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """The rotary position embedding (arXiv 2104.09864), of whole heads or of their leading dims alone."""

    theta: float = 10_000.0  # base of the frequencies
    rotary_dim: int = 0  # leading dims of a head that are rotated, even; 0: all
    scaling: RopeScalingConfig = RopeScalingConfig()  # for sequences longer than the model first learned from

    def __post_init__(self) -> None:
        check_types(self)
        check(self.theta > 1, f"theta={self.theta} must be more than 1")
        check_not_negative(self, "rotary_dim")
        check(self.rotary_dim % 2 == 0, f"rotary_dim={self.rotary_dim} must be even: RoPE rotates pairs")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only Transformer whose feed-forward layers are mixtures of experts.

    Sizes are in elements. `num_layers` counts every layer, the `num_dense_layers` leading ones (plain SwiGLU of width
    `dense_d_ff`) included. `shared_d_ff` is the width of an expert that every token visits, 0 for none; with
    `shared_gate`, its result is weighed by the sigmoid of a product of the token with a vector (Qwen2-MoE, arXiv
    2407.10671). `embedding_multiplier`, `residual_multiplier`, `logits_divisor` and `attention.multiplier` are those of
    Granite (arXiv 2408.13359).
    """

    num_layers: int = 4  # layers in all, the dense ones included
    d_model: int = 128  # width of the residual stream
    attention: AttentionConfig = AttentionConfig()  # heads of queries, keys and values
    rope: RopeConfig = RopeConfig()  # positions of tokens
    d_ff: int = 256  # hidden width of an expert
    num_experts: int = 16  # experts per layer
    experts_per_token: int = 2  # experts that each token visits
    router: RouterConfig = RouterConfig()  # which experts a token visits, and with what weights
    shared_d_ff: int = 0  # hidden width of an expert that every token visits; 0 for none
    shared_gate: bool = False  # weigh that expert's result by a gate for each token
    num_dense_layers: int = 0  # leading layers with a plain feed-forward instead of experts
    dense_d_ff: int = 0  # hidden width of those layers
    vocab_size: int = 256  # tokens that the model knows
    tie_embeddings: bool = False  # use the embedding as the output layer, too
    max_seq_len: int = 10_240  # longest sequence, in tokens
    norm_eps: float = 1e-6  # what RMSNorm adds to the mean square
    embedding_multiplier: float = 1.0  # of the embedded tokens
    residual_multiplier: float = 1.0  # of what attention and feed-forward add to the residual stream
    logits_divisor: float = 1.0  # of the logits
    dtype: Dtype = "bfloat16"  # of activations and of the weights' compute copies; masters are always float32

    if not TYPE_CHECKING:  # or a type checker would take any name

        def __new__(cls, *args: Any, **fields: Any) -> ModelConfig:
            """Raises `ConfigError` for names of version 0.1, so that old configuration files learn the new ones."""
            old = [name for name in MOVED_FIELDS if name in fields]
            groups: dict[str, list[str]] = {}
            for name in old:
                group, _, field = MOVED_FIELDS[name].partition(".")
                groups.setdefault(group, []).append(f"{field}={fields[name]!r}")
            now = [f"{group}={type(getattr(cls, group)).__name__}({', '.join(v)})" for group, v in groups.items()]
            check(not old, f"{', '.join(old)} of ModelConfig moved into groups; write {', '.join(now)}")
            return super().__new__(cls)

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(
            self, "num_layers", "d_model", "d_ff", "num_experts", "experts_per_token", "vocab_size", "max_seq_len",
            "norm_eps", "embedding_multiplier", "residual_multiplier", "logits_divisor",
        )  # fmt: skip
        check_not_negative(self, "shared_d_ff", "num_dense_layers", "dense_d_ff")
        check(
            self.rope.rotary_dim <= self.attention.head_dim,
            f"rope.rotary_dim={self.rope.rotary_dim} must be at most attention.head_dim={self.attention.head_dim}",
        )
        check(
            not self.rope.rotary_dim or self.attention.kind == "grouped",
            f"rope.rotary_dim={self.rope.rotary_dim} must be 0 with latent attention, where "
            f"attention.latent.rope_head_dim={self.attention.latent.rope_head_dim} says what is rotated",
        )
        scaling, pairs = self.rope.scaling, self.rotary_dim // 2
        for name in ("short_factors", "long_factors"):
            given = len(getattr(scaling, name))
            check(
                given == (pairs if scaling.kind == "longrope" else 0),
                f"rope.scaling.{name} has {given} numbers; with kind={scaling.kind!r} it must have "
                + (f"{pairs}, one for each pair of rotated dims" if scaling.kind == "longrope" else "none"),
            )
        check(
            not self.shared_gate or self.shared_d_ff > 0,
            f"shared_gate=True has no shared expert to weigh with shared_d_ff={self.shared_d_ff}; use "
            "shared_gate=False, or a shared_d_ff above 0",
        )
        check(
            self.experts_per_token <= self.num_experts,
            f"experts_per_token={self.experts_per_token} must be at most num_experts={self.num_experts}",
        )
        groups, size = self.router.num_groups, self.num_experts // self.router.num_groups
        check(
            groups == 1 or (self.num_experts % groups == 0 and size > 1),
            f"router.num_groups={groups} must divide num_experts={self.num_experts} into groups of 2 or more",
        )
        check(
            self.experts_per_token <= self.router.groups_per_token * size,
            f"experts_per_token={self.experts_per_token} must be at most {self.router.groups_per_token * size}, the "
            f"experts in router.groups_per_token={self.router.groups_per_token} of the groups",
        )
        check(
            self.experts_per_token > 1 or not self.router.renormalize or self.num_experts == 1,
            f"experts_per_token={self.experts_per_token} with router.renormalize=True makes every gate 1, so that "
            "the router learns nothing from the text; use router.renormalize=False",
        )
        check(
            self.num_dense_layers < self.num_layers,
            f"num_dense_layers={self.num_dense_layers} must be less than num_layers={self.num_layers}",
        )
        check(
            (self.num_dense_layers > 0) == (self.dense_d_ff > 0),
            f"dense_d_ff={self.dense_d_ff} must be positive exactly when num_dense_layers={self.num_dense_layers} is",
        )

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding, so that meshes can divide them.

        It is `vocab_size`, or the next multiple of 128 where that is no multiple of 16. It doesn't depend on the mesh,
        so a checkpoint of one mesh fits every other. Rows past `vocab_size` are zeros and no token's.
        """
        if self.vocab_size % VOCAB_UNIT == 0:
            return self.vocab_size
        return math.ceil(self.vocab_size / VOCAB_PADDING) * VOCAB_PADDING

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - self.num_dense_layers

    @property
    def rotary_dim(self) -> int:
        """Dims of a head that RoPE rotates."""
        return self.attention.latent.rope_head_dim or self.rope.rotary_dim or self.attention.head_dim


@dataclasses.dataclass(frozen=True)
class DispatchConfig:
    """How tokens reach their experts.

    `strategy` is "dropless": every assignment arrives, in as many rounds of bounded buffers as that takes; "ragged":
    the same, but only the rows that are needed travel, and experts work on no empty row; or "capacity": an expert takes
    `capacity_factor` times its balanced load, the assignments of the highest gates among all senders', and drops the
    others. A buffer has room for `capacity_factor` times the balanced load: of each expert from a sender in "dropless"
    and "capacity", of a receiver's experts together in "ragged".

    `expert_axes` are the mesh axes that the experts are spread over: `("expert",)` splits each expert's width over
    `tensor`; `("expert", "tensor")` (folded) keeps experts whole. If `hierarchical`, tokens travel in two hops, inside
    the host, then across; `mesh.hosts` says how many hosts there are, and virtual CPU devices stand for any number.

    `chunks` cuts each round's buffers into parts that travel and compute by themselves, so that one part's exchange can
    run during another's matrix products. `wire_dtype` "float8" sends tokens to their experts as float8_e4m3fn, with a
    scale each; results travel as they are (DeepSeek-V3, arXiv 2412.19437, section 3.3.2).

    Where one device has all experts, no token travels: buffers, `chunks`, `wire_dtype` and `expert_axes` change
    nothing.
    """

    strategy: Strategy = "dropless"  # what happens to more tokens than a buffer holds; only capacity drops them
    capacity_factor: float = 1.5  # room in a buffer, over the balanced load of an expert
    expert_axes: tuple[ExpertAxis, ...] = ("expert", "tensor")  # the experts' axes: expert or expert,tensor
    hierarchical: bool = False  # tokens travel inside the host first, then across hosts
    chunks: int = 1  # parts of a buffer whose exchange can overlap with the others' matrix products
    wire_dtype: WireDtype = "compute"  # what tokens travel to their experts as: the model's dtype, or float8

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(self, "capacity_factor", "chunks")
        check(
            self.capacity_factor <= MAX_CAPACITY_FACTOR,
            f"capacity_factor={self.capacity_factor} must be at most {MAX_CAPACITY_FACTOR:,.0f}",
        )
        check(
            self.expert_axes in (("expert",), ("expert", "tensor")),
            f"expert_axes={self.expert_axes!r} must be ('expert',) or ('expert', 'tensor')",
        )

    def capacity(self, num_tokens: int, model: ModelConfig) -> int:
        """Rows that one device reserves for one expert when it sends `num_tokens` tokens: a multiple of `chunks`."""
        balanced = num_tokens * model.experts_per_token / model.num_experts
        rows = min(num_tokens, math.ceil(self.capacity_factor * balanced))
        return math.ceil(rows / self.chunks) * self.chunks


@dataclasses.dataclass(frozen=True)
class BalanceConfig:
    """What keeps the experts evenly loaded, and what is said when they are not.

    Losses, by weight (0: off): load balance over the global batch (Switch, arXiv 2101.03961, eq. 4), the same inside
    each sequence (DeepSeek-V3, 2412.19437, eq. 17), and z (ST-MoE, 2202.08906, eq. 5). The global batch is that of the
    optimizer step: with `Layout.grad_accumulation_steps` > 1, its load-balance loss takes one more forward pass.
    `bias_update_rate` is the step of the selection bias (loss-free balancing, 2408.15664; needs
    `RouterConfig.bias`), 0 to leave it as it is.

    Loads are watched over the last `window` optimizer steps. At the end of each window, the buffers of a dispatch that
    drops nothing get the next size of `capacity_factors`: the smallest that is `headroom` times the busiest expert's
    load over the mean (see `moejax.balance.ExpertLoadBalancer`). The largest bounds the memory. With fewer than two
    sizes, and where the strategy is "capacity", the size is `dispatch.capacity_factor` throughout; otherwise that is
    where it starts.

    A warning names the layer when a figure of the window stays out of its bound for `window` steps: `max_load_cv`, the
    coefficient of variation over experts; `max_dropped_fraction` of assignments; `max_rounds`, mean, of a dispatch;
    `max_idle_experts`, those that got nothing. The first three windows of a run are let pass (`moejax.balance.bounds`).
    """

    aux_loss_weight: float = 0.01  # of the load-balance loss over the global batch; 0: off
    sequence_loss_weight: float = 0.0  # of the load-balance loss inside each sequence; 0: off
    z_loss_weight: float = 0.001  # of the router's z loss; 0: off
    bias_update_rate: float = 0.0  # step of the selection bias; needs model.router.bias
    window: int = 32  # optimizer steps that loads are watched over
    headroom: float = 1.5  # how far above the busiest expert's load the buffers are sized
    capacity_factors: tuple[float, ...] = (1.25, 1.5, 1.75, 2.0, 3.0, 4.0)  # sizes that the buffers may take, ascending
    max_load_cv: float = 0.5  # warn above this coefficient of variation over experts
    max_dropped_fraction: float = 0.05  # warn above this part of assignments dropped
    max_rounds: float = 2.0  # warn above this mean number of rounds per dispatch
    max_idle_experts: int = 0  # warn above this number of experts that got nothing

    def __post_init__(self) -> None:
        check_types(self, infinite=("max_load_cv", "max_dropped_fraction", "max_rounds"))
        check_positive(self, "window")
        check_not_negative(
            self, "aux_loss_weight", "sequence_loss_weight", "z_loss_weight", "bias_update_rate",
            "max_load_cv", "max_dropped_fraction", "max_idle_experts",
        )  # fmt: skip
        for name in ("headroom", "max_rounds"):
            value = getattr(self, name)
            check(value >= 1, f"{name}={value} must be 1 or more")
        sizes = self.capacity_factors
        check(
            all(size > 0 for size in sizes) and list(sizes) == sorted(set(sizes)),
            f"capacity_factors={sizes} must be positive and ascending",
        )
        check(
            not sizes or sizes[-1] <= MAX_CAPACITY_FACTOR,
            f"capacity_factors={sizes} must be at most {MAX_CAPACITY_FACTOR:,.0f}",
        )

    def check_moves_a_bias(self, model: ModelConfig) -> None:
        """Raises `ConfigError` for a rate that has no bias to move."""
        check(
            model.router.bias or not self.bias_update_rate,
            f"balance.bias_update_rate={self.bias_update_rate} has no bias to move: use model.router.bias=True, or "
            "balance.bias_update_rate=0",
        )

    @classmethod
    def suited_to(cls, model: ModelConfig) -> BalanceConfig:
        """Loss-free balancing for a router with a bias, which keeps loads the most even (experiments/results), and the
        auxiliary loss for one without.
        """
        return cls(aux_loss_weight=0.0, z_loss_weight=0.0, bias_update_rate=0.01) if model.router.bias else cls()


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up to `learning_rate`, then a cosine to `final_learning_rate_fraction` of it.

    `warmup_steps=None` warms up for a tenth of the run, at most 500 steps.
    """

    learning_rate: float = 3e-3  # at its peak, after the warm-up
    warmup_steps: int | None = None  # steps of linear warm-up; fewer than steps
    final_learning_rate_fraction: float = 0.1  # of the peak, at the end of the cosine
    b1: float = 0.9  # decay of AdamW's first moment
    b2: float = 0.95  # decay of AdamW's second moment
    eps: float = 1e-8  # what AdamW adds to the root of the second moment
    weight_decay: float = 0.1  # of matrices; norm scales and biases have none
    clip_norm: float = 1.0  # largest norm of the gradient

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(self, "learning_rate", "eps", "clip_norm")
        check_not_negative(self, "weight_decay", *(() if self.warmup_steps is None else ("warmup_steps",)))
        check(
            0 <= self.final_learning_rate_fraction <= 1,
            f"final_learning_rate_fraction={self.final_learning_rate_fraction} must be between 0 and 1",
        )
        for name in ("b1", "b2"):
            value = getattr(self, name)
            check(0 <= value < 1, f"{name}={value} must be at least 0 and below 1")

    def warmup(self, steps: int) -> int:
        """Returns how many of a run's `steps` warm up.

        Raises:
          ConfigError: `warmup_steps` leaves no step to train at the full learning rate.
        """
        if self.warmup_steps is None:
            return min(steps // 10, 500)
        check(
            self.warmup_steps < steps,
            f"optimizer.warmup_steps={self.warmup_steps} must be less than steps={steps}; None is a tenth of the steps",
        )
        return self.warmup_steps


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a run trains on.

    `paths` are text files, folders and globs; none means the installed Python's own standard library. On the command
    line, commas separate them; an existing name that has commas itself must be the only one. `tokenizer` is "bytes",
    "bpe" (trained on the corpus to `tokenizer_vocab_size` and cached), or the path of a tokenizer.json or of the folder
    that holds it. `separator` is the token of that file that leads each document. If empty, it is the BOS token where
    the model's tokenizer has one, else EOS, as `tokenizer_config.json` beside the file names them.

    `eval_fraction` of the files, chosen by a hash of their names, is held out. Of a plan with several lengths, steps on
    the same mesh come `block_steps` in a row, because a change of mesh moves the whole state.
    """

    paths: tuple[str, ...] = ()  # files, globs or folders, separated by commas; none: Python's own library
    tokenizer: str = "bytes"  # bytes, bpe (trained on the data) or the path of a tokenizer.json or its folder
    tokenizer_vocab_size: int = 4096  # tokens that bpe is trained to; more than 256
    separator: str = ""  # token of tokenizer.json that leads each document; empty: its BOS, else its EOS
    eval_fraction: float = 0.05  # part of the files that is held out
    seed: int = 0  # of the order of the data
    block_steps: int = 16  # steps in a row on one mesh, where a plan has several

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(self, "block_steps")
        check(
            self.tokenizer_vocab_size > 256,
            f"tokenizer_vocab_size={self.tokenizer_vocab_size} must be more than 256: BPE starts from the 256 bytes",
        )
        check(
            not self.separator or self.tokenizer not in ("bytes", "bpe"),
            f"separator={self.separator!r} needs a tokenizer.json; tokenizer={self.tokenizer!r} has its own",
        )
        check(0 < self.eval_fraction < 1, f"eval_fraction={self.eval_fraction} must be between 0 and 1")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """A checkpoint every `every` steps and at the end, of which the newest `keep` stay."""

    every: int = 100  # steps between checkpoints
    keep: int = 3  # how many of the newest stay

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(self, "every", "keep")
