"""What an audit has found, as one static HTML page."""

import html
from collections.abc import Sequence

from matplotlib import rc_context
from matplotlib.figure import Figure

from moe_jax.audit.communication import Row
from moe_jax.audit.experiment import Finding
from moe_jax.audit.placement import Placed
from moe_jax.config import Experiment
from moe_jax.report import COLOURS, PAGE, STYLE, figure_of


def findings_page(
    exp: Experiment, shrunk: list[str], found: Sequence[Finding], rows: Sequence[Row], placed: Sequence[Placed]
) -> str:
    """Everything inside one page: laws, communication (drawn too), placement of the real experiment, its config."""
    broken = sum(f.broken for f in found) + sum(not row.holds for row in rows)
    said = "; ".join(shrunk) or "nothing"
    parts = [
        f"<p>{broken} of {len(found) + len(rows)} findings break a law that the config claims. "
        f"Shrunk: {html.escape(said)}.</p>",
        table(("law", "tried on", "holds", "figure"), [_law(f) for f in found]),
        _drawn(rows),
        table(
            ("pass", "collective", "over", "count", "bytes", "on the wire", "predicted", "holds", "predicted for"),
            [_row(row) for row in rows],
        ),
        table(
            ("parameter", "shape", "spread over", "bytes on a device", "optimizer"),
            [_placed(p) for p in placed] + [_total(placed)],
        ),
        f"<details><summary>config</summary><pre>{html.escape(exp.to_json())}</pre></details>",
    ]
    return PAGE.replace("TITLE", "Audit").replace("BODY", "\n".join(parts))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f"<th>{html.escape(word)}</th>" for word in head)
    body = "".join(
        f"<tr><th>{html.escape(first)}</th>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    return f"<table><tr>{cells}</tr>{body}</table>"


def _law(f: Finding) -> tuple[str, ...]:
    held = "yes" if f.verdict.holds else "NO" if f.claimed else "no, nor claimed"
    return f.law, f.subject, held, f.verdict.detail


def _row(row: Row) -> tuple[str, ...]:
    c, held = row.compiled, "yes" if row.holds else "NO"
    numbers = (f"{c.count}", f"{c.bytes:,}", f"{c.wire:,.0f}", f"{row.predicted.bytes:,}")
    return row.part, c.op, " x ".join(c.axes), *numbers, held, row.detail or row.predicted.where


def _placed(p: Placed) -> tuple[str, ...]:
    return *p.words, f"{p.device_bytes:,}", f"{p.optimizer_bytes:,}"


def _total(placed: Sequence[Placed]) -> tuple[str, ...]:
    sums = (sum(p.device_bytes for p in placed), sum(p.optimizer_bytes for p in placed))
    return "on a device", "", "", *(f"{n:,}" for n in sums)


def _drawn(rows: Sequence[Row]) -> str:
    """Bytes of a step by collective and axes, on the wire, predicted beside compiled."""
    step = [row for row in rows if row.part == "step" and max(row.compiled.bytes, row.predicted.bytes)]
    with rc_context(STYLE):
        return figure_of("Communication of a step", "bytes that a device sends", _bars, step, wide=True) if step else ""


def _bars(figure: Figure, step: Sequence[Row]) -> None:
    axes, places = figure.subplots(), range(len(step))
    for name, shift, colour in (("predicted", -0.2, COLOURS[0]), ("compiled", 0.2, COLOURS[1])):
        wires = [getattr(row, name).wire for row in step]
        axes.barh([i + shift for i in places], wires, 0.38, color=colour, label=name)
    axes.set_yticks(list(places), [f"{row.compiled.op}, {' x '.join(row.compiled.axes)}" for row in step])
    axes.invert_yaxis()
    axes.legend()
