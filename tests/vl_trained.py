"""A tiny Qwen2.5-VL that was taught to name the colours of pictures; trained once, then kept in the user's cache.

Run as a program it trains into the folder that it is given.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jinja2
import numpy as np
import torch
import transformers
import vl_tiny

from pagoda.arch.mrope import rope_positions
from pagoda.backend.vision import patches

COLOURS: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {
        "red": (220, 20, 20),
        "green": (20, 160, 30),
        "blue": (20, 40, 220),
        "yellow": (240, 230, 30),
        "white": (250, 250, 250),
        "black": (5, 5, 5),
    }
)
WORDS = (
    "what which colour color is are in the this that picture pictures image see do you a of name describe it tell me "
    "please answer one word and how many these here there look at now first second thing things shown Hello hi"
).split()
QUESTIONS = ("What colour is this?", "What is in this picture?", "Which colours do you see?", "Name the colour.", "")
GRIDS = ((1, 2, 2), (1, 4, 4), (1, 4, 6), (1, 6, 4), (1, 8, 8), (1, 2, 8))
STEPS, BATCH, RATE = 150, 12, 4e-3
_LONGEST_S = 300


def trained() -> str:
    """The folder of the trained model. Asked about a picture or a video of one colour, it answers with its name."""
    key = hashlib.sha256(b"".join(Path(f).read_bytes() for f in (__file__, vl_tiny.__file__))).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pagoda-tests"
    folder = cache / f"vl-trained-{key}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as made:
            subprocess.run([sys.executable, __file__, f"{made}/model"], check=True, timeout=_LONGEST_S)
            try:
                os.rename(f"{made}/model", folder)
            except OSError:  # somebody else was faster
                if not folder.exists():
                    raise
    return str(folder)


def plain(colour: str, grid: tuple[int, int, int] = (1, 4, 4)) -> np.ndarray:
    """The pixels [frames, rows, columns, 3] of a picture, or a video, of one colour."""
    shape = (1 if grid[0] == 1 else 2 * grid[0], grid[1] * vl_tiny.PATCH, grid[2] * vl_tiny.PATCH, 3)
    return np.broadcast_to(np.array(COLOURS[colour], np.uint8), shape)


def prompt(content: Any, system: str = "") -> str:
    messages = [{"role": "system", "content": system}] if system else []
    template = jinja2.Template(vl_tiny.TEMPLATE)
    return template.render(messages=[*messages, {"role": "user", "content": content}], add_generation_prompt=True)


class Teacher:
    """Makes batches: each sequence of a batch has as many tokens, and images of the same sizes."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(3)
        self.tokenizer = vl_tiny.tokenizer()
        self.vision = vl_tiny.spec().vision

    def batch(self) -> dict[str, Any]:
        rng, vision = self.rng, self.vision
        assert vision is not None
        video = bool(rng.random() < 0.1)
        grid = (2, 4, 4) if video else GRIDS[rng.integers(len(GRIDS))]
        length, words_first, system = int(rng.integers(0, 50)), bool(rng.random() < 0.4), bool(rng.random() < 0.2)
        rows, images, answers = [], [], []
        for _ in range(BATCH):
            colour = str(rng.choice(list(COLOURS)))
            text = self.text(length)
            part = {"type": "video" if video else "image"}
            written = {"type": "text", "text": text}
            content = [written, part] if words_first else [part, written]
            ids = self.ids(prompt(content, self.text(12) if system else ""), grid)
            rows.append(ids)
            images.append(self.painted(colour, grid))
            answers.append([*self.tokenizer.encode(colour).ids, vl_tiny.END])
        longest = max(map(len, answers))
        tokens = torch.tensor([r + a + [0] * (longest - len(a)) for r, a in zip(rows, answers, strict=True)])
        hidden = [[-100] * len(rows[0]) + a + [-100] * (longest - len(a)) for a in answers]
        start = rows[0].index(vl_tiny.VIDEO if video else vl_tiny.IMAGE)
        placed = vl_tiny.picture(images[0], start, video=video)
        positions, _ = rope_positions(len(rows[0]), [placed], vision)
        after = positions.max() + 1 + np.arange(longest)
        turned = np.concatenate([positions, np.broadcast_to(after, (3, longest))], axis=1)
        values = [patches(vl_tiny.picture(pixels, 0), vision) for pixels in images]
        kind = "pixel_values_videos" if video else "pixel_values"
        grid_kind = "video_grid_thw" if video else "image_grid_thw"
        return {
            "input_ids": tokens,
            "labels": torch.tensor(hidden),
            "position_ids": torch.from_numpy(turned.astype(np.int64))[:, None].expand(3, BATCH, -1),
            kind: torch.from_numpy(np.concatenate(values)),
            grid_kind: torch.tensor([grid] * BATCH),
        }

    def text(self, length: int) -> str:
        """A question, or words, of so many characters."""
        text = QUESTIONS[self.rng.integers(len(QUESTIONS))] if self.rng.random() < 0.3 else ""
        while len(text) < length:
            text += ("" if not text else " ") + WORDS[self.rng.integers(len(WORDS))]
        return text[:length]

    def ids(self, text: str, grid: tuple[int, int, int]) -> list[int]:
        """The tokens of a text, its placeholder as often as the image has vectors."""
        t, h, w = grid
        places = (vl_tiny.IMAGE, vl_tiny.VIDEO)
        ids = self.tokenizer.encode(text).ids
        return [i for token in ids for i in [token] * (t * h * w // vl_tiny.MERGE**2 if token in places else 1)]

    def painted(self, colour: str, grid: tuple[int, int, int]) -> np.ndarray:
        shade = self.rng.integers(-20, 21, 3)
        return np.clip(plain(colour, grid).astype(np.int16) + shade, 0, 255).astype(np.uint8)


def train(folder: Path) -> None:
    torch.manual_seed(1)
    torch.set_num_threads(1)
    folder.mkdir(parents=True)
    vl_tiny.write(folder)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.05 if "embed" in name else weight[0].numel() ** -0.5)
        elif "bias" in name:
            torch.nn.init.zeros_(weight)
        else:
            torch.nn.init.ones_(weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS, pct_start=0.1)
    teacher = Teacher()
    model.train()
    for step in range(STEPS):
        loss = model(**teacher.batch()).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        plan.step()
        if step % 20 == 19:
            print(f"step {step + 1}: loss {loss.item():.4f}", file=sys.stderr)
    model.save_pretrained(folder)
    vl_tiny.write_files(folder)
    print(f"trained: loss {loss.item():.4f}", file=sys.stderr)


if __name__ == "__main__":
    train(Path(sys.argv[1]))
