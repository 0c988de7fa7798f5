"""The kinds of attention in the layers of a model: their heads, and where the cache has the keys of a layer."""

from __future__ import annotations

from dataclasses import replace

from pagoda.arch.spec import Attention, Layer, ModelSpec
from pagoda.backend.cpu.records import Heads
from pagoda.errors import ModelError


def main_attention(spec: ModelSpec) -> Attention:
    """That of layers which are turned by the model's own rope."""
    return next((layer.attention for layer in spec.layers if not layer.attention.local), spec.layers[0].attention)


def local_attention(spec: ModelSpec) -> Attention | None:
    """That of layers with a rope of their own, where their heads are not as the others'."""
    main, own = main_attention(spec), next((layer.attention for layer in spec.layers if layer.attention.local), None)
    if own is None or spec.local_rope is None:
        return None
    alike = (own.kv_heads, own.head_dim, spec.local_rope.dim) == (main.kv_heads, main.head_dim, spec.rope.dim)
    return None if alike else own


def cached_layers(spec: ModelSpec, *, local: bool) -> int:
    """Layers of a kind that keep keys and values."""
    return len(_kept(spec, local and local_attention(spec) is not None))


def place_of(spec: ModelSpec, i: int) -> int:
    """Where the cache has the keys that layer i reads, among those of its kind; of a delta net where its states are."""
    layer = spec.layers[i]
    if layer.delta is not None:
        return sum(other.delta is not None for other in spec.layers[:i])
    a = layer.attention
    return _kept(spec, a.local and local_attention(spec) is not None).index(i if a.source is None else a.source)


def _kept(spec: ModelSpec, local: bool) -> list[int]:
    apart = local_attention(spec) is not None

    def keeps(layer: Layer) -> bool:
        a = layer.attention
        return layer.delta is None and a.source is None and (not apart or a.local == local)

    return [i for i, layer in enumerate(spec.layers) if keeps(layer)]


def local_heads(spec: ModelSpec) -> Heads:
    a = local_attention(spec)
    if a is None or spec.local_rope is None:
        return Heads()
    return Heads(cached_layers(spec, local=True), a.kv_heads, a.head_dim, spec.local_rope.dim)


def check_kinds(spec: ModelSpec) -> None:
    """ModelError where the layers of a kind are not all alike."""
    attentions = {replace(layer.attention, window=None, rope=True, source=None) for layer in spec.layers}
    one_of_each = len({a.local for a in attentions}) == len(attentions)
    if not one_of_each or len({a.heads for a in attentions}) > 1:
        raise ModelError("the CPU backend needs all layers of one shape", remedy="Try --device reference")
    if len({rope.interleaved for rope in spec.ropes}) > 1:
        raise ModelError("the CPU backend needs ropes of one shape in all layers", remedy="Try --device reference")
    for a in attentions:
        if a.head_dim % 16 or a.head_dim > 1024:
            raise ModelError(
                f"the CPU backend needs a head size that is a multiple of 16 up to 1024, not {a.head_dim}",
                remedy="Try --device reference",
            )
