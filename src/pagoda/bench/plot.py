"""Draws a sweep as one SVG file: throughput, time to the first token, time between tokens, time to the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT, _MARGIN = 360, 240, 56
_COLORS = ("#2563eb", "#ea580c", "#dc2626", "#16a34a", "#7c3aed")
_PANELS = (
    ("tokens per second", (("output_throughput", "given"), ("total_token_throughput", "read and given"))),
    ("time to the first token, ms", "ttft"),
    ("time between tokens, ms", "itl"),
    ("time to the end, ms", "e2el"),
)


def svg(report: Mapping[str, Any], percentiles: Sequence[float]) -> str:
    """The whole picture; each level of the sweep is a place on the x axis."""
    runs = report["runs"]
    names = [_level(run) for run in runs]
    axis = "requests per second" if runs and runs[0]["request_rate"] else "requests at once"
    panels = []
    for index, (title, what) in enumerate(_PANELS):
        lines = what if isinstance(what, tuple) else [(f"p{p:g}_{what}_ms", f"p{p:g}") for p in percentiles]
        curves = [(label, [run.get(key) for run in runs]) for key, label in lines]
        x, y = index % 2 * (_WIDTH + _MARGIN), 40 + index // 2 * (_HEIGHT + _MARGIN)
        panels.append(f'<g transform="translate({x + _MARGIN},{y})">{_panel(title, axis, names, curves)}</g>')
    width, height = 2 * (_WIDTH + _MARGIN) + _MARGIN // 2, 2 * (_HEIGHT + _MARGIN) + 50
    head = escape(f"{report.get('label') or report['model']}: {report['what']}")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="system-ui, sans-serif" font-size="12">'
        f'<rect width="100%" height="100%" fill="#fff"/><text x="{_MARGIN}" y="22" font-size="15">{head}</text>'
        f"{''.join(panels)}</svg>\n"
    )


def _level(run: Mapping[str, Any]) -> str:
    rate, streams = run["request_rate"], run["max_concurrency"]
    return " ".join(([f"{rate:g}/s"] if rate else []) + ([str(streams)] if streams else [])) or "all"


def _panel(title: str, axis: str, names: Sequence[str], curves: Sequence[tuple[str, Sequence[float | None]]]) -> str:
    top = _nice(max((v for _, values in curves for v in values if v is not None), default=1.0))
    bottom = _HEIGHT - 40
    parts = [f'<text x="0" y="10" font-weight="600">{escape(title)}</text>']
    for share in (0.0, 0.5, 1.0):
        y = bottom - share * (bottom - 24)
        parts.append(f'<line x1="0" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="-6" y="{y + 4:.1f}" text-anchor="end" fill="#555">{top * share:g}</text>')
    places = [_WIDTH * (i + 0.5) / len(names) for i in range(len(names))]
    for x, name in zip(places, names, strict=True):
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle" fill="#555">{escape(name)}</text>')
    parts.append(f'<text x="{_WIDTH}" y="{bottom + 34}" text-anchor="end" fill="#555">{axis}</text>')
    legend = 0
    for color, (label, values) in zip(_COLORS, curves, strict=False):
        seen = [(x, bottom - v / top * (bottom - 24)) for x, v in zip(places, values, strict=True) if v is not None]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in seen)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in seen]
        parts.append(f'<text x="{legend}" y="{bottom + 34}" fill="{color}">{escape(label)}</text>')
        legend += 20 + 7 * len(label)
    return "".join(parts)


def _nice(value: float) -> float:
    """The next round number above."""
    if value <= 0:
        return 1.0
    unit: float = 10.0 ** (len(f"{value:.0f}") - 1) if value >= 1 else 0.1
    while unit > value:
        unit /= 10
    return next(unit * step for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10, 20) if unit * step >= value)
