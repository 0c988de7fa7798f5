"""The reference executor: what a model means, in plain numpy and float32. Read it to know; use `cpu` to be fast."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial

import numpy as np
import numpy.typing as npt

from pagoda.arch import memory
from pagoda.arch.latent import Latent
from pagoda.arch.lora import AdapterWeights, adapters_bytes
from pagoda.arch.mamba import Mamba
from pagoda.arch.memory import KV_GROUP, KvType
from pagoda.arch.recurrence import Recurrence
from pagoda.arch.registry import bind
from pagoda.arch.short_conv import ShortConv
from pagoda.arch.spec import Attention, Experts, Mlp, ModelSpec, Rope
from pagoda.backend.activations import ACTIVATIONS, clamped_swiglu, silu
from pagoda.backend.base import Capacity, Due, Limits, Progress
from pagoda.backend.cpu.machine import free_memory_bytes
from pagoda.backend.reference_delta import WEIGHTS, advance, convolve, new_states, scan
from pagoda.backend.reference_experts import activated, inner_slots, route
from pagoda.backend.reference_latent import expanded, latent_queries
from pagoda.backend.reference_own import layer_values, own_part
from pagoda.backend.reference_product import matmul, rms
from pagoda.backend.rows import Index, adapter_rows, table_cells, token_cells, token_positions
from pagoda.backend.sampling import sample_rows
from pagoda.errors import EngineError
from pagoda.types import BLOCK_SIZE, Float32, Image, StepPlan, StepResult
from pagoda.weights.ggml import dequantize
from pagoda.weights.source import TensorSource

Cache = npt.NDArray[np.float32 | np.float16]

_log = logging.getLogger(__name__)


class ReferenceExecutor:
    """Runs steps of one model. `caches[i]` holds keys and values of layer i: [2, cells, kv heads, head size]; or the
    keys alone, where the values are a part of them.

    Cell `block * BLOCK_SIZE + offset` is the place of one token.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Mapping[str, Float32],
        *,
        num_blocks: int,
        max_model_len: int,
        max_num_seqs: int = 0,
        kept_states: int = 0,
        activation_bytes: int = 0,
        kv_type: KvType = "float32",
    ) -> None:
        self.spec = spec
        self.weights = weights
        cells, dtype = num_blocks * BLOCK_SIZE, np.dtype("float16" if kv_type == "float16" else "float32")
        self.eight_bits = kv_type == "int8"
        shapes = [
            (a.kept // a.kv_heads, 0 if layer.delta else cells, a.kv_heads, a.head_dim)
            for layer in (() if spec.encoder is not None else spec.layers)
            for a in (layer.attention,)
        ]
        self.caches: list[Cache] = [np.zeros(shape, dtype) for shape in shapes]
        states = max_num_seqs + kept_states
        self.states = {i: new_states(d, states) for i, layer in enumerate(spec.layers) if (d := layer.delta)}
        self.adapters: dict[int, AdapterWeights] = {}  # by place
        self.adapted: list[tuple[AdapterWeights, Index]] = []  # of the step, with the rows that each is for
        self.tables = [rope.tables(max_model_len) for rope in spec.ropes]
        self.capacity = Capacity(
            num_blocks=num_blocks,
            weight_bytes=sum(w.nbytes for w in weights.values()),
            kv_bytes=sum(cache.nbytes for cache in self.caches) + states * memory.state_bytes(spec),
            activation_bytes=activation_bytes,
            device="reference (numpy, float32)",
            kept_states=kept_states,
        )

    @classmethod
    def load(
        cls,
        spec: ModelSpec,
        source: TensorSource,
        limits: Limits,
        progress: Progress | None = None,
        *,
        kv_type: KvType | None = None,
    ) -> ReferenceExecutor:
        """Dequantize all weights to float32. `kv_type` float16 and int8 round keys and values as other backends do.

        None: float32, or int8 where the limits ask for 8 bits. Rounded to 8 bits they are kept in float32 all the same.
        """
        spec = spec.served(limits.max_model_len)
        if kv_type is None:
            kv_type = "int8" if memory.kv_type(limits.kv_cache_dtype) == "int8" else "float32"
        bound = bind(spec, source)
        activations = memory.activation_bytes(spec, limits)
        fit = memory.fit(
            spec,
            limits,
            free_bytes=max(0, free_memory_bytes() - limits.reserved_bytes),
            weight_bytes=memory.float32_weight_bytes(spec) + adapters_bytes(spec, limits),
            activation_bytes=activations,
            kv_type="float16" if kv_type == "float16" else "float32",
        )
        weights: dict[str, Float32] = {}
        for done, (slot, tensor) in enumerate(bound.items(), start=1):
            weights[slot] = dequantize(tensor)
            if progress:
                progress("weights", done / len(bound))
        return cls(
            spec,
            weights,
            num_blocks=fit.blocks,
            kept_states=fit.kept_states,
            max_model_len=limits.max_model_len,
            max_num_seqs=limits.max_num_seqs,
            activation_bytes=activations,
            kv_type=kv_type,
        )

    def launch(self, plan: StepPlan) -> Due:
        return Due(partial(self._compute, plan))

    def _compute(self, plan: StepPlan) -> StepResult:
        # a request whose numbers run over must not fill the log: its row is reported as not ok
        with np.errstate(all="ignore"):
            try:
                return self.run(plan)
            except (IndexError, ValueError, MemoryError) as error:
                # numpy's own words are for the log: the text of an EngineError reaches clients
                _log.exception("step %d failed", plan.step)
                raise EngineError("the step failed") from error

    def encoded(self, image: Image, most_s: float) -> bool:
        return True

    def prepare(self) -> bool:
        return False

    def adapt(self, place: int, weights: AdapterWeights) -> None:
        self.adapters[place] = weights

    def close(self) -> None:
        self.caches = []
        self.weights = {}

    def run(self, plan: StepPlan) -> StepResult:
        if self.spec.pooling is not None:
            return pooled_rows(self.hidden(plan))
        return sample_rows(self.logits(plan), plan)

    def logits(self, plan: StepPlan) -> Float32:
        """The raw logits of the rows of a plan, [L, vocab]. Writes the keys and values of all its tokens."""
        y = matmul(self.hidden(plan), self.weights["embed" if self.spec.tied else "head"])
        y = (y + self.weights.get("head_bias", 0)) * np.float32(self.spec.logit_scale)
        return capped(np.asarray(y), self.spec.logit_soft_cap)

    def hidden(self, plan: StepPlan) -> Float32:
        """The final hidden states of the rows of a decoder's plan, [L, hidden size]."""
        positions, cells = token_positions(plan), token_cells(plan)
        self.adapted = [(self.adapters[place], rows) for place, rows in adapter_rows(plan)]
        x = self.embed(plan)
        own = layer_values(self.spec, self.weights, x, plan.tokens) if self.spec.layer_embed else None
        for i, layer in enumerate(self.spec.layers):
            p = f"layers.{i}."
            x = self.added(i, x, plan)
            normed = self.norm(p + "attn_norm", x)
            if layer.delta is not None:
                y = self.recurrence(i, layer.delta, normed, plan)
            else:
                y = self.attention(i, layer.attention, normed, plan, positions, cells)
            if layer.norms in ("one", "beside"):
                own = normed if layer.norms == "one" else self.norm(p + "mlp_norm", x)
                x = x + y + self.mlp(i, layer.mlp, own)
                continue
            x = x + self.norm(p + "attn_post_norm", y)
            if not layer.mlp.size:
                continue
            y = self.mlp(i, layer.mlp, self.norm(p + "mlp_norm", x))
            x = x + self.norm(p + "mlp_post_norm", y)
            x = x if own is None else x + self.norm(p + "own_post_norm", own_part(self.weights, p, x, own[:, i]))
            x = x * self.weights[p + "scale"] if layer.scaled else x
        return self.norm("norm", x[plan.rows])

    def added(self, i: int, x: Float32, plan: StepPlan) -> Float32:
        """What goes into layer i, with what is added there to what comes out of the layers before."""
        return x

    def embed(self, plan: StepPlan) -> Float32:
        """What each token brings into the first layer."""
        words = self.weights["embed"][plan.tokens] * np.float32(self.spec.embed_scale)
        if not self.spec.positions:
            return np.asarray(words)
        first = self.spec.encoder.first_position if self.spec.encoder is not None else 0
        return np.asarray(words + self.weights["positions"][token_positions(plan) + first])

    def turns(self, plan: StepPlan, positions: Index, local: bool = False) -> tuple[Float32, Float32]:
        """cos and sin of the angles of each token, [T, rope.dim // 2]."""
        if plan.rope_positions is None:
            cos, sin = self.tables[local]
            return cos[positions], sin[positions]
        return self.spec.rope.turns(plan.rope_positions)

    def attention(
        self, i: int, attention: Attention, x: Float32, plan: StepPlan, positions: Index, cells: Index
    ) -> Float32:
        a, name = attention, f"layers.{i}."
        q, *kv = self.latent(name, a, a.latent, x) if a.latent is not None else self.projected(name, a, x)
        k = kv[0]
        if a.rope:
            cos, sin = self.turns(plan, positions, a.local)
            q, k = (rotate(heads, cos, sin, self.spec.ropes[a.local]) for heads in (q, k))
        if a.qk_norm_late:
            q, k = self.norm(name + "q_norm", q), self.norm(name + "k_norm", k)
        q = q * self.spec.rope.query_scales(positions)[:, None, None]
        # all keys and values of the step are written before any is read: requests may share blocks
        cache = self.caches[i if a.source is None else a.source]
        for place, values in enumerate([k, *kv[1:]] if a.source is None else ()):
            cache[place, cells] = rounded_to_8_bits(values) if self.eight_bits else values
        out, sinks, far = np.empty_like(q[..., a.turned :]), self.weights.get(name + "sinks"), plan.last_seen
        for r, slot in enumerate(plan.slots):
            first, last = plan.starts[r], plan.starts[r + 1]
            context = table_cells(plan.block_tables[slot], np.arange(plan.positions[r] + last - first))
            seen = cache[:, context].astype(np.float32, copy=False)
            keys, values = seen[0], seen[-1][..., a.turned :]
            for token in range(first, last):
                end = int(positions[token] if far is None else far[token]) + 1
                out[token] = attend(q[token], keys[:end], values[:end], int(positions[token]), a, sinks)
        heads = out.reshape(len(x), -1) if a.latent is None else expanded(out, self.weights[name + "v_b"])
        if a.out_gate:
            heads = np.asarray(heads / (1 + np.exp(-self.linear(name + "q_gate", x))))
        return self.linear(name + "o", heads)

    def projected(self, name: str, a: Attention, x: Float32) -> tuple[Float32, Float32, Float32]:
        """Queries, keys and values of each token, [T, heads, head size]."""
        if a.source is not None:
            q = self.norm(name + "q_norm", self.linear(name + "q", x).reshape(-1, a.heads, a.head_dim))
            return q, q[:, :0], q[:, :0]
        q, k = self.linear(name + "q", x), self.linear(name + "k", x)
        if a.qk_norm_whole:
            q, k = self.norm(name + "q_norm", q), self.norm(name + "k_norm", k)
        q, k = q.reshape(-1, a.heads, a.head_dim), k.reshape(-1, a.kv_heads, a.head_dim)
        v = self.linear(name + "v", x).reshape(-1, a.kv_heads, a.head_dim)
        if a.qk_norm and not a.qk_norm_whole and not a.qk_norm_late:
            q, k = self.norm(name + "q_norm", q), self.norm(name + "k_norm", k)
        return q, k, rms(v, self.spec.norm_eps) if a.v_norm else v

    def latent(self, name: str, a: Attention, latent: Latent, x: Float32) -> tuple[Float32, Float32]:
        """Queries and keys of each token, [T, heads, head size]."""
        if latent.q_rank:
            q = self.linear(name + "q_b", self.norm(name + "q_a_norm", self.linear(name + "q_a", x)))
        else:
            q = self.linear(name + "q", x)
        c, r = np.split(self.linear(name + "kv_a", x), [latent.rank], axis=-1)
        key = np.concatenate((r, self.norm(name + "kv_a_norm", c)), axis=-1)
        return latent_queries(q.reshape(-1, a.heads, latent.nope + a.turned), self.weights[name + "k_b"]), key[:, None]

    def recurrence(self, i: int, d: Recurrence, x: Float32, plan: StepPlan) -> Float32:
        name = f"layers.{i}."
        products = {part: self.linear(name + part, x) for part in d.PRODUCTS}
        if isinstance(d, ShortConv):
            return self.linear(name + "o", convolve(products, self.weights[name + "u_conv"], self.states[i], plan))
        if isinstance(d, Mamba):
            own = {part: self.weights[name + part] for part in d.slots(self.spec.hidden_size) if part not in products}
            return self.linear(name + "o", scan(d, products, own, self.states[i], plan))
        own = {part: self.weights[name + part] for part in WEIGHTS}
        out = self.norm(name + "z_norm", advance(d, products, own, self.states[i], plan))
        return self.linear(name + "o", silu(products["z"]) * out.reshape(len(x), d.value_width))

    def mlp(self, i: int, mlp: Mlp, x: Float32) -> Float32:
        name = f"layers.{i}."
        if mlp.activation not in ACTIVATIONS and (mlp.activation != "clamped_swiglu" or mlp.experts is None):
            raise EngineError(f"the reference executor has no activation {mlp.activation!r}")
        if mlp.experts is not None:
            return self.mixture(name, mlp, mlp.experts, x)
        act, up = ACTIVATIONS[mlp.activation], self.linear(name + "up", x)
        inner = act(self.linear(name + "gate", x)) * up if mlp.gated else act(up)
        return self.linear(name + "down", inner)

    def mixture(self, name: str, mlp: Mlp, experts: Experts, x: Float32) -> Float32:
        """Each token through the experts that its router likes best, ties by lower number."""
        logits = self.linear(name + "router", self.norm(name + "router_norm", x))
        shares, chosen = route(experts, logits, self.weights.get(name + "router_choice_bias"))
        shares = shares * self.weights.get(name + "router_scale", np.float32(1))
        out, own = np.zeros_like(x), self.norm(name + "experts_norm", x)
        for e in np.unique(chosen):
            rows = np.flatnonzero((chosen == e).any(axis=-1))
            first = [self.expert(f"{name}{part}_experts", e, own[rows]) for part in inner_slots(mlp)]
            inner = clamped_swiglu(*first) if mlp.activation == "clamped_swiglu" else activated(mlp.activation, *first)
            out[rows] += shares[rows, e, None] * self.expert(name + "down_experts", e, inner)
        out = self.norm(name + "experts_post_norm", out)
        return out + self.shared(name, mlp, x) if experts.shared else out

    def shared(self, name: str, mlp: Mlp, x: Float32) -> Float32:
        """Each token through the expert that all take."""
        normed = self.norm(name + "shared_norm", x)
        first = [matmul(normed, self.weights[f"{name}{part}_shared"]) for part in inner_slots(mlp)]
        y = matmul(activated(mlp.activation, *first), self.weights[name + "down_shared"])
        own = self.weights.get(name + "router_shared")
        return self.norm(name + "shared_post_norm", y) if own is None else y / (1 + np.exp(-matmul(x, own[None])))

    def expert(self, slot: str, number: int, x: Float32) -> Float32:
        y = matmul(x, self.weights[slot][number])
        bias = self.weights.get(slot + "_bias")
        return y if bias is None else y + bias[number]

    def linear(self, slot: str, x: Float32) -> Float32:
        y = matmul(x, self.weights[slot])
        bias = self.weights.get(slot + "_bias")
        y = y if bias is None else y + bias
        for adapter, rows in self.adapted:
            if low := adapter.get(slot):
                y[rows] += matmul(matmul(x[rows], low.down), low.up)
        return y

    def norm(self, slot: str, x: Float32) -> Float32:
        """RMS norm over the last axis, or layer norm; x itself where the model has no such norm."""
        if slot not in self.weights:
            return x
        if self.spec.norm == "layer":
            x = x - x.mean(axis=-1, keepdims=True)
        y = rms(x, self.spec.inner_eps if slot.endswith("_a_norm") else self.spec.norm_eps)
        return np.asarray(y * self.weights[slot] + self.weights.get(slot + "_bias", 0))


def capped(x: Float32, cap: float | None) -> Float32:
    """Values bent to stay below a cap."""
    return x if cap is None else np.asarray(np.tanh(x / np.float32(cap)) * np.float32(cap))


def softmax(x: Float32, others: Float32 | None = None) -> Float32:
    """`others` [..., n] take part in the sum, and are not in the result."""
    every = x if others is None else np.concatenate((x, others), axis=-1)
    weights = np.exp(every - every.max(axis=-1, keepdims=True))
    return np.asarray(weights[..., : x.shape[-1]] / weights.sum(axis=-1, keepdims=True))


def rounded_to_8_bits(x: Float32) -> Float32:
    """Keys or values [T, heads, head size] as a cache of 8 bits gives them back.

    Each KV_GROUP values of a head share a scale, max |x| / 127 in float16; code = round(x / scale), at most 127.
    """
    out = np.empty_like(x)
    for start in range(0, x.shape[-1], KV_GROUP):
        part = x[..., start : start + KV_GROUP]
        top = np.abs(part).max(axis=-1, keepdims=True)
        scale = (top / np.float32(127)).astype(np.float16).astype(np.float32)
        inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
        out[..., start : start + KV_GROUP] = np.clip(np.rint(part * inverse), -127, 127) * scale
    return out


def pooled_rows(hidden: Float32) -> StepResult:
    """The result of a step that samples nothing."""
    rows = len(hidden)
    return StepResult(
        tokens=np.zeros(rows, np.int32),
        logprobs=np.zeros(rows, np.float32),
        top_ids=np.empty((rows, 0), np.int32),
        top_logprobs=np.empty((rows, 0), np.float32),
        ok=np.asarray(np.isfinite(hidden).all(axis=1), np.uint8),
        hidden=hidden,
    )


def attend(
    q: Float32, keys: Float32, values: Float32, position: int, a: Attention, sinks: Float32 | None = None
) -> Float32:
    """A token at a position over the keys and values [n, kv heads, head size] within its window. q: [heads, size]."""
    first = 0 if a.window is None else max(0, position + 1 - a.window)
    k, v = keys[first:].transpose(1, 2, 0), values[first:].transpose(1, 0, 2)
    grouped = q.reshape(a.kv_heads, a.heads // a.kv_heads, a.head_dim)
    scores = capped((grouped @ k) * np.float32(a.scale), a.soft_cap)
    others = None if sinks is None else sinks.reshape(a.kv_heads, -1, 1)
    return np.asarray(softmax(scores, others) @ v).reshape(a.heads, -1)


def rotate(x: Float32, cos: Float32, sin: Float32, rope: Rope) -> Float32:
    """Turn the pairs of each head [T, heads, head size] by the angles of its position [T, rope.dim // 2]."""
    half = rope.dim // 2
    if rope.interleaved:
        first, second = slice(0, rope.dim, 2), slice(1, rope.dim, 2)
    else:
        first, second = slice(0, half), slice(half, rope.dim)
    cos, sin = cos[:, None, :], sin[:, None, :]
    out = x.copy()
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., second] * cos + x[..., first] * sin
    return out
