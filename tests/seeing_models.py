"""Tiny random models that see, of each family beside Qwen's VL: transformers' own, a prompt, what both sides take."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from checkpoints import with_random_weights
from reference_plans import Feed, make_plan
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from pagoda.arch.mrope import rope_positions
from pagoda.arch.registry import load_spec
from pagoda.arch.spec import ModelSpec
from pagoda.arch.vision_spec import Vision
from pagoda.backend.base import Limits
from pagoda.backend.cpu.executor import CpuExecutor
from pagoda.backend.reference import ReferenceExecutor
from pagoda.backend.reference_vision import ReferenceVision
from pagoda.backend.torch.executor import TorchCpuExecutor
from pagoda.backend.vision import patches
from pagoda.types import Float32, Image, PlannedImage, StepPlan
from pagoda.weights.open import open_source

VOCAB, IMAGE, VIDEO, START, STOP = 288, 7, 8, 9, 10
BREAK_TOKENS = (12, 13)
LIMITS = Limits(max_model_len=256, max_num_seqs=4, max_num_batched_tokens=256, num_blocks=40)
RNG = np.random.default_rng(5)
DEVICES: Any = {"reference": ReferenceVision, "cpu": CpuExecutor, "torch": TorchCpuExecutor}
BOUNDS = {"reference": 1e-4, "cpu": 3e-3, "torch": 1e-4}  # the CPU's cache is of 16 bits
TEXT: list[int] = RNG.integers(20, VOCAB, 200).tolist()
TABLES = ((9, 2, 5, 3, 30, 0, 7, 11, 12, 20), (8, 1, 4, 6, 10, 13, 14, 15, 16, 17))

_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
}
_HYBRID = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 16,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [3, 3, 2],
        "mrope_interleaved": True,
    },
}
_EYES_OF_QWEN = {
    "depth": 2,
    "hidden_size": 96,
    "intermediate_size": 100,
    "num_heads": 4,
    "patch_size": 14,
    "out_hidden_size": 64,
    "num_position_embeddings": 25,
}


def qwen3_5(**changes: Any) -> Any:
    ids = {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": START,
        "vision_end_token_id": STOP,
    }
    config = transformers.Qwen3_5Config(
        text_config={**_TEXT, **_HYBRID, **changes}, vision_config=_EYES_OF_QWEN, tie_word_embeddings=True, **ids
    )
    return transformers.Qwen3_5ForConditionalGeneration(config)


def gemma3(**changes: Any) -> Any:
    eyes = {"hidden_size": 96, "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**_TEXT, "query_pre_attn_scalar": 32, "sliding_window": 40, "sliding_window_pattern": 2, **changes}
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config={"model_type": "siglip_vision_model", **eyes, "image_size": 8 * 14, "patch_size": 14},
        mm_tokens_per_image=16,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=STOP,
        tie_word_embeddings=True,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def mistral3(**changes: Any) -> Any:
    eyes = {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Mistral3Config(
        text_config={**_TEXT, "model_type": "ministral3", "tie_word_embeddings": False, **changes},
        vision_config={"model_type": "pixtral", **eyes, "patch_size": 14, "image_size": 14 * 12, "head_dim": 24},
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )
    return transformers.Mistral3ForConditionalGeneration(config)


_EYES = {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def internvl(**changes: Any) -> Any:
    eyes = {**_EYES, "image_size": [56, 56], "patch_size": [14, 14], "attention_bias": True}
    config = transformers.InternVLConfig(
        text_config={**_TEXT, "model_type": "qwen3", **changes}, vision_config=eyes, image_token_id=IMAGE
    )
    return transformers.InternVLForConditionalGeneration(config)


def idefics3(**changes: Any) -> Any:
    eyes = {**_EYES, "image_size": 96, "patch_size": 16}
    config = transformers.Idefics3Config(
        text_config={**_TEXT, "model_type": "llama", **changes},
        vision_config=eyes,
        image_token_id=IMAGE,
        scale_factor=3,
        tie_word_embeddings=True,
    )
    return transformers.Idefics3ForConditionalGeneration(config)


def llava(**changes: Any) -> Any:
    eyes = {**_EYES, "num_hidden_layers": 3, "image_size": 56, "patch_size": 14}
    config = transformers.LlavaConfig(
        text_config={**_TEXT, "model_type": "llama", "tie_word_embeddings": False, **changes},
        vision_config={"model_type": "clip_vision_model", **eyes},
        image_token_index=IMAGE,
    )
    return transformers.LlavaForConditionalGeneration(config)


def glm4v(**changes: Any) -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [1, 2, 1]}
    eyes = {"depth": 2, "hidden_size": 96, "num_heads": 4, "patch_size": 14, "image_size": 70, "out_hidden_size": 64}
    text = {**_TEXT, "head_dim": 16, "rope_parameters": rope, "tie_word_embeddings": False, **changes}
    config = transformers.Glm4vConfig(
        text_config=text,
        vision_config={**eyes, "intermediate_size": 128},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=START,
        image_end_token_id=STOP,
        tie_word_embeddings=False,
    )
    return transformers.Glm4vForConditionalGeneration(config)


def glm4v_moe(**changes: Any) -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [1, 2, 1]}
    eyes = {"depth": 1, "hidden_size": 96, "num_heads": 4, "patch_size": 14, "image_size": 70, "out_hidden_size": 64}
    experts = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 32}
    text = {**_TEXT, **experts, "head_dim": 16, "rope_parameters": rope, "tie_word_embeddings": False, **changes}
    config = transformers.Glm4vMoeConfig(
        text_config={**text, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
        vision_config={**eyes, "intermediate_size": 128},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        tie_word_embeddings=False,
    )
    return transformers.Glm4vMoeForConditionalGeneration(config)


MODELS = {
    "glm4v": glm4v,
    "qwen3_5": qwen3_5,
    "gemma3": gemma3,
    "mistral3": mistral3,
    "internvl": internvl,
    "idefics3": idefics3,
    "llava": llava,
}
OTHERS = {"glm4v_moe": glm4v_moe}
SHAPES = {"gemma3": ((8, 8),) * 2, "internvl": ((4, 4),) * 2, "idefics3": ((6, 6),) * 2, "llava": ((4, 4),) * 2}


def write(folder: Path, kind: str, **changes: Any) -> Any:
    """Write the model of a kind as safetensors; returns transformers' own."""
    model = with_random_weights((MODELS | OTHERS)[kind](**changes), len(kind))
    if kind == "gemma3":  # whose embeddings, made larger, would outweigh all that layers add
        with torch.no_grad():
            model.model.language_model.embed_tokens.weight.mul_(0.15)
    model.config._attn_implementation = "eager"
    model.save_pretrained(folder)
    return model


_NAMES = {7: "<image>", START: "<start_of_image>", STOP: "<end_of_image>", 12: "[IMG_BREAK]", 13: "[IMG_END]"}
_OWN_NAMES = {
    "internvl": {IMAGE: "<IMG_CONTEXT>", VIDEO: "<video>", START: "<img>", STOP: "</img>"},
    "idefics3": {START: "<fake_token_around_image>", STOP: "<global-img>"},
    "glm4v": {IMAGE: "<|image|>", START: "<|begin_of_image|>", STOP: "<|end_of_image|>"},
}
_SHOWN = {"gemma3": "<start_of_image>", "mistral3": "<image>", "qwen3_5": "<start_of_image><image><end_of_image>"}
_SHOWN |= {
    "internvl": "<IMG_CONTEXT>\n",
    "idefics3": "<image>",
    "glm4v": "<|begin_of_image|><|image|><|end_of_image|>",
    "llava": "<image>\n",
}
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] in ['image', 'image_url'] %}SHOWN"
    "{% elif part['type'] == 'video' %}<video>{% elif part['type'] == 'text' %}{{ part['text'] | trim }}"
    "{% endif %}{% endfor %}{% endif %}\n{% endfor %}{% if add_generation_prompt %}model\n{% endif %}"
)


def write_texts(folder: Path, kind: str) -> None:
    """A tokenizer of bytes, and a chat template that shows a picture as the family's does."""
    names = _NAMES | _OWN_NAMES.get(kind, {})
    special = [names.get(i, f"<unused{i}>") for i in range(20)]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate([*special, *letters])}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens([AddedToken(text, special=True) for text in special])
    made.save(str(folder / "tokenizer.json"))
    table = {"chat_template": TEMPLATE.replace("SHOWN", _SHOWN[kind]), "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(table))


def spec_of(folder: Path) -> ModelSpec:
    return load_spec(open_source(str(folder)))


def vision_of(folder: Path) -> Vision:
    vision = spec_of(folder).vision
    assert vision is not None
    return vision


def load(folder: Path, device: str, **limits: Any) -> Any:
    source = open_source(str(folder))
    return DEVICES[device].load(load_spec(source), source, replace(LIMITS, **limits))


def logits(executor: Any, plan: StepPlan) -> Float32:
    """Of the rows of a plan, as the executor computes them."""
    if isinstance(executor, ReferenceExecutor):
        return executor.logits(plan)
    if isinstance(executor, CpuExecutor):
        out = np.zeros((len(plan.rows), VOCAB), np.float32)
        executor.run(plan, out)
        return out
    found: list[torch.Tensor] = []
    head = executor.decoder.head
    executor.decoder.head = lambda hidden: found.append(head(hidden)) or found[-1]  # type: ignore[func-returns-value]
    executor.launch(plan).wait()
    executor.decoder.head = head
    return torch.cat(found).float().numpy()


def picture(vision: Vision, rows: int, columns: int, seed: int = 0) -> Image:
    """Random pixels of so many patches."""
    shape = (1, rows * vision.patch_size, columns * vision.patch_size, 3)
    pixels = np.random.default_rng([seed, rows, columns]).integers(0, 256, shape, dtype=np.uint8).tobytes()
    grid = (1, rows, columns)
    return Image(
        start=0,
        tokens=vision.tokens(grid),
        grid=grid,
        pixels=pixels,
        digest=hashlib.blake2b(pixels, digest_size=16).digest(),
    )


def pictures(kind: str, vision: Vision) -> list[Image]:
    return [picture(vision, *shape, i) for i, shape in enumerate(SHAPES.get(kind, ((4, 10), (6, 4))))]


def inputs(kind: str, vision: Vision, tokens: Sequence[int], images: Sequence[Image]) -> dict[str, Any]:
    """What transformers' model takes."""
    made: dict[str, Any] = {"input_ids": torch.tensor([tokens])}
    kinds = torch.tensor([[int(token == vision.image_token_id) for token in tokens]], dtype=torch.int32)
    if kind in ("qwen3_5", "glm4v", "glm4v_moe"):
        flat = [torch.from_numpy(patches(image, vision)) for image in images]
        grids = torch.tensor([image.grid for image in images])
        return {**made, "pixel_values": torch.cat(flat), "image_grid_thw": grids, "mm_token_type_ids": kinds}
    values = [pixel_values(vision, image) for image in images]
    if kind == "gemma3":
        return {**made, "pixel_values": torch.cat(values), "token_type_ids": kinds}
    if kind == "idefics3":
        return {**made, "pixel_values": torch.cat(values)[None]}
    if kind in ("internvl", "llava"):
        return {**made, "pixel_values": torch.cat(values)}
    sizes = [value.shape[2:] for value in values]
    high, wide = (max(size[axis] for size in sizes) for axis in (0, 1))
    padded = [F.pad(v, (0, wide - v.shape[3], 0, high - v.shape[2])) for v in values]
    return {**made, "pixel_values": torch.cat(padded), "image_sizes": torch.tensor([list(size) for size in sizes])}


def prompt(vision: Vision, images: Sequence[Image]) -> tuple[list[int], list[Image]]:
    """Text, a picture, text, a picture, ..., text."""
    tokens, placed = TEXT[:5], []
    for i, image in enumerate(images):
        placed.append(Image(**{**{n: getattr(image, n) for n in image.__struct_fields__}, "start": len(tokens)}))
        tokens = [*tokens, *vision.placeholders(image.grid), *TEXT[8 + 3 * i : 13 + 5 * i]]
    return tokens, placed


def step(
    spec: ModelSpec, tokens: Sequence[int], images: Sequence[Image], first: int = 0, last: int = 0, table: int = 0
) -> StepPlan:
    """The step that feeds tokens first:last, and wants the logits of all."""
    last = last or len(tokens)
    assert spec.vision is not None
    feed = Feed(tokens[first:last], first, TABLES[table], [(i, -1, -1) for i in range(last - first)])
    made = make_plan([feed], VOCAB)
    planned = []
    for image in images:
        begin, end = max(image.start, first), min(image.start + image.tokens, last)
        if begin < end:
            planned.append(PlannedImage(image, begin - first, begin - image.start, end - begin))
    made = replace(made, images=tuple(planned))
    if spec.vision.both_ways:
        last = np.arange(first, last, dtype=np.int32)
        for part in planned:
            last[part.row : part.row + part.count] = part.image.start + part.image.tokens - 1
        made = replace(made, last_seen=last)
    if not spec.rope.sections:
        return made
    positions, _ = rope_positions(len(tokens), images, spec.vision)
    return replace(made, rope_positions=np.ascontiguousarray(positions[:, first:last]))


def steps(spec: ModelSpec, tokens: Sequence[int], images: Sequence[Image], cuts: Sequence[int]) -> list[StepPlan]:
    return [step(spec, tokens, images, a, b) for a, b in zip([0, *cuts], [*cuts, len(tokens)], strict=True)]


def pixel_values(vision: Vision, image: Image) -> torch.Tensor:
    """[1, 3, rows, columns], normalized, as most of transformers' encoders take them."""
    _, rows, columns = image.grid
    shape = (rows * vision.patch_size, columns * vision.patch_size, 3)
    pixels = np.frombuffer(image.pixels, np.uint8).reshape(shape).astype(np.float32) / 255
    return torch.from_numpy((pixels - np.float32(vision.mean)) / np.float32(vision.std)).permute(2, 0, 1)[None]


def worst(ours: Float32, theirs: Float32) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
