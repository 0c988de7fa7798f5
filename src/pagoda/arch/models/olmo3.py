"""OLMo 3: OLMo 2's layers, three of four with a sliding window, whose rope is never scaled. In GGUF it is olmo2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.arch import decoder, rope
from pagoda.arch.fields import MOST_LAYERS, Fields
from pagoda.arch.models import olmo2
from pagoda.arch.spec import ModelSpec
from pagoda.errors import ModelError

DEFAULT_WINDOW, DEFAULT_BASE = 4096, 500000.0

from_gguf = olmo2.from_gguf


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    base = config.get("rope_theta") or DEFAULT_BASE
    both = config.get("rope_parameters")
    if not isinstance(both, Mapping) or "full_attention" not in both:
        both = {"full_attention": config.get("rope_scaling") or both, "sliding_attention": None}
    if not all(recipe is None or isinstance(recipe, Mapping) for recipe in both.values()):
        raise ModelError(f"config.json: rope parameters are {both!r}, must be a table for each kind of attention")
    far, near = ({"rope_theta": base, **(both.get(kind) or {})} for kind in ("full_attention", "sliding_attention"))
    fields = Fields({**config, "rope_parameters": far}, "config.json")
    count = fields.integer("num_hidden_layers", most=MOST_LAYERS)
    sliding = decoder.layer_kinds(fields, [(i + 1) % olmo2.PATTERN != 0 for i in range(count)])
    window = fields.integer("sliding_window", DEFAULT_WINDOW)
    windows = [window if slides else None for slides in sliding]
    spec = decoder.from_config("olmo3", fields, olmo2.parts_of(fields), windows=windows)
    size = spec.layers[0].attention.head_dim
    turned = rope.from_config(Fields({"rope_parameters": near}, "config.json"), size, spec.max_position)[0]
    return olmo2.with_local_rope(spec, sliding, turned)
