"""The one view of a checkpoint that the rest of the house has: named tensors with their stored bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Tensor:
    """A stored tensor. `shape` is in numpy order ([out, in] for a matrix); quantized blocks run along the last axis.

    `type` is the GGML name of the storage: F32, F16, BF16, Q4_0, ... (safetensors F32/F16/BF16 use the same names).
    `data` is the raw bytes, flat uint8, usually a view of the mapped file (read-only).
    """

    name: str
    shape: tuple[int, ...]
    type: str
    data: npt.NDArray[np.uint8]

    @property
    def nbytes(self) -> int:
        return int(self.data.nbytes)


class TensorSource(Protocol):
    """A checkpoint that is open: its tensors, and where it came from.

    `metadata` is the GGUF key-value table, or `{}` for safetensors. `config` is the parsed config.json ({} for GGUF).
    Raises ModelError on construction when a file is missing, truncated or malformed.
    """

    path: str
    metadata: Mapping[str, Any]
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def close(self) -> None: ...
