"""Writes LoRA adapters as PEFT stores them, and gives the model with the same adapter merged into its weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_adapter(
    folder: Path,
    model: Any,
    *,
    rank: int = 4,
    alpha: float = 8,
    targets: Sequence[str] = ALL,
    seed: int = 1,
    size: float = 0.5,
    torch_file: bool = False,
    **config: Any,
) -> Any:
    """An adapter for the modules with these names; the copy of the model that has it merged in."""
    folder.mkdir(parents=True, exist_ok=True)
    merged = copy.deepcopy(model)
    drawn = torch.Generator().manual_seed(seed)
    scale = alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
    tensors: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for name, module in merged.named_modules():
            if name.rpartition(".")[2] not in targets or not isinstance(module, torch.nn.Linear):
                continue
            rows, columns = module.weight.shape
            down = torch.randn(rank, columns, generator=drawn) / columns**0.5
            up = torch.randn(rows, rank, generator=drawn) * size / rank**0.5
            tensors[f"base_model.model.{name}.lora_A.weight"] = down
            tensors[f"base_model.model.{name}.lora_B.weight"] = up
            module.weight += scale * up @ down
    table = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": list(targets), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**table, **config}))
    if torch_file:
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, str(folder / "adapter_model.safetensors"))
    return merged
