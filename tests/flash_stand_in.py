"""A stand-in for FlashInfer: the wrapper that is used here, with its arguments, in plain PyTorch.

Like the real one it writes what it has planned to pinned memory of its own, and copies that without waiting.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

Calls = list[tuple[str, tuple[Any, ...], dict[str, Any]]]


def make(faults: dict[str, Any] | None = None) -> tuple[ModuleType, Calls]:
    """A module, and the calls that it gets. `faults`: `run` and `plan` are called with their number before those are
    done, `off` is added to results."""
    module, calls, faults = ModuleType("flashinfer"), [], faults or {}
    counts = dict.fromkeys(("plan", "run"), 0)

    def note(name: str, *args: Any, **named: Any) -> None:
        calls.append((name, args, named))
        if name in counts:
            counts[name] += 1
            faults.get(name, lambda n: None)(counts[name])

    class BatchPrefillWithPagedKVCacheWrapper:
        def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str = "HND") -> None:
            note("__init__", self, float_workspace_buffer, kv_layout=kv_layout)
            assert kv_layout == "NHD" and float_workspace_buffer.dtype == torch.uint8
            self.device = float_workspace_buffer.device
            self.pinned = torch.zeros(64, dtype=torch.int32, pin_memory=True)
            self.there = torch.zeros(64, dtype=torch.int32, device=self.device)

        def plan(self, *args: Any, **named: Any) -> None:
            note("plan", self, *args, **named)
            q_starts, page_starts, pages, last, heads, kv_heads, head_dim, page_size = args
            assert all(x.dtype == torch.int32 and x.device.type == "cpu" for x in args[:4])
            assert named["causal"] and named["disable_split_kv"] and len(pages) == int(page_starts[-1])
            self.pinned.fill_(len(pages))
            self.there.copy_(self.pinned, non_blocking=True)
            self.q_starts, self.page_starts, self.last = q_starts.tolist(), page_starts.tolist(), last.tolist()
            assert all(1 <= n <= page_size for n in self.last)
            self.pages = pages.to(self.device, non_blocking=named["non_blocking"])
            self.shape, self.named = (heads, kv_heads, head_dim), named

        def run(self, q: torch.Tensor, paged_kv_cache: Any, *, out: torch.Tensor, enable_pdl: bool) -> torch.Tensor:
            note("run", self, q, paged_kv_cache, out=out, enable_pdl=enable_pdl)
            heads, kv_heads, head_dim = self.shape
            assert q.shape == (self.q_starts[-1], heads, head_dim) and q.is_contiguous() and not enable_pdl
            assert q.dtype == self.named["q_data_type"] and paged_kv_cache[0].dtype == self.named["kv_data_type"]
            for r, last in enumerate(self.last):
                first, end = self.q_starts[r : r + 2]
                pages = self.pages[self.page_starts[r] : self.page_starts[r + 1]].long()
                k, v = (cache[pages].flatten(0, 1)[: 16 * (len(pages) - 1) + last] for cache in paged_kv_cache)
                out[first:end] = self.attended(q[first:end], k, v, heads // kv_heads) + faults.get("off", 0)
            return out

        def attended(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: int) -> torch.Tensor:
            keys, values = (x.float().repeat_interleave(group, 1) for x in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q.float(), keys) * self.named["sm_scale"]
            if cap := self.named["logits_soft_cap"]:
                scores = cap * torch.tanh(scores / cap)
            at = torch.arange(len(k) - len(q), len(k), device=q.device)[:, None]
            key = torch.arange(len(k), device=q.device)[None]
            hidden = key > at
            if (left := self.named["window_left"]) >= 0:
                hidden = hidden | (key < at - left)
            weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1)
            return torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)

    module.BatchPrefillWithPagedKVCacheWrapper = BatchPrefillWithPagedKVCacheWrapper  # type: ignore[attr-defined]
    return module, calls


def real_signatures() -> dict[str, inspect.Signature] | None:
    """Of the methods of the installed FlashInfer's wrapper, without importing it; None where it is not installed."""
    spec = importlib.util.find_spec("flashinfer")
    if spec is None or spec.origin is None:
        return None
    tree = ast.parse((Path(spec.origin).parent / "prefill.py").read_text(encoding="utf-8"))
    kind = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "BatchPrefillWithPagedKVCacheWrapper")
    return {n.name: _signature(n.args) for n in kind.body if isinstance(n, ast.FunctionDef)}  # the last one counts


def _signature(a: ast.arguments) -> inspect.Signature:
    of, plain = inspect.Parameter, [*a.posonlyargs, *a.args]
    needed = len(plain) - len(a.defaults)
    found = [of(x.arg, of.POSITIONAL_OR_KEYWORD, default=of.empty if i < needed else None) for i, x in enumerate(plain)]
    found += [of(a.vararg.arg, of.VAR_POSITIONAL)] if a.vararg else []
    found += [
        of(x.arg, of.KEYWORD_ONLY, default=of.empty if d is None else None)
        for x, d in zip(a.kwonlyargs, a.kw_defaults, strict=True)
    ]
    return inspect.Signature(found)
