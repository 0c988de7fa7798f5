"""A server of each family that sees: what a picture takes, the cache that knows it again, what is refused."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import httpx
import pytest
import seeing_models
import vl_tiny
from PIL import Image as pil
from server_process import running, serve

COUNTS = {
    "internvl": len("user\n\nWhat?model\n") + 1 + 4 + 1,
    "gemma3": len("user\n\n\n\n\nWhat?model\n") + 1 + 16 + 1,
    "mistral3": len("user\nWhat?model\n") + 2 * (2 + 1),
    "qwen3_5": len("user\nWhat?model\n") + 2 + 4,
    "qwen3_vl": 0,  # has a template with a system message of its own
}


def picture(colour: str) -> dict[str, Any]:
    out = io.BytesIO()
    pil.new("RGB", (56, 56), colour).save(out, "PNG")
    return {
        "type": "image_url",
        "image_url": {"url": "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()},
    }


@pytest.mark.parametrize("kind", COUNTS)
def test_a_server_sees(kind: str, tmp_path: Path) -> None:
    if kind == "qwen3_vl":
        vl_tiny.write(tmp_path, kind)
    else:
        seeing_models.write(tmp_path, kind)
        seeing_models.write_texts(tmp_path, kind)
    command = serve(str(tmp_path), "--device", "cpu", "--num-gpu-blocks-override", "32", "--max-num-seqs", "2")
    with running(*command) as url, httpx.Client(base_url=url, timeout=120) as client:

        def asked(*parts: dict[str, Any]) -> Any:
            content = [*parts, {"type": "text", "text": "What?"}]
            body = {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 6}
            reply = client.post("/v1/chat/completions", json={**body, "logprobs": True, "ignore_eos": True})
            return reply.json() if reply.is_success else reply

        model = client.get("/v1/models").json()["data"][0]
        assert "image" in model["architecture"]["input_modalities"]
        first, again, other = asked(picture("red")), asked(picture("red")), asked(picture("blue"))
        count = COUNTS[kind] or first["usage"]["prompt_tokens"]
        assert [each["usage"]["prompt_tokens"] for each in (first, again, other)] == [count] * 3
        scores = [each["choices"][0]["logprobs"]["content"][0]["logprob"] for each in (first, again, other)]
        assert scores[0] == scores[1] != scores[2]
        cached = [each["usage"]["prompt_tokens_details"]["cached_tokens"] for each in (first, again)]
        assert cached == ([0, 0] if kind == "qwen3_5" else [0, (count - 1) // 16 * 16])
        refused = asked({"type": "video_url", "video_url": picture("red")["image_url"]})
        if kind in ("gemma3", "mistral3"):
            assert refused.status_code == 400 and "no videos" in refused.text
        if kind == "internvl":  # whose frames are counted
            assert refused["usage"]["prompt_tokens"] == count - 1 + len("Frame1: ")
