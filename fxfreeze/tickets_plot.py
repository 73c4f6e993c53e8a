"""The plot of a ticket search, as SVG that stands alone: score against density, of the ticket and its two controls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, RIGHT = 460, 320, 64, 16, 48, 16
COLOURS = ("#1f77b4", "#d62728", "#7f7f7f")


@dataclass(frozen=True)
class Curve:
    """`points` are density, mean score, standard deviation over replicates."""

    label: str
    points: Sequence[tuple[float, float, float]]


def plot(curves: Sequence[Curve], ylabel: str = "score") -> str:
    """Curves over a logarithmic axis of density, dense on the left; bars are ± one standard deviation."""
    every = [point for curve in curves for point in curve.points]
    sparsest = min(density for density, _, _ in every)
    low, high = min(y - sd for _, y, sd in every), max(y + sd for _, y, sd in every)
    ticks = rounded(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])

    def across(density: float) -> float:
        return LEFT + WIDTH * (math.log(density) / math.log(sparsest) if sparsest < 1 else 0.5)

    def down(score: float) -> float:
        return TOP + HEIGHT * (high - score) / (high - low)

    size = f"0 0 {LEFT + WIDTH + RIGHT} {TOP + HEIGHT + BOTTOM}"
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}" font-family="sans-serif" font-size="12">',
             '<rect width="100%" height="100%" fill="white"/>']  # fmt: skip
    for tick in ticks:
        lines.append(f'<path d="M{LEFT} {down(tick):.1f}h{WIDTH}" stroke="#eee"/>')
        lines.append(f'<text x="{LEFT - 6}" y="{down(tick) + 4:.1f}" text-anchor="end">{tick:.6g}</text>')
    for density in (d for d in (1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001) if d >= sparsest * 0.999):
        place = f"{across(density):.1f}"
        lines.append(f'<path d="M{place} {TOP + HEIGHT}v4" stroke="black"/>')
        lines.append(f'<text x="{place}" y="{TOP + HEIGHT + 17}" text-anchor="middle">{100 * density:g} %</text>')
    lines.append(f'<rect x="{LEFT}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="black"/>')
    for row, (curve, colour) in enumerate(zip(curves, COLOURS, strict=False)):
        places = [(across(density), down(y), sd * HEIGHT / (high - low)) for density, y, sd in curve.points]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y, _ in places)
        lines.append(f'<path d="M{path}" fill="none" stroke="{colour}"/>')
        for x, y, sd in places:
            lines.append(f'<path d="M{x:.1f} {y - sd:.1f}V{y + sd:.1f}" stroke="{colour}" stroke-opacity="0.6"/>')
            lines.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
        x, y = LEFT + 12, TOP + HEIGHT - 14 - 16 * (len(curves) - 1 - row)
        lines.append(f'<path d="M{x} {y - 4}h18" stroke="{colour}" stroke-width="2"/>')
        lines.append(f'<text x="{x + 24}" y="{y}">{escape(curve.label)}</text>')
    middle = f'x="{LEFT + WIDTH / 2}" y="{TOP + HEIGHT + 36}"'
    lines.append(f'<text {middle} text-anchor="middle">weights left in the pruned layers</text>')
    turned = f"translate(14 {TOP + HEIGHT / 2}) rotate(-90)"
    lines.append(f'<text transform="{turned}" text-anchor="middle">{escape(ylabel)}</text>')
    return "\n".join([*lines, "</svg>", ""])


def rounded(low: float, high: float) -> list[float]:
    """At most seven round numbers that span `low` to `high`."""
    span = high - low or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 6))
    step *= next(factor for factor in (1, 2, 5, 10) if factor * step >= span / 6)
    first = math.floor(low / step)
    return [i * step for i in range(first, max(math.ceil(high / step), first + 1) + 1)]
