"""Findings of an audit as one static HTML page."""

from collections.abc import Sequence

from moe_jax.audit.communication import ComparedCollective
from moe_jax.audit.experiment import Finding
from moe_jax.audit.placement import ParamPlacement
from moe_jax.audit.sentences import COMMUNICATION, broken, by_law, sentence
from moe_jax.config import Experiment
from moe_jax.costs.headline import headline
from moe_jax.reporting import page, plots


def findings_page(
    exp: Experiment,
    shrunk: list[str],
    found: Sequence[Finding],
    rows: Sequence[ComparedCollective],
    placed: Sequence[ParamPlacement],
) -> str:
    """Everything inside one page: a sentence for each law, open where it is broken; placement, and the config."""
    wrong = sum(map(broken, found)) + sum(map(broken, rows))
    placement = page.table(
        ("parameter", "shape", "spread over", "bytes on a device", "optimizer"),
        [_placed(p) for p in placed] + [_total(placed)],
    )
    parts = [
        page.text(f"{wrong} of {len(found) + len(rows)} findings break a law that the config claims."),
        page.facts_list({**headline(exp), "shrunk": "; ".join(shrunk) or "nothing"}),
        *(_law(law, rows if law == COMMUNICATION else its) for law, its in by_law(found).items()),
        page.details("Placement: which parameter lies where, and the bytes on a device, as configured", [placement]),
        page.folded("Config", exp.to_json()),
    ]
    return page.page("Audit", parts)


def _law(law: str, found: Sequence[Finding | ComparedCollective]) -> str:
    """The sentence of a law; its details are open where it is broken."""
    if not found:
        return page.text(sentence(law, found))
    findings = [f for f in found if isinstance(f, Finding)]
    rows = [r for r in found if isinstance(r, ComparedCollective)]
    inside = []
    if findings:
        inside.append(page.table(("tried on", "holds", "figure"), [_finding(f) for f in findings], words=True))
    if rows:
        head = ("pass", "collective", "over", "count", "bytes", "on the wire", "predicted", "holds", "predicted for")
        inside += [page.figure(drawn(step), wide=True)] if (step := _of_step(rows)) else []
        inside.append(page.table(head, [_row(row) for row in rows], words=True))
    return page.details(sentence(law, found), inside, shown=any(map(broken, found)))


def _finding(f: Finding) -> tuple[str, ...]:
    held = "yes" if f.verdict.holds else "NO" if f.claimed else "no, nor claimed"
    return f.subject, held, f.verdict.detail


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
