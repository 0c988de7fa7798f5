"""What models that see share: the language model inside their config.json, and the fields of the encoder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pagoda.arch import decoder
from pagoda.arch.fields import MOST_LAYERS, Fields
from pagoda.arch.spec import ModelSpec
from pagoda.arch.vision_spec import Vision
from pagoda.errors import ModelError

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
_OF_BOTH = ("eos_token_id", "bos_token_id", "rope_theta")
TIMES, LATER_TIMES = "{:.0f}", "{:.1f} seconds"
"""Of the frames of GLM's videos, up to 4.5V and since."""
_RECIPES = ("rope_parameters", "rope_scaling")


def language_model(model_type: str, config: Mapping[str, Any]) -> ModelSpec:
    """Qwen2's layers, turned by three positions."""
    fields = Fields(language(config, sections=(16, 24, 24), theta=1e6), "config.json")
    parts = decoder.Parts(qkv_bias=True)
    return decoder.from_config(model_type, fields, parts, windows=decoder.sliding_windows(fields))


def language(
    config: Mapping[str, Any], *, sections: Sequence[int], theta: float, cyclic: bool = False
) -> dict[str, Any]:
    """The settings of the language model, which stand beside the encoder's or, in newer files, in `text_config`."""
    inner = config.get("text_config")
    inner = inner if isinstance(inner, Mapping) else config
    found = {name: config[name] for name in _OF_BOTH if config.get(name) is not None} | dict(inner)
    found["tie_word_embeddings"] = bool(config.get("tie_word_embeddings") or inner.get("tie_word_embeddings"))
    recipe: Any = next((found[name] for name in _RECIPES if found.get(name)), {})
    if isinstance(recipe, Mapping):
        found["rope_parameters"] = {
            "mrope_section": sections,
            "rope_theta": found.get("rope_theta") or theta,
            **recipe,
            "mrope_interleaved": cyclic,
        }
    return found


def sees(config: Mapping[str, Any]) -> bool:
    """Whether there is an encoder."""
    return isinstance(config.get("vision_config"), Mapping) and bool(config["vision_config"])


def check_activation(fields: Fields, wanted: str) -> None:
    activation = fields.get("hidden_act") or wanted
    if activation != wanted:
        raise fields.error("hidden_act", f"is {activation!r}; this encoder is supported with {wanted} only")


def check_same(fields: Fields, wanted: Mapping[str, Any]) -> None:
    """Refuse what a file asks for that is not as we have it."""
    for name, value in wanted.items():
        given = fields.get(name)
        if given is not None and given != value:
            raise fields.error(name, f"is {given!r}; this encoder is supported with {value!r} only")


def square(fields: Fields, name: str, default: int) -> int:
    """A number of pixels that may be given for both directions."""
    value = fields.get(name)
    if isinstance(value, list | tuple) and len(set(value)) == 1:
        return Fields({name: value[0]}, fields.where).integer(name)
    return fields.integer(name, default)


def encoder_fields(config: Mapping[str, Any]) -> Fields:
    table = config.get("vision_config")
    if not isinstance(table, Mapping):
        raise ModelError("config.json: vision_config is missing, or no table")
    fields = Fields(table, "config.json (vision_config)")
    for name in ("in_channels", "in_chans", "num_channels"):
        if fields.integer(name, 3) != 3:
            raise fields.error(name, f"is {fields.get(name)}; pictures have 3 channels")
    return fields


def with_encoder(spec: ModelSpec, vision: Vision, output_size: int) -> ModelSpec:
    """The language model that takes what the encoder gives."""
    if output_size != spec.hidden_size:
        raise ModelError(
            f"config.json: the encoder gives vectors of {output_size}, the language model takes {spec.hidden_size}"
        )
    if vision.hidden_size % (vision.heads * (4 if vision.rope else 1)):
        raise ModelError(f"config.json: {vision.heads} heads of a row and a column do not fit {vision.hidden_size}")
    if vision.side % vision.merge_size:
        raise ModelError(f"config.json: {vision.side} patches of a row do not make whole tokens")
    if vision.window_size % (vision.patch_size * vision.merge_size):
        raise ModelError(f"config.json: window_size {vision.window_size} does not hold whole tokens")
    if len(vision.deep_layers) >= len(spec.layers):
        raise ModelError(f"config.json: {len(spec.layers)} layers are too few for {vision.deep_layers} to be added to")
    return replace(spec, vision=vision)


def shape(fields: Fields, *, patch_size: int = 14, depth: int = 32) -> dict[str, Any]:
    """The fields that all encoders name alike."""
    return {
        "patch_size": fields.integer("patch_size", patch_size),
        "temporal_patch_size": fields.integer("temporal_patch_size", 2),
        "merge_size": fields.integer("spatial_merge_size", 2),
        "heads": fields.integer("num_heads", 16),
        "depth": fields.integer("depth", depth, most=MOST_LAYERS),
    }


def image_tokens(config: Mapping[str, Any]) -> dict[str, Any]:
    """The ids of the tokens that images and videos take the places of."""
    fields = Fields(config, "config.json")
    return {
        "image_token_id": fields.integer("image_token_id", 151655, least=0),
        "video_token_id": fields.integer("video_token_id", 151656, least=0),
    }


def with_pixels(spec: ModelSpec, path: str) -> ModelSpec:
    """The spec with the mean and spread of pixels that the model's preprocessor_config.json names."""
    if spec.vision is None:
        return spec
    place = Path(path)
    folder = place if place.is_dir() else place.parent
    inner = _json(folder / PROCESSOR).get("image_processor")  # newer folders have it in place of the other
    table = {**(inner if isinstance(inner, Mapping) else {}), **_json(folder / PREPROCESSOR)}
    mean = _three(table, "image_mean", spec.vision.mean, folder)
    vision = replace(spec.vision, mean=mean, std=_three(table, "image_std", spec.vision.std, folder))
    if vision.names == "glm" and _of_glm_4_6(folder):
        vision = replace(vision, time_format=LATER_TIMES)
    return replace(spec, vision=vision)


def _of_glm_4_6(folder: Path) -> bool:
    """Whether times are written as GLM-4.6V's processor does: its config.json is called as that of GLM-4.5V."""
    tables = (_json(folder / PROCESSOR), _json(folder / PREPROCESSOR))
    said = [table.get(name) for table in tables for name in ("processor_class", "image_processor_type")]
    return any(isinstance(name, str) and name.startswith("Glm46V") for name in said)


def _json(file: Path) -> Mapping[str, Any]:
    """What a file holds; nothing where there is none."""
    try:
        table = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"cannot read {file}", remedy="Download it again") from error
    if not isinstance(table, Mapping):
        raise ModelError(f"{file} is not a JSON object", remedy="Download it again")
    return table


def _three(
    table: Mapping[str, Any], name: str, default: tuple[float, float, float], folder: Path
) -> tuple[float, float, float]:
    value = table.get(name)
    if value is None:
        return default
    if (
        not isinstance(value, list)
        or len(value) != 3
        or not all(type(v) in (int, float) and 0 <= v <= 1 for v in value)
    ):
        raise ModelError(f"{folder / PREPROCESSOR}: {name} is {value!r}, must be three numbers from 0 to 1")
    if name == "image_std" and not all(value):
        raise ModelError(f"{folder / PREPROCESSOR}: {name} is {value!r}, must be above 0")
    return float(value[0]), float(value[1]), float(value[2])
