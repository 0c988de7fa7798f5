"""Rotary position embedding: from the recipe in a model's configuration to final frequencies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from pagoda.arch.fields import Fields
from pagoda.arch.spec import Rope
from pagoda.errors import ModelError
from pagoda.weights.source import Tensor

Float64 = npt.NDArray[np.float64]
SUPPORTED = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "mrope", "proportional")
FREQUENCY_DIVISORS = "rope_freqs.weight"
_MOST_DIM, _MOST_ALPHA = 1 << 16, 1e9  # far above any model's: nothing is computed with what a damaged file says
LONG_DIVISORS, SHORT_DIVISORS = "rope_factors_long.weight", "rope_factors_short.weight"


@dataclass(frozen=True, slots=True)
class Yarn:
    """Parameters of YaRN (arXiv 2309.00071)."""

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


def frequencies(dim: int, base: float) -> Float64:
    """The unscaled angular frequencies, [dim // 2]."""
    if dim > _MOST_DIM:
        raise ModelError(f"the rotary dimension is {dim}; at most {_MOST_DIM} is possible")
    exponents = np.arange(0, dim, 2, dtype=np.float64) / dim
    return np.power(base, -exponents)


def proportional_frequencies(head_dim: int, base: float, share: float) -> Float64:
    """p-RoPE (arXiv 2410.06205): pairs of the whole head, of which the slow ones stand still."""
    freq = frequencies(head_dim, base)
    freq[int(share * head_dim // 2) :] = 0
    return freq


def llama3_frequencies(freq: Float64, factor: float, low: float, high: float, original_length: int) -> Float64:
    """Llama 3.1: long waves are slowed by `factor`, short ones kept, those between blended."""
    waves_in_context = original_length * freq / (2 * math.pi)
    blend = np.clip((waves_in_context - low) / (high - low), 0.0, 1.0)
    return np.asarray((1 - blend) * freq / factor + blend * freq)


def yarn_frequencies(freq: Float64, base: float, yarn: Yarn) -> Float64:
    """YaRN: pairs that turn often in the original context are kept, those that turn seldom slowed by `factor`."""
    dim = 2 * len(freq)

    def pair_that_turns(times: float) -> float:
        return dim * math.log(yarn.original_length / (times * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_that_turns(yarn.beta_fast), pair_that_turns(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    slowed = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
    return np.asarray(freq / yarn.factor * slowed + freq * (1 - slowed))


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def from_config(config: Fields, head_dim: int, max_position: int) -> tuple[Rope, int]:
    """The rope of a config.json in either spelling, and the longest context it was made for.

    Old: `rope_theta` and `rope_scaling`. New (transformers 5): both inside `rope_parameters`.
    """
    recipe = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(recipe, Mapping):
        raise ModelError(f"{config.where}: rope parameters are {recipe!r}, must be a table")
    if any(isinstance(v, Mapping) for v in recipe.values()):
        raise ModelError(f"{config.where}: rope parameters that differ from layer to layer are not supported")
    table = Fields(recipe, f"{config.where} (rope parameters)")
    base = table.number("rope_theta", config.number("rope_theta", 10000.0))
    share = table.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))
    dim = int(head_dim * share)
    kind = recipe.get("rope_type") or recipe.get("type") or "default"
    if kind == "dynamic" and recipe.get("alpha"):  # Hunyuan's: the same for all contexts
        alpha = table.number("alpha")
        if dim <= 2 or alpha > _MOST_ALPHA:
            raise table.error("alpha", f"is {alpha} with a rotary dimension of {dim}, which is not possible")
        base *= alpha ** (dim / (dim - 2))
    freq = frequencies(dim, base)
    attention_factor = 1.0
    match kind:
        case "default" | "dynamic" | "mrope":
            # dynamic changes the frequencies only beyond max_position, the longest context we serve
            pass
        case "linear":
            freq = freq / table.number("factor")
        case "proportional":
            dim, freq = head_dim, proportional_frequencies(head_dim, base, share) / table.number("factor", 1.0)
        case "llama3":
            low, high = table.number("low_freq_factor"), table.number("high_freq_factor")
            if low >= high:
                raise table.error("low_freq_factor", "must be below high_freq_factor")
            original = _original_length(config, table, max_position)
            freq = llama3_frequencies(freq, table.number("factor"), low, high, original)
        case "yarn":
            yarn = _yarn_recipe(config, table, max_position)
            freq = yarn_frequencies(freq, base, yarn)
            attention_factor = _config_attention_factor(table, yarn.factor)
            max_position = max(max_position, int(yarn.original_length * yarn.factor))
        case "longrope" | "su":
            return _longrope(config, table, freq, max_position), max_position
        case _:
            raise ModelError(f"{config.where}: rope type {kind!r} is not supported (supported: {', '.join(SUPPORTED)})")
    cyclic = table.flag("mrope_interleaved", False)
    found = Rope(dim, tuple(freq.tolist()), attention_factor, sections=_sections(table, dim), cyclic=cyclic)
    if table.get("llama_4_scaling_beta"):
        beta, length = table.number("llama_4_scaling_beta"), _original_length(config, table, max_position)
        found = replace(found, query_beta=beta, query_length=length)
    return found, max_position


def _sections(table: Fields, dim: int) -> tuple[int, ...]:
    """The pairs that turn by a token's temporal, height and width position; () where there is one position."""
    sections = table.token_ids("mrope_section")
    if sections and (len(sections) != 3 or sum(sections) != dim // 2):
        raise table.error("mrope_section", f"is {list(sections)}, must be three numbers that add up to {dim // 2}")
    return sections


def _longrope(config: Fields, table: Fields, freq: Float64, max_position: int) -> Rope:
    short, long = (_factors(table, name, len(freq)) for name in ("short_factor", "long_factor"))
    original = _original_length(config, table, max_position)
    factor = table.number("factor", max_position / original)
    default = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return long_rope(freq, short, long, original, table.number("attention_factor", default))


def long_rope(freq: Float64, short: Float64, long: Float64, short_length: int, attention_factor: float) -> Rope:
    """LongRoPE (arXiv 2402.13753): each frequency has a divisor for short contexts and one for long ones."""
    frequencies = ((freq / divisors).tolist() for divisors in (short, long))
    near, far = (tuple(found) for found in frequencies)
    return Rope(2 * len(freq), near, attention_factor, long_inv_freq=far, short_length=short_length)


def _factors(table: Fields, name: str, count: int) -> Float64:
    given = table.get(name)
    if isinstance(given, list | tuple) and len(given) == count:
        if all(isinstance(v, int | float) and math.isfinite(v) and v > 0 for v in given):
            return np.asarray(given, dtype=np.float64)
    raise table.error(name, f"must be a list of {count} numbers above 0")


def _original_length(config: Fields, table: Fields, max_position: int) -> int:
    """A length beside the rope parameters counts before one among them, as in transformers."""
    inside = table.integer("original_max_position_embeddings", max_position)
    return config.integer("original_max_position_embeddings", inside)


def _yarn_recipe(config: Fields, table: Fields, max_position: int) -> Yarn:
    original = _original_length(config, table, max_position)
    return Yarn(
        factor=table.number("factor", max_position / original),
        original_length=original,
        beta_fast=table.number("beta_fast", 32.0),
        beta_slow=table.number("beta_slow", 1.0),
        truncate=table.flag("truncate", True),
    )


def _config_attention_factor(table: Fields, factor: float) -> float:
    if table.get("attention_factor") is not None:
        return table.number("attention_factor")
    if table.get("mscale") and table.get("mscale_all_dim"):
        above = yarn_attention_factor(factor, table.number("mscale"))
        return above / yarn_attention_factor(factor, table.number("mscale_all_dim"))
    return yarn_attention_factor(factor)


def from_gguf(
    metadata: Fields,
    tensors: Mapping[str, Tensor],
    head_dim: int,
    max_position: int,
    interleaved: bool,
    *,
    truncate: bool = True,
) -> tuple[Rope, int]:
    """The rope of a GGUF file: `rope.*` keys, and the tensor of frequency divisors that Llama 3.1 and later carry.

    `truncate` is the one of YaRN, which no key says.
    """
    dim = metadata.integer("rope.dimension_count", head_dim)
    base = metadata.number("rope.freq_base", 10000.0)
    freq = frequencies(dim, base)
    if LONG_DIVISORS in tensors and SHORT_DIVISORS in tensors:
        short, long = (_divisors(tensors[name], len(freq)) for name in (SHORT_DIVISORS, LONG_DIVISORS))
        original = metadata.integer("rope.scaling.original_context_length", max_position)
        rotation = long_rope(freq, short, long, original, metadata.number("rope.scaling.attn_factor", 1.0))
        return replace(rotation, interleaved=interleaved), max_position
    if FREQUENCY_DIVISORS in tensors:
        freq = freq / _divisors(tensors[FREQUENCY_DIVISORS], len(freq))
    # old files write 0 for "none"
    name = "rope.scaling.factor" if metadata.get("rope.scaling.factor") else "rope.scale_linear"
    factor = metadata.number(name, 1.0) if metadata.get(name) else 1.0
    attention_factor = 1.0
    match metadata.get("rope.scaling.type") or "linear":
        case "none":
            pass
        case "linear":
            freq = freq / factor
        case "yarn":
            original = metadata.integer("rope.scaling.original_context_length", max_position)
            fast = metadata.number("rope.scaling.yarn_beta_fast", 32.0)
            slow = metadata.number("rope.scaling.yarn_beta_slow", 1.0)
            freq = yarn_frequencies(freq, base, Yarn(factor, original, fast, slow, truncate))
            attention_factor = yarn_attention_factor(factor) * metadata.number("rope.scaling.attn_factor", 1.0)
            if metadata.get("rope.scaling.yarn_log_multiplier"):  # what it multiplies by is divided out again
                attention_factor = 1.0
            max_position = max(max_position, int(original * factor))
        case kind:
            raise metadata.error("rope.scaling.type", f"is {kind!r}; supported: none, linear, yarn")
    found = Rope(dim, tuple(freq.tolist()), attention_factor, interleaved)
    if metadata.get("attention.temperature_scale"):
        length = metadata.integer("rope.scaling.original_context_length", max_position)
        found = replace(found, query_beta=metadata.number("attention.temperature_scale"), query_length=length)
    return found, max_position


def _divisors(tensor: Tensor, pairs: int) -> Float64:
    if tensor.type != "F32" or tensor.shape != (pairs,):
        raise ModelError(f"tensor {tensor.name} is {tensor.type} {tensor.shape}, must be F32 ({pairs},)")
    return np.frombuffer(tensor.data.tobytes(), dtype="<f4").astype(np.float64)
