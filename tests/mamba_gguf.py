"""Lays the tensors of state spaces out as llama.cpp's converter does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np


def converted(config: Any, name: str, values: Any) -> Iterator[tuple[str, Any]]:
    """The tensors that one becomes: under the hub's names, or under their own where it has them in one."""
    if config.model_type == "nemotron_h":
        name = name.replace("model.", "backbone.", 1)
    block, part = (f"blk.{name.split('.')[2]}.", name.split(".", 4)[-1]) if ".layers." in name else ("", "")
    if name.endswith("conv1d.weight"):
        yield name, values.squeeze(1)
    elif name.endswith("A_log"):
        yield name, -np.exp(values)[:, None]
    elif name.endswith(".D"):
        yield name, values[:, None]
    elif name.endswith("dt_bias"):
        yield name.replace("dt_bias", "dt_proj.bias"), values
    elif name.endswith(("mamba.norm.weight", "mixer.norm.weight")):
        groups = getattr(config, "mamba_n_groups", None) or config.n_groups
        yield name, values.reshape(groups, -1)
    elif name.endswith(("shared_mlp.input_linear.weight", "shared_mlp.output_linear.weight")):
        kind = "shexp" if config.num_local_experts else ""
        stem = f"{block}ffn_%s_{kind}".rstrip("_") + ".weight"
        halves = {"gate": values[: len(values) // 2], "up": values[len(values) // 2 :]}
        for which, own in halves.items() if part == "input_linear.weight" else [("down", values)]:
            yield stem % which, np.ascontiguousarray(own)
    elif name.endswith(("mixer.experts.up_proj", "mixer.experts.down_proj")):
        yield f"{block}ffn_{name.split('.')[-1].removesuffix('_proj')}_exps.weight", values
    else:
        yield name, values
