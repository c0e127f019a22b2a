"""Findings of an audit as one static HTML page."""

from collections.abc import Sequence

from moe_jax.audit.communication import ComparedCollective
from moe_jax.audit.experiment import Finding
from moe_jax.audit.placement import ParamPlacement
from moe_jax.config import Experiment
from moe_jax.reporting import page, plots


def findings_page(
    exp: Experiment,
    shrunk: list[str],
    found: Sequence[Finding],
    rows: Sequence[ComparedCollective],
    placed: Sequence[ParamPlacement],
) -> str:
    """Everything inside one page: laws, communication (drawn too), placement of the real experiment, its config."""
    broken = sum(f.broken for f in found) + sum(not row.holds for row in rows)
    parts = [
        page.text(
            f"{broken} of {len(found) + len(rows)} findings break a law that the config claims. "
            f"Shrunk: {'; '.join(shrunk) or 'nothing'}."
        ),
        page.table(("law", "tried on", "holds", "figure"), [_law(f) for f in found]),
        *([page.figure(drawn(step), wide=True)] if (step := _of_step(rows)) else []),
        page.table(
            ("pass", "collective", "over", "count", "bytes", "on the wire", "predicted", "holds", "predicted for"),
            [_row(row) for row in rows],
        ),
        page.table(
            ("parameter", "shape", "spread over", "bytes on a device", "optimizer"),
            [_placed(p) for p in placed] + [_total(placed)],
        ),
        page.folded("config", exp.to_json()),
    ]
    return page.page("Audit", parts)


def _law(f: Finding) -> tuple[str, ...]:
    held = "yes" if f.verdict.holds else "NO" if f.claimed else "no, nor claimed"
    return f.law, f.subject, held, f.verdict.detail


def _row(row: ComparedCollective) -> tuple[str, ...]:
    c, held = row.compiled, "yes" if row.holds else "NO"
    numbers = (f"{c.count}", f"{c.bytes:,}", f"{c.wire:,.0f}", f"{row.predicted.bytes:,}")
    return row.part, c.op, " x ".join(c.axes), *numbers, held, row.detail or row.predicted.where


def _placed(p: ParamPlacement) -> tuple[str, ...]:
    return *p.words, f"{p.device_bytes:,}", f"{p.optimizer_bytes:,}"


def _total(placed: Sequence[ParamPlacement]) -> tuple[str, ...]:
    sums = (sum(p.device_bytes for p in placed), sum(p.optimizer_bytes for p in placed))
    return "on a device", "", "", *(f"{n:,}" for n in sums)


def _of_step(rows: Sequence[ComparedCollective]) -> list[ComparedCollective]:
    """Section on the collectives of a step."""
    return [row for row in rows if row.part == "step" and max(row.compiled.bytes, row.predicted.bytes)]


def drawn(step: Sequence[ComparedCollective]) -> plots.Plot:
    """Bytes by collective and axes, on the wire, predicted beside compiled."""
    names = [f"{row.compiled.op}, {' x '.join(row.compiled.axes)}" for row in step]
    wires = {name: [getattr(row, name).wire for row in step] for name in ("predicted", "compiled")}
    return plots.bars(names, wires, "bytes", "Communication of a step", "bytes that a device sends", plots.WIDE)
