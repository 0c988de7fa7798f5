"""Pictures cut into tiles, or at their edges: pixels and prompts against transformers' own processors."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import seeing_models
import torch
import transformers
from PIL import Image as pil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.internvl.processing_internvl import InternVLProcessor

from pagoda import LLM, SamplingParams
from pagoda.errors import BadRequest, ConfigError
from pagoda.media.decode import pixels_of
from pagoda.media.place import image_of, place
from pagoda.media.shown import idefics, internvl
from pagoda.media.size import Sizing, find_sizing
from pagoda.types import Float32, Image

SIDE, IMAGE, VIDEO = 28, 7, 8
SIZES = ((100, 75), (33, 201), (28, 28), (57, 56), (640, 31), (5, 6), (300, 299))
PLAIN: dict[str, Any] = {"do_rescale": False, "do_normalize": False, "return_tensors": "np"}


def picture(width: int, height: int) -> pil.Image:
    pixels = np.random.default_rng([width, height]).integers(0, 256, (height, width, 3), np.uint8)
    return pil.fromarray(pixels)


def ours(size: tuple[int, int], sizing: Sizing) -> tuple[Float32, Any]:
    """[tiles, 3, rows, columns] as transformers have them."""
    made = pixels_of([picture(*size)], sizing, video=False)
    pixels = np.frombuffer(made.data, np.uint8).reshape(made.frames, made.height, made.width, 3)
    return pixels.transpose(0, 3, 1, 2).astype(np.float32), made


def sizing_of(tiling: Any, file: dict[str, Any], given: dict[str, Any] | None = None, **more: Any) -> Sizing:
    return find_sizing(14, 1, 2, (file, {}), given or {}, side=SIDE, tiling=tiling, **more)


@pytest.mark.parametrize("size", SIZES)
def test_tiles_of_the_nearest_shape_are_transformers(size: tuple[int, int]) -> None:
    processor = GotOcr2ImageProcessorPil(size={"height": SIDE, "width": SIDE}, crop_to_patches=True)
    theirs = processor([picture(*size)], **PLAIN)["pixel_values"]
    found, made = ours(size, sizing_of("nearest", {}, most_tiles=12))
    np.testing.assert_array_equal(found, theirs)
    assert made.frames == (1 if made.tiles == (1, 1) else made.tiles[0] * made.tiles[1] + 1)


@pytest.mark.parametrize("edge", [4 * SIDE, SIDE])
@pytest.mark.parametrize("size", SIZES)
def test_tiles_of_the_longest_edge_are_transformers(size: tuple[int, int], edge: int) -> None:
    file = {"size": {"longest_edge": edge}, "max_image_size": {"longest_edge": SIDE}, "resample": 1}
    theirs = Idefics3ImageProcessorPil(**file, return_row_col_info=True)([picture(*size)], **PLAIN)
    found, made = ours(size, sizing_of("grid", file, longest_edge=4 * SIDE))
    np.testing.assert_array_equal(found, theirs["pixel_values"][0])
    rows, columns = theirs["rows"][0][0], theirs["cols"][0][0]
    assert made.tiles == ((rows, columns) if rows else (1, 1))


@pytest.mark.parametrize("size", SIZES)
def test_the_middle_of_a_picture_is_transformers(size: tuple[int, int]) -> None:
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    found, _ = ours(size, sizing_of(None, {"resample": 3}, cropped=True))
    np.testing.assert_array_equal(found, processor([picture(*size)], **PLAIN)["pixel_values"])


def encode(text: str) -> list[int]:
    """A token for each word in <>, and for each other letter."""
    out, rest = [], text
    while rest:
        end = rest.index(">") + 1 if rest[0] == "<" else 1
        out.append(1000 + hash(rest[:end]) % 10**6)
        rest = rest[end:]
    return out


def prompt(image: Image, show: Any) -> list[int]:
    ids, placed = place(
        [1, VIDEO if image.video else IMAGE, 2], [image], IMAGE, VIDEO, lambda i: [IMAGE] * i.tokens, show
    )
    starts = [i for i, token in enumerate(ids) if token == IMAGE and ids[i - 1] != IMAGE]
    assert {each.start for each in placed} >= set(starts) and not any(each.video for each in placed)
    assert b"".join(each.pixels for each in placed) == image.pixels
    return ids[1:-1]


@pytest.mark.parametrize("size", [(100, 75), (28, 28)])
def test_prompts_of_tiles_are_transformers(size: tuple[int, int]) -> None:
    sizing = sizing_of("grid", {}, longest_edge=3 * SIDE if size[0] > SIDE else SIDE)
    made = pixels_of([picture(*size)], sizing, video=False)
    rows, columns = (0, 0) if made.tiles == (1, 1) else made.tiles
    asked: Any = SimpleNamespace(
        fake_image_token="<fake_token_around_image>",
        global_image_tag="<global-img>",
        image_token="<image>",
        image_seq_len=1,
    )
    theirs = Idefics3Processor.replace_image_token(asked, {"rows": [[rows]], "cols": [[columns]]}, 0)
    expected = [IMAGE if token == encode("<image>")[0] else token for token in encode(theirs)]
    assert prompt(image_of(made, sizing, video=False), idefics(encode)) == expected
    sizing = sizing_of("nearest", {}, most_tiles=6)
    made = pixels_of([picture(*size)], sizing, video=False)
    asked = SimpleNamespace(
        start_image_token="<img>", end_image_token="</img>", image_token="<image>", image_seq_length=1
    )
    theirs = InternVLProcessor.replace_image_token(asked, {"num_patches": [made.frames]}, 0)
    expected = [IMAGE if token == encode("<image>")[0] else token for token in encode(theirs)]
    assert prompt(image_of(made, sizing, video=False), internvl(encode)) == expected


def test_frames_of_a_video_are_pictures_that_are_counted() -> None:
    sizing = sizing_of("nearest", {}, most_tiles=6)
    made = pixels_of([picture(60, 40)] * 3, sizing, video=True)
    asked: Any = SimpleNamespace(
        start_image_token="<img>", end_image_token="</img>", image_token="<image>", image_seq_length=1
    )
    theirs = InternVLProcessor.replace_video_token(asked, {"pixel_values_videos": np.zeros((1, 3, 1))}, 0)
    expected = [IMAGE if token == encode("<image>")[0] else token for token in encode(theirs)]
    assert prompt(image_of(made, sizing, video=True), internvl(encode)) == expected


def test_less_detail_means_fewer_tiles() -> None:
    for tiling, more in (("nearest", {"most_tiles": 12}), ("grid", {"longest_edge": 4 * SIDE})):
        sizing = sizing_of(tiling, {}, **more)
        assert pixels_of([picture(90, 80)], sizing, video=False).frames > 9
        for lower in (
            sizing.lowered({"max_pixels": 4 * SIDE**2}),
            sizing_of(tiling, {}, {"max_pixels": 4 * SIDE**2}, **more),
        ):
            assert pixels_of([picture(90, 80)], lower, video=False).tiles == (2, 2)
        assert pixels_of([picture(90, 80)], sizing.lowered({"max_pixels": SIDE**2}), video=False).frames == 1
        with pytest.raises(BadRequest, match="no min_pixels"):
            sizing.lowered({"min_pixels": 4 * SIDE**2})
        with pytest.raises(ConfigError, match="no min_pixels"):
            sizing_of(tiling, {}, {"min_pixels": 4 * SIDE**2}, **more)
    with pytest.raises(ConfigError, match="tiles of 14 pixels do not fit"):
        sizing_of("grid", {"max_image_size": {"longest_edge": 14}}, longest_edge=4 * SIDE)
    assert sizing_of("grid", {"do_image_splitting": False}, longest_edge=4 * SIDE).tiling is None
    with pytest.raises(BadRequest, match="more than 200 times"):
        sizing_of(None, {}, cropped=True).fit(5, 2000)


def processed(kind: str, shown: list[pil.Image]) -> tuple[dict[str, Any], list[str], dict[str, Any]]:
    """What transformers' model takes of pictures, the text of each, and the model's preprocessor_config.json."""
    normal = {"image_mean": [0.5, 0.4, 0.6], "image_std": [0.3, 0.2, 0.25], "resample": 3}
    if kind == "idefics3":
        file = {**normal, "size": {"longest_edge": 192}, "max_image_size": {"longest_edge": 96}}
        made = Idefics3ImageProcessorPil(**file, return_row_col_info=True)(shown, return_tensors="pt")
        asked: Any = SimpleNamespace(
            fake_image_token="<fake_token_around_image>",
            global_image_tag="<global-img>",
            image_token="<image>",
            image_seq_len=4,
        )
        inputs = {"pixel_values": made["pixel_values"], "pixel_attention_mask": made["pixel_attention_mask"]}
        lines = {"rows": [made["rows"][0]], "cols": [made["cols"][0]]}
        return inputs, [Idefics3Processor.replace_image_token(asked, lines, i) for i in range(len(shown))], file
    if kind == "internvl":
        file = {**normal, "size": {"height": 56, "width": 56}, "max_patches": 3}
        made = GotOcr2ImageProcessorPil(**file, crop_to_patches=True)(shown, return_tensors="pt")
        asked = SimpleNamespace(
            start_image_token="<img>", end_image_token="</img>", image_token="<IMG_CONTEXT>", image_seq_length=4
        )
        texts = [InternVLProcessor.replace_image_token(asked, made, i) + "\n" for i in range(len(shown))]
        return {"pixel_values": made["pixel_values"]}, texts, file
    if kind == "glm4v":
        file = {**normal, "size": {"shortest_edge": 3136, "longest_edge": 20000}}
        made = Glm4vImageProcessorPil(**file)(shown, return_tensors="pt")
        counts = [grid.prod() // 4 for grid in made["image_grid_thw"]]
        return dict(made), ["<|begin_of_image|>" + "<|image|>" * n + "<|end_of_image|>" for n in counts], file
    file = {**normal, "size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    made = CLIPImageProcessorPil(**file)(shown, return_tensors="pt")
    return {"pixel_values": made["pixel_values"]}, ["<image>" * 16 + "\n"] * len(shown), file


@pytest.mark.parametrize("kind", ["internvl", "idefics3", "llava", "glm4v"])
def test_a_chat_with_pictures_is_transformers(kind: str, tmp_path: Path) -> None:
    """From files to the answer's tokens."""
    model = seeing_models.write(tmp_path, kind, max_position_embeddings=512)
    seeing_models.write_texts(tmp_path, kind)
    shown = [picture(100, 75), picture(40, 90)]
    inputs, texts, file = processed(kind, shown)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(file))
    parts = [
        part for each in shown for part in ({"type": "image_pil", "image_pil": each}, {"type": "text", "text": "What?"})
    ]
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    found = {}
    for device in ("reference", "cpu"):
        with LLM(str(tmp_path), device=device, dtype="float32" if device == "reference" else "auto") as llm:
            (found[device],) = llm.chat([{"role": "user", "content": parts}], params)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ids = tokenizer("user\n" + "".join(text + "What?" for text in texts) + "model\n")["input_ids"]
    assert found["reference"].prompt_token_ids == found["cpu"].prompt_token_ids == ids
    if kind == "glm4v":
        inputs["mm_token_type_ids"] = torch.tensor([[int(token == IMAGE) for token in ids]], dtype=torch.int32)
    with torch.no_grad():
        whole = model.generate(
            input_ids=torch.tensor([ids]),
            **inputs,
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    assert found["reference"].outputs[0].token_ids == whole[0, len(ids) :].tolist()
    assert len(found["cpu"].outputs[0].token_ids) == 6
