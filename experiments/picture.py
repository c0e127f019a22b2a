"""Draws the parts of an MoE layer and who is registered for each, as an SVG: the picture of README.

python -m experiments.picture --out=docs/parts.svg
"""

import html
from collections.abc import Iterable

from experiments import cli
from moe_jax.dispatch import DISPATCHERS
from moe_jax.exchanges import EXCHANGES
from moe_jax.experts import EXPERTS
from moe_jax.files import write_file
from moe_jax.gating import GATING
from moe_jax.routers import ROUTERS

OUT = cli.out("The SVG file to write; without it the SVG is printed.")

WIDTH, HEIGHT = 880, 236
TOP, TALL = 56, 150  # of the boxes
STYLE = (
    "text{font-family:system-ui,sans-serif;font-size:12px;fill:#1f2328}.t{font-weight:600;font-size:14px}"
    ".n{font-size:11px;fill:#57606a}.c{font-family:ui-monospace,monospace;font-size:11px;fill:#57606a}"
)
STROKE = 'fill="none" stroke="#57606a" stroke-width="1.5"'
FILL = {"part": "#ddf4ff", "data": "#fff8c5"}


def names(components: Iterable[type], most: int) -> list[str]:
    """Lists names of components, at most so many lines, the number of the others in the last."""
    found = [c.__name__ for c in components]
    return found if len(found) <= most else [*found[: most - 1], f"and {len(found) - most + 1} more"]


def box(x: int, wide: int, kind: str, title: str, lines: Iterable[str], code: Iterable[str] = ()) -> str:
    """A box with a title, lines that explain it, and names."""
    parts = [f'<rect x="{x}" y="{TOP}" width="{wide}" height="{TALL}" rx="8" fill="{FILL[kind]}" stroke="#8c959f"/>']
    parts.append(f'<text class="t" x="{x + 10}" y="{TOP + 22}">{html.escape(title)}</text>')
    rows = [("n", line) for line in lines] + [("c", line) for line in code]
    for i, (style, line) in enumerate(rows):
        parts.append(f'<text class="{style}" x="{x + 10}" y="{TOP + 40 + 15 * i}">{html.escape(line)}</text>')
    return "".join(parts)


def arrow(x: int, end: int, y: int, label: str = "") -> str:
    """A horizontal arrow from x to end, with a label above it."""
    head = 5 if end > x else -5
    line = f'<path d="M{x} {y}H{end}m{-head} -4l{head} 4l{-head} 4" {STROKE}/>'
    middle = (x + end) // 2
    return line + (f'<text class="c" x="{middle}" y="{y - 7}" text-anchor="middle">{label}</text>' if label else "")


def picture() -> str:
    """Returns the SVG."""
    routers = ["who goes where,", "with what weight"]
    data = ["plain data:", "experts and combine", "weights per token,", "or tokens per slot"]
    boxes = [
        box(70, 150, "part", "router + gating", routers, [*names(ROUTERS, 4), f"{len(GATING)} transforms of any"]),
        box(264, 130, "data", "routing", data),
        box(438, 122, "part", "dispatch", ["rows to experts,", "and back, weighted"], names(DISPATCHERS, 5)),
        box(604, 130, "part", "exchange", ["rows across devices:", "the collectives"], names(EXCHANGES, 5)),
        box(778, 94, "part", "experts", ["a network", "each"], names(EXPERTS, 5)),
    ]
    arrows = [
        arrow(4, 66, TOP + 75, "x_GSD"),
        arrow(222, 260, TOP + 75),
        arrow(396, 434, TOP + 75),
        arrow(562, 600, TOP + 55),
        arrow(736, 774, TOP + 55),
        arrow(774, 738, TOP + 105),
        arrow(600, 564, TOP + 105),
    ]
    middle = f'<path d="M499 {TOP + TALL}V{TOP + TALL + 20}H36" {STROKE}/>'
    out = arrow(40, 4, TOP + TALL + 20) + f'<text class="c" x="70" y="{TOP + TALL + 14}">y_GSD, kept</text>'
    title = (
        '<text class="t" x="4" y="20">An MoE layer is independent parts</text>'
        '<text class="n" x="4" y="38">each is one component in a config; a new one is one file and one name</text>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="router, routing, dispatch, exchange, experts"><style>{STYLE}</style>'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>{title}{"".join(boxes)}{"".join(arrows)}{middle}{out}'
        "</svg>\n"
    )


def main() -> None:
    path = cli.file("out", OUT.value, (".svg",))
    if path is None:
        print(picture(), end="")
    else:
        write_file(path, picture())


if __name__ == "__main__":
    cli.run(main)
