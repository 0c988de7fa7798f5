"""The layers behind the pooling of an embedding model: folders of sentence-transformers, or tensors of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pagoda.arch.pooled_spec import Projection
from pagoda.arch.spec import ModelSpec
from pagoda.errors import ModelError
from pagoda.text.sentence import Dense
from pagoda.weights.pytorch import open_pytorch
from pagoda.weights.safetensors import open_safetensors
from pagoda.weights.source import Tensor, TensorSource

_GGUF_NAMES = ("dense_2", "dense_3", "dense.0", "dense.1")  # llama.cpp's, Ollama's
_ACTIVATIONS = {"Identity": "none", "Tanh": "tanh"}


def projections(source: TensorSource, dense: Sequence[Dense]) -> tuple[Projection, ...]:
    """Those of a model, in the order they are gone through."""
    if source.metadata:
        found = [(name, source.tensors.get(f"{name}.weight")) for name in _GGUF_NAMES]
        return tuple(Projection(name, tensor.shape[0]) for name, tensor in found if tensor is not None)
    return tuple(_projection(each) for each in dense)


def _projection(dense: Dense) -> Projection:
    kind = _ACTIVATIONS.get(dense.activation.rpartition(".")[2])
    if kind not in ("none", "tanh"):
        raise ModelError(
            f"{dense.folder}/config.json: activation_function {dense.activation!r} is not supported "
            f"(supported: {', '.join(_ACTIVATIONS)})"
        )
    return Projection(f"{dense.folder}.linear", dense.width, "tanh" if kind == "tanh" else "none", dense.bias)


def projection_tensors(spec: ModelSpec, source: TensorSource) -> dict[str, Tensor]:
    """The tensors of these layers that lie in folders of their own, under the names that the slots have."""
    if spec.pooling is None or source.metadata:
        return {}
    found: dict[str, Tensor] = {}
    for each in spec.pooling.projections:
        folder = each.name.removesuffix(".linear")
        for name, tensor in _stored(Path(source.path) / folder).items():
            found[f"{folder}.{name}"] = replace(tensor, name=f"{folder}.{name}")
    return found


def _stored(folder: Path) -> Mapping[str, Tensor]:
    if (folder / "model.safetensors").is_file():
        return open_safetensors(folder / "model.safetensors").tensors
    if (folder / "pytorch_model.bin").is_file():
        return open_pytorch(folder / "pytorch_model.bin").tensors
    raise ModelError(f"{folder} has no weights", remedy="The download may be incomplete: fetch the model again")
