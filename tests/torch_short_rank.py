"""A rank like pagoda.backend.torch.rank with too little memory for large steps: at their start, middle and end."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pagoda.backend.torch import model, ops, parallel, rank

UPLOAD, ATTENTION, HEAD = 20, 12, 2
"""The most tokens, tokens and rows of logits for which there is memory."""


def short_of(name: str, most: int, work: Callable[..., Any], count: Callable[..., int]) -> Callable[..., Any]:
    def tried(*args: Any) -> Any:
        if count(*args) > most:
            with Path(os.environ["SHORT_RANK_TELLS"]).open("a") as file:
                file.write(f"{name} ")
            raise torch.OutOfMemoryError("no memory")
        return work(*args)

    return tried


def main() -> int:
    parallel.upload_batch = short_of("upload", UPLOAD, parallel.upload_batch, lambda fed, *_: len(fed.tokens))
    ops.paged_attention = short_of("attention", ATTENTION, ops.paged_attention, lambda q, *_: len(q))
    model.Decoder.logits = short_of("head", HEAD, model.Decoder.logits, lambda _, hidden: len(hidden))  # type: ignore[method-assign]
    return rank.main()


if __name__ == "__main__":
    os._exit(main())
