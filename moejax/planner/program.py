"""What one step of moejax costs one device, in closed form: every matmul and collective, the main memory operations.

It reads as the program does (`moejax.model`): embedding, layers with attention, routing, dispatch, experts, combine,
then logits and loss; what weights cost by themselves; the optimizer. Each part says what its forward pass does and
what a rematerialization policy knows the result as; `moejax.planner.passes` writes the other passes from that.

For FLOPs by phase and pass, bytes sent by (phase, pass, kind, axes) and bytes of parameters it equals the trace of the
program for accelerators exactly (tests/planner/test_closed_forms.py), a microsecond an entry. Bubbles are computed
there, so they count. Memory operations are the main ones of a compiler that fuses elementwise work, which no trace can
tell.

Names: B sequences of a device in one forward-backward pass, b those of a part of a microbatch, S sequence, s = S /
tensor, T = b s tokens of a part, D model, E experts, e this device's, C rows a sender reserves for an expert.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

from moejax import sharding
from moejax.balance import LayerStats
from moejax.checks import check
from moejax.compiler import Platform
from moejax.config import BalanceConfig, ModelConfig
from moejax.dispatch.exchange import SENDERS
from moejax.kernels.attention import cost
from moejax.kernels.grouped_matmul.cost import padded_rows
from moejax.kernels.top_k_routing.reference import POSITIONS_BLOCK
from moejax.layout import VOCAB_AXES, Layout
from moejax.mesh import EXPERT, PIPELINE, REPLICA, TENSOR
from moejax.planner.passes import Passes, Result
from moejax.planner.work import Collective, Kind, Matmul, MemoryOp, Mode, Pass, Phase, Work
from moejax.sharding import Param

# Products of queries by tokens in the attention kernels, forward and backward.
_ATTENTION_PRODUCTS = {
    "gpu": (cost.PRODUCTS["mha_forward"], cost.PRODUCTS["mha_backward"]),
    "tpu": (cost.PRODUCTS["splash_mha_fwd"], cost.PRODUCTS["splash_mha_dq"] + cost.PRODUCTS["splash_mha_dkv"]),
}


def work(model: ModelConfig, layout: Layout, mode: Mode = "train") -> Work:
    """What each device does in a step, on accelerators; a mesh of CPUs counts as one of GPUs.

    Raises:
      ConfigError: the model does not fit the layout, or the mode is decoding, for which there is no step yet.
    """
    check(mode != "decode", "mode='decode' has no program yet; use 'train' or 'prefill'")
    step = _Step(model, layout, mode)
    items = [*step.embed(), *step.dense_layers(), *step.layers(), *step.pipeline(), *step.weights()]
    if mode == "prefill":
        return [item for item in (*items, *step.next_token()) if item.pass_ == "forward"]
    return [*step.count_ahead(), *items, *step.logits(), *step.loss(), *step.update()]


def param_bytes(model: ModelConfig, layout: Layout) -> float:
    """Bytes of the parameters that one device stores."""
    step = _Step(model, layout, "train")
    return sum(4 * step.stored_elements(p) for _, p in _named(step.table))


class _Step(Passes):
    """One step, part by part."""

    def __init__(self, model: ModelConfig, layout: Layout, mode: Mode) -> None:
        if mode != "train":
            layout = layout.replace(grad_accumulation_steps=1)
        layout.check(model)
        self.platform: Platform = "tpu" if layout.mesh.platform == "tpu" else "gpu"
        layout = layout.resolve(self.platform)
        super().__init__({REPLICA: 1} | layout.mesh.shape, model.dtype, layout.remat)
        self.model, self.layout, self.dispatch = model, layout, layout.dispatch
        self.balance = BalanceConfig.suited_to(model)  # what a run has unless it says otherwise
        self.table = sharding.param_table(model, layout)
        self.num_slices = layout.grad_accumulation_steps
        self.B, self.S, self.s = layout.sequences_per_slice, layout.seq_len, layout.local_seq_len
        self.microbatch = layout.sequences_per_microbatch
        self.b, self.T = layout.sequences_per_part, layout.tokens_per_part
        self.parts, self.ticks, self.chunk = layout.batch_split, layout.ticks, layout.layers_per_chunk(model)
        self.capacity = layout.capacity(model)
        self.layer_runs = self.num_slices * self.ticks * self.chunk

    # The parts, in the order of the program.

    def count_ahead(self) -> Iterator[Matmul | Collective | MemoryOp]:
        """The forward pass over all accumulated slices that counts assignments for their load-balance loss."""
        if self.num_slices == 1 or not self.balance.aux_loss_weight:
            return
        items = (*self.embed(), *self.dense_layers(), *self.layers(), *self.pipeline(), *self.weights(output=False))
        yield from (item for item in items if item.pass_ == "forward")

    def embed(self) -> Iterator[Matmul | Collective | MemoryOp]:
        """Rows of this device's part of the table, summed over the parts of the vocabulary."""
        whole, local = (self.B * length * self.model.d_model for length in (self.S, self.s))
        yield MemoryOp("embed", "forward", 2 * whole * self.itemsize, self.num_slices)
        yield MemoryOp("embed", "backward", 2 * whole * 4, self.num_slices)
        yield from self.collective("embed", "reduce_scatter", (TENSOR,), whole * self.itemsize, self.num_slices)
        kind: Kind = "reduce_scatter" if self.model.num_dense_layers else "all_reduce"
        yield from self.collective("embed", kind, (PIPELINE,), local * self.itemsize, self.num_slices)

    def attention(self, b: float, times: float) -> Iterator[Matmul | Collective | MemoryOp]:
        """A layer's attention on `b` sequences: heads split over `tensor`, all tokens gathered."""
        m, t, H = self.model, self.size[TENSOR], self.model.attention.head_dim
        heads, kv_heads, tokens = m.attention.num_heads // t, m.attention.num_kv_heads // t, b * self.S
        local = b * self.s * m.d_model * self.itemsize
        *inward, (results, _) = m.attention.projections(m.d_model, t)
        yield from self.collective("attention", "all_gather", (TENSOR,), local, times, "network")
        for inputs, outputs in inward:
            yield from self.matmul("attention", tokens, outputs, inputs, times, "projection")
        yield from self.qk_norm(b, tokens * (heads + kv_heads) * H, times)
        yield from self.latents(tokens, heads, times)
        yield from self.scores(b, heads, times)
        yield from self.matmul("attention", tokens, m.d_model, results, times, "network")
        yield from self.collective("attention", "reduce_scatter", (TENSOR,), local * t, times, "network")
        yield from self.memory_op("attention", b * self.s * m.d_model, times, forward=5, backward=8)  # norm, residual
        rotated = tokens * (heads + kv_heads) * H
        yield from self.memory_op("attention", rotated, times, forward=2, backward=2)

    def qk_norm(self, b: float, elements: float, times: float) -> Iterator[Collective | MemoryOp]:
        """Norms of queries and keys, `elements` of them; for all heads as one vector, devices add up their squares."""
        if self.model.attention.qk_norm == "none":
            return
        yield from self.memory_op("attention", elements, times, forward=1, backward=2)
        if self.model.attention.qk_norm == "projection":
            for _ in ("queries", "keys"):
                yield from self.no_gradient("attention", "all_reduce", (TENSOR,), 4 * b * self.S, times, "network")
                yield from self.in_pass("attention", "backward", (TENSOR,), 4 * b * self.S, times)

    def latents(self, tokens: float, heads: int, times: float) -> Iterator[MemoryOp]:
        """Norms of latents; and values, padded to the width of keys for the kernel, and results, cut again."""
        a = self.model.attention
        if a.kind == "latent":
            ranks, padded = a.latent.q_rank + a.latent.kv_rank, 2 * heads * a.head_dim
            yield from self.memory_op("attention", tokens * ranks, times, forward=1, backward=2)
            yield from self.memory_op("attention", tokens * padded, times, forward=2, backward=2)

    def scores(self, b: float, heads: int, times: float) -> Iterator[Matmul]:
        """The kernel on padded tokens; causality leaves half of each product of queries by tokens."""
        m = self.model
        S, H = cost.padded(self.platform, self.S, m.attention.head_dim, self.itemsize)
        forward, backward = _ATTENTION_PRODUCTS[self.platform]
        for pass_ in self.passes_of("scores"):
            yield Matmul("attention", pass_, S, S / 2, H, b * heads, forward * times, m.dtype)
        yield Matmul("attention", "backward", S, S / 2, H, b * heads, backward * times, m.dtype)
        if self.platform == "tpu":  # the result times its gradient, which GPUs have another kernel for
            yield Matmul("attention", "backward", 1, 1, H, b * heads * S, times, "float32")

    def swiglu(self, tokens: float, d_ff: int, times: float) -> Iterator[Matmul | MemoryOp]:
        """A feed-forward that every token visits: shared experts, and that of dense layers."""
        yield from self.matmul("expert", tokens, 2 * d_ff, self.model.d_model, times, "projection")
        yield from self.matmul("expert", tokens, self.model.d_model, d_ff, times, "unused")
        yield from self.memory_op("expert", tokens * d_ff, times, forward=3, backward=5)

    def dense_layers(self) -> Iterator[Matmul | Collective | MemoryOp]:
        """The leading dense layers, each stage of the pipeline on its share of the batch."""
        m, stages = self.model, self.size[PIPELINE]
        if not m.num_dense_layers:
            return
        b, times = self.B / stages, self.num_slices * m.num_dense_layers
        yield from self.attention(b, times)
        yield from self.swiglu(b * self.s, m.dense_d_ff, times)
        yield from self.memory_op("expert", b * self.s * m.d_model, times, forward=3, backward=5)
        local = b * self.s * m.d_model * self.itemsize
        yield from self.collective("pipeline", "all_gather", (PIPELINE,), local, self.num_slices)

    def layers(self) -> Iterator[Matmul | Collective | MemoryOp]:
        """The layers of this stage in every tick of the pipeline, on each part of the microbatch."""
        times = self.layer_runs * self.parts
        yield from self.attention(self.b, times)
        yield from self.route(times)
        yield from self.mixture(times)
        if self.model.shared_d_ff:
            yield from self.swiglu(self.T, self.model.shared_d_ff, times)
        if self.model.shared_gate:
            yield from self.matmul("expert", self.T, 1, self.model.d_model, times, "projection")

    def route(self, times: float) -> Iterator[Matmul | MemoryOp]:
        """The router's kernel; its backward pass makes the logits again."""
        m = self.model
        for pass_ in self.passes_of("routing"):
            yield Matmul("route", pass_, self.T, m.num_experts, m.d_model, times=times, dtype="float32")
        yield Matmul("route", "backward", self.T, m.num_experts, m.d_model, times=times, dtype="float32")
        yield Matmul("route", "backward", self.T, m.d_model, m.num_experts, times=times, dtype="float32")
        yield Matmul("route", "backward", m.d_model, m.num_experts, self.T, times=times, dtype="float32")
        yield from self.memory_op("route", self.T * m.d_model, times, forward=3, backward=5)  # norm

    def mixture(self, times: float) -> Iterator[Matmul | Collective | MemoryOp]:
        """Tokens to their experts and back, by the strategy of the dispatch."""
        assignments = self.T * self.model.experts_per_token
        if self.grouped and not self.layout.exchanges:
            rows = assignments
            yield from self.experts(rows, times)
        elif self.grouped:
            rows = self.ragged_rows * self.dispatch.chunks
            yield from self.ragged(times)
        else:
            rows = self.capacity * self.model.num_experts
            yield from self.buffers(times)
        yield from self.memory_op("dispatch", (rows + assignments) * self.model.d_model, times, forward=1, backward=1)
        yield from self.memory_op("combine", (rows + assignments) * self.model.d_model, times, forward=1, backward=1)
        yield from self.weighted_sum(times)

    @property
    def grouped(self) -> bool:
        """Whether experts take rows sorted by expert, not buffers of equal size."""
        return self.dispatch.strategy == "ragged" or (
            self.dispatch.strategy == "dropless" and not self.layout.exchanges
        )

    def weighted_sum(self, times: float) -> Iterator[Matmul]:
        """Of a token's results, by its gates: a product of [1, K] and [K, D] for each."""
        m = self.model
        passes: tuple[tuple[Pass, int], ...] = (("forward", 1), ("backward", 2))
        for pass_, number in passes:
            yield Matmul("combine", pass_, 1, m.d_model, m.experts_per_token, self.T, number * times, "float32")

    def buffers(self, times: float) -> Iterator[Matmul | Collective | MemoryOp]:
        """One round of buffers of equal size, in chunks that travel and compute by themselves."""
        m, d = self.model, self.dispatch
        if d.strategy == "capacity":
            yield from self.highest_gates(times)
        yield from self.no_gradient("dispatch", "all_reduce", SENDERS, 4, times, "recomputed")  # the number of rounds
        rows, chunks = m.num_experts * self.capacity / d.chunks, times * d.chunks
        full, packed = rows * m.d_model * self.itemsize, self.packed_bytes(rows)
        exchange = functools.partial(
            self.collective,
            kind="all_to_all",
            axes=d.expert_axes,
            times=chunks,
            result="network",
            hosts=self.layout.exchange_hosts,
        )
        yield from exchange("dispatch", num_bytes=packed, back_bytes=full)
        yield from self.experts(rows, chunks)
        yield from exchange("combine", num_bytes=full, back_bytes=packed)

    def packed_bytes(self, rows: float) -> float:
        """Rows on their way to experts: as they are, or a byte a number and a scale."""
        D = self.model.d_model
        return rows * (D + 4 if self.dispatch.wire_dtype == "float8" else D * self.itemsize)

    def highest_gates(self, times: float) -> Iterator[Matmul | Collective]:
        """Every device sorts all senders' assignments by gate, and counts positions anew by a product."""
        assignments, E = self.T * self.model.experts_per_token, self.model.num_experts
        for _ in ("gate", "expert"):
            yield from self.no_gradient("dispatch", "all_gather", SENDERS, 4 * assignments, times, "result")  # sorted
        yield from self.no_gradient("dispatch", "all_reduce", SENDERS, 4 * E, times, "result")
        block = min(POSITIONS_BLOCK, self.T)
        for pass_ in self.passes_of("result"):
            yield Matmul("dispatch", pass_, block, E, block, math.ceil(self.T / block), times, "float32")

    @property
    def ragged_rows(self) -> int:
        """Rows of a receiver's buffer for one chunk."""
        _, senders = self.devices(self.dispatch.expert_axes)
        room = self.capacity * self.model.num_experts // self.dispatch.chunks
        return min(room, senders * self.T * self.model.experts_per_token)

    def ragged(self, times: float) -> Iterator[Matmul | Collective | MemoryOp]:
        """Exactly the rows that are assigned; as the trace does, as many as sender and receiver have room for."""
        m, d = self.model, self.dispatch
        yield from self.no_gradient("dispatch", "all_gather", d.expert_axes, 4 * m.num_experts, times, "recomputed")
        yield from self.no_gradient("dispatch", "all_reduce", SENDERS, 4, times, "recomputed")
        chunks = times * d.chunks
        yield from self.ragged_hops("dispatch", chunks)
        yield from self.experts(self.ragged_rows, chunks)
        yield from self.ragged_hops("combine", chunks)

    def ragged_hops(self, phase: Phase, times: float) -> Iterator[Collective]:
        """Inside the host from the sender's rows to those for all hosts' receivers, then across to one receiver's."""
        axes, num_devices = self.devices(self.dispatch.expert_axes)
        hosts, here = self.layout.exchange_hosts, self.T * self.model.experts_per_token
        hops = [(min(here, hosts * self.ragged_rows), num_devices // hosts), (self.ragged_rows, hosts)]
        for rows, devices in hops if hosts > 1 else [(min(here, self.ragged_rows), num_devices)]:
            there, back = self.packed_bytes(rows), rows * self.model.d_model * self.itemsize
            if phase == "combine":
                there, back = back, there
            passes: tuple[Pass, ...] = (*self.passes_of("network"), "backward")
            for pass_ in passes if devices > 1 else ():
                num_bytes = back if pass_ == "backward" else there
                yield Collective(phase, pass_, "all_to_all", axes, num_bytes, devices, times)

    def experts(self, rows: float, times: float) -> Iterator[Matmul | Collective | MemoryOp]:
        """This device's experts on its rows. Where their width is split, rows of all of `tensor` are gathered."""
        m, t = self.model, self.size[TENSOR]
        _, expert_devices = self.devices(self.dispatch.expert_axes)
        e, width = m.num_experts // expert_devices, m.d_ff
        if TENSOR not in self.dispatch.expert_axes:
            num_bytes, width, rows = rows * m.d_model * self.itemsize, m.d_ff // t, rows * t
            if self.dispatch.strategy == "ragged":
                yield from self.no_gradient(
                    "expert", "all_gather", (TENSOR,), 4 * e, times, "result"
                )  # rows of each expert
            yield from self.collective("expert", "all_gather", (TENSOR,), num_bytes, times, "network")
            yield from self.collective("expert", "reduce_scatter", (TENSOR,), num_bytes * t, times, "network")
        filled = 1.0
        if self.grouped:
            balanced = self.T * m.experts_per_token * (1 if TENSOR in self.dispatch.expert_axes else t)
            rows = padded_rows(self.platform, int(rows))
            filled = min(1.0, balanced / self.dispatch.chunks / rows)
        yield from self.matmul("expert", rows / e, 2 * width, m.d_model, times, "projection", e, filled)
        yield from self.matmul("expert", rows / e, m.d_model, width, times, "network", e, filled)
        yield from self.memory_op("expert", rows * width, times, forward=3, backward=5)

    def pipeline(self) -> Iterator[Collective | MemoryOp]:
        """Every tick hands the next stage its microbatch; at the end the first stage hands all of them to all."""
        one = self.microbatch * self.s * self.model.d_model * self.itemsize
        times, everything = self.num_slices * self.ticks, one * self.layout.num_microbatches
        yield from self.collective("pipeline", "ppermute", (PIPELINE,), one, times)
        yield from self.no_gradient("pipeline", "all_reduce", (PIPELINE,), everything, self.num_slices)
        if not self.model.num_dense_layers:  # what every stage has embedded: the sum of its gradient
            yield from self.in_pass("pipeline", "backward", (PIPELINE,), everything, self.num_slices)
        yield MemoryOp("pipeline", "forward", 4 * one, times)
        yield MemoryOp("pipeline", "backward", 4 * one, times)
        for numbers in self.statistics():
            yield from self.no_gradient("route", "all_reduce", (REPLICA, EXPERT, TENSOR), 4 * numbers, self.num_slices)

    def statistics(self) -> list[int]:
        """Numbers in each array of sums that the router's losses and figures need of this stage's layers."""
        layers, m = self.layout.pipeline_repeats * self.chunk, self.model
        return [layers * (m.num_experts if name.endswith("_E") else 1) for name in LayerStats._fields]

    def logits(self) -> Iterator[Matmul | Collective | MemoryOp]:
        """This device's columns for every token of a microbatch, all stages on the same tokens."""
        m, times = self.model, self.num_slices * self.layout.num_microbatches
        tokens, local = self.microbatch * self.S, self.microbatch * self.s * m.d_model
        yield from self.collective("logits", "all_gather", (TENSOR,), local * self.itemsize, times, "network")
        yield from self.matmul("logits", tokens, self.vocabulary, m.d_model, times, "result")
        yield from self.in_pass("logits", "backward", (PIPELINE,), tokens * m.d_model * self.itemsize, times)
        yield from self.memory_op("logits", local, times, forward=3, backward=5)  # the last norm

    def next_token(self) -> Iterator[Matmul | Collective]:
        """Logits of one position of each sequence."""
        m = self.model
        local = self.B * self.s * m.d_model * self.itemsize
        yield from self.no_gradient("logits", "all_gather", (TENSOR,), local, self.num_slices)
        yield Matmul("logits", "forward", self.B, self.vocabulary, m.d_model, times=self.num_slices, dtype=m.dtype)

    @property
    def vocabulary(self) -> int:
        """Columns of the output table on this device."""
        return self.model.padded_vocab_size // (self.size[PIPELINE] * self.size[TENSOR])

    def loss(self) -> Iterator[Collective | MemoryOp]:
        """The softmax over columns of all devices, and means over all tokens."""
        times, tokens = self.num_slices * self.layout.num_microbatches, self.microbatch * self.S
        results: tuple[Result, ...] = ("network", "network", "unused")  # largest logit, normalizer, the target's logit
        for result in results:
            yield from self.no_gradient("loss", "all_reduce", VOCAB_AXES, 4 * tokens, times, result)
        yield from self.in_pass("loss", "update", (REPLICA, EXPERT), 3 * 4, 1)  # targets counted, ids out of range
        yield from self.no_gradient("loss", "all_reduce", (REPLICA, EXPERT), 4, self.num_slices)
        yield from self.no_gradient("loss", "all_reduce", (PIPELINE,), 4, self.num_slices)  # of the router
        for pass_ in self.passes_of("result"):
            yield MemoryOp("loss", pass_, 3 * 4 * tokens * self.vocabulary, times)
        yield MemoryOp("loss", "backward", 3 * 4 * tokens * self.vocabulary, times)

    # Weights and what becomes of them.

    def stored_elements(self, p: Param) -> float:
        """Of a parameter, on one device."""
        return math.prod(p.shape) / math.prod(self.size[axis] for axes in p.stored for axis in axes)

    def weights(self, *, output: bool = True) -> Iterator[Collective | MemoryOp]:
        """Gathers of stored shards, compute copies, and sums of gradients over devices with other tokens.

        Without `output`, the output layer is not used.
        """
        for path, p in _named(self.table):
            if path[-1] == "w_DV" and not output:
                continue
            elements = self.stored_elements(p)
            yield from self.in_pass("gather", "backward", (REPLICA,), 4 * elements, self.num_slices)
            if p.compute_dtype is None:  # its gradient is zeros
                continue
            if p.gather:
                pieces, times, result = self.gathers(path, output)
                yield from self.collective("gather", "all_gather", p.gather[1], 4 * elements / pieces, times, result)
                elements *= self.devices(p.gather[1])[1]
            stored_over = {axis for axes in p.stored for axis in axes}
            for pieces, times, itemsize, tokens_over in self.copies(path, p, output):
                num_bytes = itemsize * elements / pieces
                yield from self.in_pass("gather", "backward", set(tokens_over) - stored_over, num_bytes, times)
                for pass_ in ("forward", "backward"):
                    yield MemoryOp("gather", pass_, (4 + itemsize) * elements / pieces, times)

    def gathers(self, path: tuple[str, ...], output: bool) -> tuple[int, float, Result]:
        """In how many pieces a parameter is gathered, how many pieces in all, and what they are to a policy."""
        if path[0] == "dense_layers":
            layers = self.model.num_dense_layers
            return layers, self.num_slices * layers, "recomputed"
        if path[0] == "layers" and self.layout.gather == "layer":
            return self.layout.pipeline_repeats * self.chunk, self.layer_runs, "recomputed"
        tables = 2 if path[0] == "embed" and self.model.tie_embeddings and output else 1
        return 1, self.num_slices * tables, "unused"

    def copies(self, path: tuple[str, ...], p: Param, output: bool) -> list[tuple[int, float, int, tuple[str, ...]]]:
        """The uses of a parameter: pieces, times, bytes of an element, and axes that a replica's tokens differ over."""
        group, name, passes = path[0], path[-1], self.num_slices
        everywhere = (EXPERT, PIPELINE, TENSOR)
        itemsize = 4 if p.compute_dtype == "float32" else self.itemsize
        logits = (1, passes * self.layout.num_microbatches, self.itemsize, (EXPERT, TENSOR))
        if group == "embed":
            return [(1, passes, itemsize, (EXPERT,)), *([logits] if self.model.tie_embeddings and output else [])]
        if group == "head":
            return [logits if name == "w_DV" else (1, passes, itemsize, (EXPERT, TENSOR))]
        if group == "dense_layers":
            layers = self.model.num_dense_layers
            return [(layers, passes * layers, itemsize, everywhere)]
        if "experts" in path and (self.layout.exchanges or not self.grouped):
            itemsize = 4  # rounds take the weights as they are stored
        return [(self.layout.pipeline_repeats * self.chunk, self.layer_runs * self.parts, itemsize, everywhere)]

    def update(self) -> Iterator[Collective | MemoryOp]:
        """The norm of the gradients, AdamW on what is stored here, and the balancer's figures."""
        parameters = [p for _, p in _named(self.table)]
        for axes in {frozenset(axis for axes in p.stored for axis in axes) for p in parameters}:
            yield from self.in_pass("optimizer", "update", axes, 4, 1)
        # Read: parameter, gradient twice, both moments; written: parameter and moments.
        yield MemoryOp("optimizer", "update", 8 * 4 * sum(map(self.stored_elements, parameters)))
        for numbers in self.statistics():
            yield from self.in_pass("route", "update", (PIPELINE,), 4 * numbers * self.size[PIPELINE], 1)


def _named(table: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Param]]:
    """The parameters of nested dicts with the names that lead to them."""
    if isinstance(table, Param):
        yield path, table
    else:
        for name, inner in table.items():
            yield from _named(inner, (*path, name))
