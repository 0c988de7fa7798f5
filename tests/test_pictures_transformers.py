"""From a picture's file to the answer's tokens, as transformers' own processor and model make them of the same chat."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import vl_tiny
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from pagoda import LLM, SamplingParams

SIZES = ((100, 75), (300, 40), (31, 90))
TOKENS = 10


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(21)
    return [Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)) for width, height in SIZES]


def data_uri(picture: Image.Image) -> str:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def theirs(folder: str, chat: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
    """The prompt and the greedy tokens behind it."""
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    made = processor(pictures(), return_tensors="pt")
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    for grid in made["image_grid_thw"].tolist():
        text = text.replace("<|image_pad|>", "<|hole|>" * (grid[0] * grid[1] * grid[2] // 4), 1)
    ids = tokenizer(text.replace("<|hole|>", "<|image_pad|>"))["input_ids"]
    kinds = torch.tensor([[int(token == vl_tiny.IMAGE) for token in ids]], dtype=torch.int32)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        whole = model.generate(
            input_ids=torch.tensor([ids]),
            mm_token_type_ids=kinds,
            **made,
            max_new_tokens=TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return ids, whole[0, len(ids) :].tolist()


@pytest.mark.parametrize("kind", vl_tiny.KINDS)
def test_a_chat_with_three_pictures(tmp_path: Path, kind: str) -> None:
    folder = vl_tiny.write(tmp_path, kind)
    bare: list[dict[str, Any]] = []
    whole: list[dict[str, Any]] = []
    for number, picture in enumerate(pictures()):
        text = {"type": "text", "text": f"Picture {number}?"}
        bare.append({"role": "user", "content": [{"type": "image"}, text]})
        whole.append(
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_uri(picture)}}, text]}
        )
        if number < 2:
            answer = {"role": "assistant", "content": f"Number {number}."}
            bare.append(answer)
            whole.append(answer)
    prompt, answer_ids = theirs(folder, bare)
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    for device in ("reference", "cpu"):
        with LLM(folder, device=device, dtype="float32" if device == "reference" else "auto") as llm:
            (made,) = llm.chat(whole, params)
        assert made.prompt_token_ids == prompt
        if device == "reference":
            assert made.outputs[0].token_ids == answer_ids
        assert len(made.outputs[0].token_ids) == TOKENS
