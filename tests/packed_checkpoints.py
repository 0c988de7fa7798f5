"""Packs float matrices as AWQ and GPTQ checkpoints do, number by number as their formats are described."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from checkpoints import make_model
from safetensors.torch import save_file

Array = npt.NDArray[Any]
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # column of nibble i of a word


class Quantized:
    """Codes, scales and zero points for a matrix [out, in], near to a float one, and the values they stand for."""

    def __init__(
        self, weight: Array, bits: int, group_of: Array, rng: np.random.Generator, *, symmetric: bool = False
    ) -> None:
        top, groups = 2**bits - 1, int(group_of.max()) + 1
        self.codes = np.zeros((weight.shape[1], weight.shape[0]), np.int64)  # [in, out]
        self.scales = np.zeros((groups, weight.shape[0]), np.float16)
        self.zeros = np.zeros((groups, weight.shape[0]), np.int64)
        self.weight = np.zeros(weight.shape, np.float32)
        for o in range(weight.shape[0]):
            for g in range(groups):
                inputs = np.flatnonzero(group_of == g)
                values = weight[o, inputs]
                scale = np.float16((values.max() - values.min()) / top * (2 if symmetric else 1) + 1e-4)
                zero = (top + 1) // 2 if symmetric else int(rng.integers(top // 3, top - top // 3))
                codes = np.clip(np.rint(values / np.float32(scale)) + zero, 0, top)
                self.scales[g, o], self.zeros[g, o], self.codes[inputs, o] = scale, zero, codes
                self.weight[o, inputs] = np.float32(scale) * (codes - zero).astype(np.float32)


def awq(q: Quantized) -> dict[str, Array]:
    def pack(numbers: Array) -> Array:
        words = np.zeros((numbers.shape[0], numbers.shape[1] // 8), np.uint32)
        for row in range(words.shape[0]):
            for word in range(words.shape[1]):
                for nibble, column in enumerate(AWQ_COLUMNS):
                    words[row, word] |= np.uint32(int(numbers[row, 8 * word + column]) << 4 * nibble)
        return words.view(np.int32)

    return {"qweight": pack(q.codes), "qzeros": pack(q.zeros), "scales": q.scales}


def gptq(q: Quantized, bits: int, group_of: Array, version: int) -> dict[str, Array]:
    per_word, top = 32 // bits, 2**bits - 1
    inputs, outputs = q.codes.shape
    qweight = np.zeros((inputs // per_word, outputs), np.uint32)
    for i in range(inputs):
        qweight[i // per_word] |= (q.codes[i] << bits * (i % per_word)).astype(np.uint32)
    qzeros = np.zeros((len(q.zeros), outputs // per_word), np.uint32)
    for o in range(outputs):
        stored = q.zeros[:, o] - 1 & top if version == 1 else q.zeros[:, o]
        qzeros[:, o // per_word] |= (stored << bits * (o % per_word)).astype(np.uint32)
    return {
        "qweight": qweight.view(np.int32),
        "qzeros": qzeros.view(np.int32),
        "scales": q.scales,
        "g_idx": group_of.astype(np.int32),
    }


_SAME_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def write(
    folder: Path,
    case: str,
    table: Mapping[str, Any],
    *,
    drop: tuple[str, ...] = (),
    biases: bool = False,
    one_order: bool = True,
) -> Any:
    """A tiny model, its linear layers packed as `table` (quantization_config) says; `drop` leaves parts out.

    Returns the transformers model, in float32 and with the values that the packed numbers stand for.
    """
    model = make_model(case, hidden_size=128, intermediate_size=256, num_hidden_layers=2)
    rng = np.random.default_rng(11)
    bits, size = table["bits"], table["group_size"]
    stored: dict[str, torch.Tensor] = {}
    for name, parameter in model.state_dict().items():
        if not name.endswith("_proj.weight"):
            stored[name] = parameter.contiguous()
            continue
        stem, inputs = name.removesuffix(".weight"), parameter.shape[1]
        group_of = np.arange(inputs) // (size if size > 0 else inputs)
        if table.get("desc_act"):
            # by the importance of the inputs: matrices with the same inputs have the same order
            reader = next((shared for shared in _SAME_INPUTS if any(part in stem for part in shared)), stem)
            layer = stem.split(".")[2]
            seed = [11, int(layer), *str(reader if one_order else stem).encode()]
            group_of = np.random.default_rng(seed).permutation(group_of)
        q = Quantized(parameter.numpy() * 0.6, bits, group_of, rng, symmetric=bool(table.get("sym")))
        version = 2 if table.get("checkpoint_format") == "gptq_v2" else 1
        parts = awq(q) if table["quant_method"] == "awq" else gptq(q, bits, group_of, version)
        stored |= {f"{stem}.{part}": torch.from_numpy(v.copy()) for part, v in parts.items() if part not in drop}
        if biases:
            stored[f"{stem}.bias"] = torch.zeros(parameter.shape[0], dtype=torch.float16)
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(q.weight))
    save_file(stored, folder / "model.safetensors")
    config = {**model.config.to_dict(), "quantization_config": dict(table)}
    (folder / "config.json").write_text(json.dumps(config, default=str))
    return model
