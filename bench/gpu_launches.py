#!/usr/bin/env python3
"""What a decode step launches on a GPU, without one: whole models of public shapes run on tensors without data.

    python bench/gpu_launches.py                                 # a table: models by the size of the batch
    python bench/gpu_launches.py --models Qwen3-0.6B --list      # the launches of one layer too

Kernels of Triton are noted instead of started, PyTorch's own operations as they are dispatched; views and allocations
do not count. PyTorch's operations count once, though sort and top-k take several kernels. A tensor without data cannot
be read back, so a step that waited for the device would fail here.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import numpy as np
import torch
from gpu_kernels import dispatch
from gpu_models import MODELS, STORED, TINY_MODELS
from numpy.lib.stride_tricks import as_strided
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from pagoda.arch import dummy as made_up
from pagoda.arch.registry import bind, load_spec
from pagoda.backend.torch import executor as executors
from pagoda.backend.torch.answer import choose
from pagoda.backend.torch.convert import Converter, Target
from pagoda.backend.torch.graphs import DecodeGraphs
from pagoda.backend.torch.kernels import launch
from pagoda.backend.torch.load import Loader
from pagoda.backend.torch.model import Decoder
from pagoda.backend.torch.upload import upload
from pagoda.types import StepPlan

META = torch.device("meta")
CONTEXT = 1024
NAMES = ("Qwen3-0.6B", "Qwen3-8B", "Qwen3-8B-FP8", "Qwen3-32B-AWQ", "Qwen3-30B-A3B", "gpt-oss-20b")
_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh"}


@dataclass(frozen=True)
class Launch:
    """One kernel: of ours with what it was given, or an operation of PyTorch's."""

    name: str
    kernel: Any = None
    args: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


class Noting(TorchDispatchMode):
    """Notes operations of PyTorch that start a kernel."""

    def __init__(self, notes: list[Launch]) -> None:
        super().__init__()
        self._notes = notes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name, given = func.overloadpacket.__name__, {_place(t) for t in _tensors((args, kwargs or {}))}
        made = [t for t in _tensors(out) if t.device == META and t.numel()]
        written = any(r.alias_info is not None and r.alias_info.is_write for r in func._schema.returns)
        if name not in _FREE and (written or any(_place(t) not in given for t in made)):
            self._notes.append(Launch("torch." + name))
        return out


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _place(tensor: torch.Tensor) -> int:
    """The same for a tensor and views of it."""
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def noted(gpu: launch.Gpu | None = None) -> Iterator[list[Launch]]:
    """The launches that are made within, as on a GPU of these limits (none given: an H200)."""
    notes: list[Launch] = []

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        notes.append(Launch(self.fn.__name__, self, args, options))

    own, before = JITFunction.run, launch.gpu_of
    JITFunction.run, launch.gpu_of = note, lambda device: gpu or launch.H200
    try:
        with torch.inference_mode(), dispatch(True):
            launch.arrivals(META, 1)  # made once for all steps
            with Noting(notes):
                yield notes
    finally:
        JITFunction.run, launch.gpu_of = own, before


def without_data(model: str, layers: int, most: int, limits: launch.Gpu = launch.H200) -> Decoder:
    """The decoder of a public shape, with so many layers, on the device that holds nothing."""
    config, stored = (MODELS | TINY_MODELS)[model]
    config = {**config, "num_hidden_layers": layers, **STORED[stored]}
    tiled, send = made_up._tiled, Converter.send
    made_up._tiled = lambda item, count: as_strided(np.zeros(1, np.uint8), (count * item.itemsize,), (0,))
    Converter.send = lambda self, data: torch.empty(data.nbytes, dtype=torch.uint8, device=META)
    try:
        source = made_up.dummy(config)
        spec = load_spec(source)
        target = Target(META, torch.bfloat16, None, limits.capability >= (8, 9))
        decoder = Loader(spec, bind(spec, source), target).decoder(4096, None)
    finally:
        made_up._tiled, Converter.send = tiled, send
    decoder.caches = executors.make_caches(spec, 1 << 16, torch.bfloat16, META, 256)
    return decoder


def plan_of(requests: int, tokens: int = 1, temperature: float = 0.0, **sampling: float) -> StepPlan:
    """Requests of so many tokens each at the end of CONTEXT others."""
    plan = executors.largest_step(requests * tokens, requests, CONTEXT + tokens)
    width = -(-(CONTEXT + tokens) // 16)
    ones = np.ones(requests, np.float32)
    return replace(
        plan,
        positions=np.full(requests, CONTEXT, np.int32),
        block_tables=np.tile(np.arange(width, dtype=np.int32), (requests, 1)),
        row_top=np.full(requests, -1, np.int32),
        temperature=ones * np.float32(temperature),
        top_p=ones * np.float32(sampling.get("top_p", 1)),
        min_p=ones * 0,
        top_k=np.full(requests, int(sampling.get("top_k", 0)), np.int32),
    )


def step(decoder: Decoder, plan: StepPlan, gpu: launch.Gpu | None = None, graphs: bool = True) -> list[Launch]:
    """The launches of a step, as the executor makes it: what a graph replays, and what comes before and behind."""
    with noted(gpu) as notes:
        batch, turns = upload(plan, META, 1 << 16)
        hidden = None
        if graphs:
            runner = DecodeGraphs(decoder.hidden, _once, most_requests=512, most_context=4096, device=META)
            notes.clear()
            hidden = runner.run(batch)
        hidden = decoder.hidden(batch) if hidden is None else hidden
        for turn in turns:
            choose(decoder.logits(hidden[turn.first : turn.last]), turn, plan)
    return notes


def _once(run: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
    """In place of a recording: the step behind which it would be made has made the launches already."""
    return lambda: None, torch.empty(0, device=META)


def counts(model: str, requests: int, **sampling: float) -> tuple[int, int]:
    """Launches of a decode step: for each layer, and beside them."""
    plan = plan_of(requests, **sampling)
    one, two = (len(step(without_data(model, n, 4096), plan)) for n in (1, 2))
    return two - one, 2 * one - two


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(NAMES))
    parser.add_argument("--batches", default="1,8,64")
    parser.add_argument("--list", action="store_true", help="name the launches of a step of one layer")
    parser.add_argument("--json", action="store_true", help="a line for each count instead of a table")
    args = parser.parse_args()
    for model in args.models.split(","):
        for requests in map(int, args.batches.split(",")):
            layer, beside = counts(model, requests)
            layers = (MODELS | TINY_MODELS)[model][0]["num_hidden_layers"]
            row = {"model": model, "batch": requests, "layer": layer, "beside": beside, "step": layer * layers + beside}
            form = "{model:14} batch {batch:3}: {layer:3} for each layer, {beside:3} beside them, {step:5} in a step"
            print(json.dumps(row) if args.json else form.format(**row), flush=True)
            if args.list:
                found = step(without_data(model, 1, 4096), plan_of(requests))
                for name, times in Counter(note.name for note in found).items():
                    print(f"    {times:3} x {name}")


if __name__ == "__main__":
    main()
