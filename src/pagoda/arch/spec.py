"""What a model is made of, as data: read by the planner, the memory arithmetic and every executor.

A new model of known blocks is one file `arch/<model_type>.py` with two functions:
`from_config(config: Mapping) -> ModelSpec` (config.json) and `from_gguf(metadata: Mapping) -> ModelSpec`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from pagoda.arch.latent import Latent
from pagoda.arch.pooled_spec import Pooling
from pagoda.arch.recurrence import Recurrence
from pagoda.arch.vision_spec import Vision


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding (RoFormer, arXiv 2104.09864), already scaled: what an executor needs, no recipe.

    `inv_freq` [dim // 2] are the final angular frequencies (after linear, Llama-3 or YaRN scaling), in float64;
    the angle of position p is `p * inv_freq`. `attention_factor` multiplies cos and sin (YaRN, else 1).
    `interleaved` False rotates pairs (i, i + dim / 2) (Hugging Face, NEOX); True pairs (2i, 2i + 1) (GGUF llama).
    `dim` may be smaller than the head size: the rest of the head is not rotated. `sections` (arXiv 2409.12191, 3.1):
    how many pairs, one after the other, turn by a token's temporal, height and width position; () means by its place.
    With `cyclic` the pairs take these in turn, and by time once the others have theirs.
    `long_inv_freq` (LongRoPE, arXiv 2402.13753) take the place of `inv_freq` where contexts longer than `short_length`
    are served. With `query_beta` b the query at position p is multiplied by 1 + b * ln(1 + p // query_length).
    """

    dim: int
    inv_freq: tuple[float, ...]
    attention_factor: float = 1.0
    interleaved: bool = False
    sections: tuple[int, ...] = ()
    cyclic: bool = False
    long_inv_freq: tuple[float, ...] = ()
    short_length: int = 0
    query_beta: float = 0.0
    query_length: int = 1

    def query_scales(self, positions: npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
        """What the queries at these positions are multiplied by."""
        scales: npt.NDArray[np.float64] = 1 + self.query_beta * np.log1p(positions // self.query_length)
        return scales.astype(np.float32)

    def axes(self) -> npt.NDArray[np.intp]:
        """[dim // 2] which of a token's three positions turns each pair."""
        if self.cyclic:
            axes = np.zeros(self.dim // 2, np.intp)
            for axis in (1, 2):
                axes[axis : 3 * self.sections[axis] : 3] = axis
            return axes
        return np.repeat(np.arange(len(self.sections)), self.sections)

    def tables(self, length: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """cos and sin, float32 [length, dim // 2], for positions 0 .. length - 1."""
        return self._turns(np.outer(np.arange(length, dtype=np.float64), np.asarray(self.inv_freq, dtype=np.float64)))

    def turns(self, three: npt.NDArray[np.int32]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """cos and sin, float32 [T, dim // 2], of tokens with three positions [3, T] each, which may be any."""
        return self._turns(three[self.axes()].T.astype(np.float64) * np.asarray(self.inv_freq, dtype=np.float64))

    def _turns(self, angle: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        cos = (np.cos(angle) * self.attention_factor).astype(np.float32)
        sin = (np.sin(angle) * self.attention_factor).astype(np.float32)
        return cos, sin


@dataclass(frozen=True, slots=True)
class Attention:
    """Grouped-query attention: heads, KV heads, head size, scale of the scores; what is biased or normed."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False  # RMS norm over each head of q and k, before RoPE
    qk_norm_whole: bool = False  # ... over all heads of q, and of k, together
    qk_norm_late: bool = False  # ... over each head, but behind RoPE
    window: int | None = None  # sliding window in tokens; an encoder's goes as far to the other side
    soft_cap: float | None = None  # scaled scores s become soft_cap * tanh(s / soft_cap)
    sinks: bool = False  # of each head a logit beside the scores, that takes a share of the softmax and has no value
    local: bool = False  # turned by the model's `local_rope`
    rope: bool = True  # False: this layer turns nothing
    out_gate: bool = False  # what a head gives is multiplied by the sigmoid of another projection, `q_gate`
    latent: Latent | None = None  # one KV head, whose value is the last part of its key
    v_is_k: bool = False  # the matrix of v is that of k, which checkpoints have once
    v_norm: bool = False  # RMS norm without weights over each head of v
    source: int | None = None  # the layer whose keys and values this one reads; it has none of its own

    @property
    def turned(self) -> int:
        """Values of a key in front of those that are the value too; 0: keys and values are kept apart."""
        return 0 if self.latent is None else self.head_dim - self.latent.rank

    @property
    def kept(self) -> int:
        """Vectors of a head's size that the cache has of a token."""
        if self.source is not None:
            return 0
        return 1 if self.latent is not None else 2 * self.kv_heads

    @property
    def q_width(self) -> int:
        """Outputs of q."""
        each = self.head_dim if self.latent is None else self.latent.nope + self.turned
        return self.heads * each

    @property
    def out_width(self) -> int:
        """Inputs of o."""
        return self.heads * (self.head_dim if self.latent is None else self.latent.value_dim)


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts: a token goes through the `active` of `count` MLPs that its router likes best.

    Their shares are the softmax of the router over all experts, or with `sigmoid` that of each; divided by their sum
    where `normalized`, times `scale`. Every token goes through a `shared` one too, of that size (0: there is none),
    times the sigmoid of a gate of its own where there is a `shared_gate`. What is chosen by (DeepSeek-V3, arXiv
    2412.19437, 2.1.2) are the shares, plus a bias of each expert with `choice_bias`; of `groups` of experts only those
    in the `active_groups` best take part, where a group is as good as its `group_best` best experts together.
    With `own_norms` (Gemma 4) x comes as it is, and the router, the experts and the shared one each norm it for
    themselves; what the experts give together is normed too, and what the shared one gives; and the share of each
    expert is multiplied by a weight of its own.
    """

    count: int
    active: int
    normalized: bool
    shared: int = 0
    shared_gate: bool = True
    sigmoid: bool = False
    scale: float = 1.0
    choice_bias: bool = False
    groups: int = 1
    active_groups: int = 1
    group_best: int = 1
    own_norms: bool = False


@dataclass(frozen=True, slots=True)
class Mlp:
    """Gated MLP: down(act(gate(x)) * up(x)); without the gate: down(act(up(x))). With `experts` each is one of them,
    and a shared one is such too. Size 0: the layer has none.

    `clamped_swiglu` (gpt-oss) is a function of both: g * sigmoid(1.702 g) * (u + 1), where g is the gate, at most 7,
    and u is up, within -7 and 7. `bias`: of all products, and of the router; `down_bias`: of the last one
    alone.
    """

    size: int
    activation: str = "silu"
    bias: bool = False
    gated: bool = True
    experts: Experts | None = None
    down_bias: bool = False

    @property
    def width(self) -> int:
        """Values of a token between up and down."""
        return self.size if self.experts is None else self.size * self.experts.active + self.experts.shared


Norms = Literal["before", "second", "behind", "both", "one", "beside", "sum"]


@dataclass(frozen=True, slots=True)
class Layer:
    """Decoder layer: x += attention(norm(x)); x += mlp(norm(x)). `norms` says where these norms are.

    Before each half as above, or the second alone; or behind it, x += norm(attention(x)); or both,
    x += norm(attention(norm(x))); or there is one in front of both halves, x += attention(norm(x)) + mlp(norm(x)); or
    beside each other each half has its own in that sum.
    In most encoders they follow the sum: x = norm(x + attention(x)); x = norm(x + mlp(x)).
    With `delta`, a delta net, a short convolution or a state space, the layer has that in place of its attention, and
    `attention` is the one of the model's other layers. What a `scaled` layer gives is multiplied by a weight.
    """

    attention: Attention
    mlp: Mlp
    norms: Norms = "before"
    delta: Recurrence | None = None
    scaled: bool = False


@dataclass(frozen=True, slots=True)
class Encoder:
    """What makes an encoder of a model (BERT, arXiv 1810.04805): every token attends to all tokens of its request.

    The token at position p takes row `first_position + p` of the table of positions, if there is one; a pair of texts
    has the row 0 or 1 of the `token_types` table (a table of one row serves both; 0: there is none). The sum of these
    and of the word goes through a norm of its own where there is an `embed_norm`, what comes out of the last layer
    where there is a `final_norm`.
    """

    first_position: int = 0
    token_types: int = 0
    embed_norm: bool = True
    final_norm: bool = False


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A transformer: a decoder, or with `encoder` an encoder. `tied` heads reuse the embedding.

    A layer norm has a bias where `norm_bias` says so. `embed_scale` multiplies the embeddings of tokens. `local_rope`
    turns the layers whose attention is `local`. What the head gives, with its bias where
    there is one, is multiplied by `logit_scale`; with `logit_soft_cap` logits x become cap * tanh(x / cap).
    `positions` are the rows of a table of learned positions, which are added to the embedding in place of RoPE (`rope`
    is empty then); 0: there is none. One with `pooling` gives a vector or scores for each request, and no tokens; it
    has no head. With `layer_embed` n each layer has n values of each token for itself (per-layer embeddings, Gemma 4):
    what a product makes of the embedding, normed, plus the token's row of a second table, the sum over sqrt(2). Such a
    layer ends with x += norm(out(gelu(gate(x)) * these values)).
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    norm_eps: float
    tied: bool
    max_position: int
    rope: Rope
    layers: tuple[Layer, ...]
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    encoder: Encoder | None = None
    pooling: Pooling | None = None
    vision: Vision | None = None
    norm: Literal["rms", "layer"] = "rms"
    positions: int = 0
    embed_scale: float = 1.0
    local_rope: Rope | None = None
    logit_soft_cap: float | None = None
    norm_bias: bool = True
    head_bias: bool = False
    logit_scale: float = 1.0
    latent_eps: float | None = None  # of the norms inside latent attention, where it is not `norm_eps`
    layer_embed: int = 0

    @property
    def ropes(self) -> tuple[Rope, ...]:
        return (self.rope,) if self.local_rope is None else (self.rope, self.local_rope)

    @property
    def inner_eps(self) -> float:
        """Of the norms inside latent attention."""
        return self.norm_eps if self.latent_eps is None else self.latent_eps

    @property
    def recurrent(self) -> bool:
        """Whether a request has a state that goes from token to token, and cannot be entered in the middle."""
        return any(layer.delta is not None for layer in self.layers)

    def served(self, max_model_len: int) -> ModelSpec:
        """The model as it is run for contexts up to this length."""
        rope = self.rope
        if not rope.long_inv_freq or max_model_len <= rope.short_length:
            return self
        return replace(self, rope=replace(rope, inv_freq=rope.long_inv_freq))

    def slots(self) -> dict[str, tuple[int, ...]]:
        """Every tensor the model needs, by slot name, with its shape (numpy order, matrices [out, in]).

        Slots: `embed`, `norm`, `head` (absent if tied), `head_bias` and per layer `layers.{i}.` + `attn_norm`, `q`,
        `k`, `v`, `o`, `q_bias`, `k_bias`, `v_bias`, `o_bias`, `q_norm`, `k_norm`, `mlp_norm`, `gate`, `up`, `down`,
        `gate_bias`, `up_bias`, `down_bias`; with experts `router`, `gate_experts`, `up_experts`, `down_experts` in
        place of the last, the experts on the first axis, of a shared one `gate_shared`, `up_shared`, `down_shared` and
        its gate `router_shared`, and `router_choice_bias`; with biases also `router_bias`, `gate_experts_bias`, ... .
        Heads with sinks have `sinks`, those with an output gate `q_gate`; layers with a `delta` have its slots in place
        of an attention's, as those with a `latent` have.
        The norms behind the halves of a layer are `attn_post_norm` and `mlp_post_norm`, its weight is `scale`. Experts
        with norms of their own have `router_norm`, `router_scale`, `experts_norm`, `experts_post_norm`, `shared_norm`,
        `shared_post_norm`. Values for each layer come from `layer_embed`, `layer_project` and `layer_project_norm`, and
        in a layer go through `own_gate`, `own_out` and `own_post_norm`. Learned `positions`
        are a table, layer norms may have a bias, encoders the table `types` and an
        `embed_norm`; pooled models `project.{i}`, or with labels `score`, and `pool_dense` and `pool_norm` in front of
        it where they have it. Models that see have the slots of their encoder behind
        `vision.`: `patch`, `merge_norm`, `merge_up`, `merge_down` and per layer `layers.{i}.` + `attn_norm`, `qkv`,
        `o`, `mlp_norm`, `gate`, `up`, `down`; all products but the first have a bias, and so have layer norms.
        """
        h = self.hidden_size
        out: dict[str, tuple[int, ...]] = {"embed": (self.vocab_size, h)}
        biased = self.norm == "layer" and self.norm_bias
        for name in _end_norms(self.encoder):
            out |= {name: (h,), f"{name}_bias": (h,)} if biased else {name: (h,)}
        if self.layer_embed:
            width = len(self.layers) * self.layer_embed
            out |= {"layer_embed": (self.vocab_size, width), "layer_project": (width, h)}
            out["layer_project_norm"] = (self.layer_embed,)
        if self.positions:
            out["positions"] = (self.positions, h)
        if self.encoder is not None and self.encoder.token_types:
            out["types"] = (self.encoder.token_types, h)
        if not self.tied and (self.pooling is None or self.pooling.tokens is not None):
            out["head"] = (self.vocab_size, h)
        if self.head_bias and self.pooling is None:
            out["head_bias"] = (self.vocab_size,)
        if self.pooling is not None:
            out |= self.pooling.slots(h, biased)
        for i, layer in enumerate(self.layers):
            slots = _layer_slots(layer, h)
            if n := self.layer_embed:
                slots |= {"own_gate": (n, h), "own_out": (h, n), "own_post_norm": (h,)}
            out.update({f"layers.{i}.{name}": shape for name, shape in slots.items()})
            if biased:
                out |= {f"layers.{i}.{name}_bias": (h,) for name in _norms(layer)}
        if self.vision is not None:
            out |= {f"vision.{name}": shape for name, shape in self.vision.slots(h).items()}
        return out


def _end_norms(encoder: Encoder | None) -> tuple[str, ...]:
    """The norms in front of all layers, and behind them."""
    if encoder is None:
        return ("norm",)
    return ("embed_norm",) * encoder.embed_norm + ("norm",) * encoder.final_norm


def _norms(layer: Layer) -> tuple[str, ...]:
    before, behind = ("attn_norm", "mlp_norm"), ("attn_post_norm", "mlp_post_norm")
    others = {"behind": behind, "both": before + behind, "one": before[:1], "second": before[1:]}
    own = not layer.mlp.size or (layer.mlp.experts is not None and layer.mlp.experts.own_norms)
    return tuple(name for name in others.get(layer.norms, before) if not (own and name == "mlp_norm"))


def _layer_slots(layer: Layer, hidden: int) -> dict[str, tuple[int, ...]]:
    a, m = layer.attention, layer.mlp
    q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
    out: dict[str, tuple[int, ...]] = dict.fromkeys(_norms(layer), (hidden,))
    if layer.scaled:
        out["scale"] = (1,)
    if layer.delta is not None:
        return out | layer.delta.slots(hidden) | _mlp_slots(m, hidden)
    if a.latent is not None:
        return out | a.latent.slots(hidden, a.heads, a.turned) | _mlp_slots(m, hidden)
    out |= {"q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, q)}
    if a.out_gate:
        out["q_gate"] = (q, hidden)
    if a.qkv_bias:
        out |= {"q_bias": (q,), "k_bias": (kv,), "v_bias": (kv,)}
    if a.out_bias:
        out["o_bias"] = (hidden,)
    if a.qk_norm:
        out |= {"q_norm": (q if a.qk_norm_whole else a.head_dim,), "k_norm": (kv if a.qk_norm_whole else a.head_dim,)}
    if a.sinks:
        out["sinks"] = (a.heads,)
    if a.source is not None:
        out = {name: shape for name, shape in out.items() if name not in ("k", "v", "k_bias", "v_bias", "k_norm")}
    return out | _mlp_slots(m, hidden)


def _mlp_slots(m: Mlp, hidden: int) -> dict[str, tuple[int, ...]]:
    out: dict[str, tuple[int, ...]] = {}
    if m.experts is not None:
        e = m.experts.count
        out |= {"router": (e, hidden)} | ({"gate_experts": (e, m.size, hidden)} if m.gated else {})
        out |= {"up_experts": (e, m.size, hidden), "down_experts": (e, hidden, m.size)}
        if m.bias:
            out |= {"router_bias": (e,), "gate_experts_bias": (e, m.size), "up_experts_bias": (e, m.size)}
            out["down_experts_bias"] = (e, hidden)
        if s := m.experts.shared:
            out |= {f"{part}_shared": (s, hidden) for part in (("gate", "up") if m.gated else ("up",))}
            out["down_shared"] = (hidden, s)
            if m.experts.shared_gate:
                out["router_shared"] = (hidden,)
        if m.experts.choice_bias:
            out["router_choice_bias"] = (e,)
        if m.experts.own_norms:
            names = ("router_norm", "experts_norm", "experts_post_norm", "shared_norm", "shared_post_norm")
            out |= dict.fromkeys(names, (hidden,)) | {"router_scale": (e,)}
        return out
    out |= {"gate": (m.size, hidden)} if m.gated else {}
    out |= {"up": (m.size, hidden), "down": (hidden, m.size)} if m.size else {}
    if m.bias:
        out |= {"gate_bias": (m.size,)} if m.gated else {}
        out["up_bias"] = (m.size,)
    if m.bias or m.down_bias:
        out["down_bias"] = (hidden,)
    return out
