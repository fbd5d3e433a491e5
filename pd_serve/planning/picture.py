"""The curves of a plan as one SVG picture: attainment against the rate, a line per layout."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from pd_serve.planning.search import Goal, LayoutPlan

WIDTH, HEIGHT = 860, 420
LEFT, RIGHT, TOP, BOTTOM = 56, 300, 48, 44

COLORS = ("#1f5fa8", "#d1702a", "#2f8f4e", "#7b4fa3", "#b8860b", "#008b8b", "#a83250")
OTHERS = "#c9c9c9"


@dataclass(frozen=True, slots=True)
class _Axes:
    low: float
    high: float

    def x(self, rate: float) -> float:
        along = math.log(rate / self.low) / math.log(self.high / self.low)
        return LEFT + along * (WIDTH - LEFT - RIGHT)

    def y(self, share: float) -> float:
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def svg(plans: Sequence[LayoutPlan], goal: Goal, title: str) -> str:
    """The picture as a file's text. The best layouts, which come first, are in color."""
    rates = [rate for plan in plans for rate, _ in plan.curve]
    axes = _Axes(min(rates) / 1.1, max(rates) * 1.1)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}"'
        f' height="{HEIGHT}" font-family="sans-serif" font-size="12" role="img">',
        f"<title>{html.escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(LEFT, 22, title, 'font-size="14"'),
        *_grid(axes, goal),
    ]
    for place in reversed(range(len(plans))):  # the best one on top
        parts += _curve(axes, plans[place], place)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _grid(axes: _Axes, goal: Goal) -> list[str]:
    left, right, bottom = LEFT, WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = axes.y(share)
        parts.append(f'<path d="M{left} {y:.1f}H{right}" stroke="#e4e4e4"/>')
        parts.append(_text(left - 6, y + 4, f"{share:.0%}", 'text-anchor="end"'))
    for rate in _ticks(axes.low, axes.high):
        x = axes.x(rate)
        parts.append(f'<path d="M{x:.1f} {TOP}V{bottom}" stroke="#e4e4e4"/>')
        parts.append(_text(x, bottom + 16, f"{rate:g}", 'text-anchor="middle"'))
    y = axes.y(goal.attainment)
    parts.append(f'<path d="M{left} {y:.1f}H{right}" stroke="#444" stroke-dasharray="5 4"/>')
    parts.append(_text((left + right) / 2, HEIGHT - 8, "requests/s", 'text-anchor="middle"'))
    parts.append(_text(left, TOP - 10, f"requests within the target; dashed: {goal.attainment:.0%}"))
    return parts


def _ticks(low: float, high: float) -> list[float]:
    first = math.floor(math.log10(low))
    found = [d * 10.0**e for e in range(first, first + 8) for d in (1, 2, 5)]
    return [rate for rate in found if low <= rate <= high]


def _curve(axes: _Axes, plan: LayoutPlan, place: int) -> list[str]:
    color = COLORS[place] if place < len(COLORS) else OTHERS
    points = " ".join(f"{axes.x(rate):.1f},{axes.y(share):.1f}" for rate, share in plan.curve)
    y = TOP + 8 + place * 20
    x = WIDTH - RIGHT + 16
    label = f"{plan.layout}: {plan.goodput:.3g}/s"
    return [
        f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.6"/>',
        f'<path d="M{x} {y - 4}h18" stroke="{color}" stroke-width="3"/>',
        _text(x + 24, y, label, 'font-weight="bold"' if place == 0 else ""),
    ]


def _text(x: float, y: float, text: str, style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="#222" {style}>{html.escape(text)}</text>'
