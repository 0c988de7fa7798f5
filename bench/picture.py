#!/usr/bin/env python3
"""Draws docs/images/speed.svg, the bars of the README, from a JSON file of bench/cpu.py.

python bench/picture.py bench/results/NAME.json --title "SmolLM2-135M, Q4_1, 2 cores" --out docs/images/speed.svg
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

Bars = Sequence[tuple[str, float]]
GROUPS = {
    "prefill_512": "reading a prompt of 512 tokens, tokens/s",
    "decode": "writing, one request, tokens/s",
    "throughput_c16": "writing, 16 requests at once over HTTP, tokens/s",
    "throughput_c32": "writing, 32 requests at once over HTTP, tokens/s",
}
OURS = "pagoda"
WIDTH, NAME, BAR, ROW, GAP = 760, 210, 390, 20, 44
COLORS = {True: "#2563eb", False: "#a8b3c4"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="JSON files of bench/cpu.py; later ones add and replace")
    parser.add_argument("--title", required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    engines: dict[str, dict[str, float]] = {}
    for path in args.results:
        report = json.loads(path.read_text("utf-8"))
        for part in ("core", "servers"):
            for name, measures in report.get(part, {}).items():
                engines.setdefault(name, {}).update(measures)
    args.out.write_text(svg(args.title, engines), encoding="utf-8")


def svg(title: str, engines: Mapping[str, Mapping[str, float]]) -> str:
    """One group of bars for each measure that two engines have, longest first, each group on a scale of its own."""
    parts, y = [f'<text x="16" y="28" font-size="16" font-weight="600">{escape(title)}</text>'], 42
    for key, label in GROUPS.items():
        bars = sorted(((n, m[key]) for n, m in engines.items() if m.get(key)), key=lambda bar: -bar[1])
        if len(bars) > 1:
            parts.append(f'<text x="16" y="{y + 18}" fill="#475569">{escape(label)}</text>')
            parts += _bars(bars, y + 26)
            y += GAP + ROW * len(bars)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" viewBox="0 0 {WIDTH} {y}" '
        f'font-family="system-ui, sans-serif" font-size="13"><rect width="100%" height="100%" fill="#fff"/>'
        f"{''.join(parts)}</svg>\n"
    )


def _bars(bars: Bars, top: float) -> list[str]:
    """Each bar between its engine's name and its figure; the best of the others has the ratio to ours."""
    ours = dict(bars).get(OURS)
    best = next((name for name, _ in bars if name != OURS), None)
    parts = []
    for row, (name, value) in enumerate(bars):
        y, width = top + row * ROW, BAR * value / bars[0][1]
        figure = f"{value:,.0f}" + (f"   (Pagoda: {ours / value:.1f} times)" if ours and name == best else "")
        parts.append(
            f'<text x="{NAME - 8}" y="{y + 13}" text-anchor="end">{escape(name.replace(OURS, "Pagoda"))}</text>'
        )
        parts.append(
            f'<rect x="{NAME}" y="{y + 2}" width="{width:.1f}" height="{ROW - 5}" rx="2" '
            f'fill="{COLORS[name == OURS]}"/>'
        )
        parts.append(f'<text x="{NAME + width + 8:.1f}" y="{y + 13}" fill="#334155">{figure}</text>')
    return parts


if __name__ == "__main__":
    main()
