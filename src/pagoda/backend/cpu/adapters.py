"""Which outputs of the native program's products a LoRA adapter adds to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pagoda.arch.lora import ADAPTABLE, AdapterWeights
from pagoda.backend.cpu.panels import FUSED, Places, in_their_order
from pagoda.types import Float32
from pagoda.weights.source import Tensor


@dataclass(frozen=True, slots=True)
class Product:
    """A slot in the program: the weight that it is part of, the first of its outputs, the order of its inputs."""

    weight: int
    column: int
    order: Places | None


Products = Mapping[str, Product]


def adapted_products(ids: Mapping[str, int], tensors: Mapping[str, Tensor]) -> dict[str, Product]:
    """By slot. `ids`: the weights of a program by the names of its products."""
    found: dict[str, Product] = {}
    orders = in_their_order(tensors)[1]
    for name, weight in ids.items():
        prefix, _, product = name.rpartition(".")
        column = 0
        for part in FUSED.get(product, ()):
            slot = f"{prefix}.{part}"
            if slot in tensors:
                if part in ADAPTABLE:
                    found[slot] = Product(weight, column, orders.get(name))
                column += tensors[slot].shape[0]
    return found


def native_pairs(products: Products, weights: AdapterWeights) -> list[tuple[int, int, Float32, Float32]]:
    """For `Native.adapt`. The matrices of one product stand in the order of their outputs."""
    out: list[tuple[int, int, Float32, Float32]] = []
    for slot, low in weights.items():
        product = products[slot]
        down = low.down if product.order is None else low.down[:, product.order]
        out.append((product.weight, product.column, np.ascontiguousarray(down), np.ascontiguousarray(low.up)))
    return sorted(out, key=lambda pair: pair[:2])
