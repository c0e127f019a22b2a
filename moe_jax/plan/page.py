"""A plan, or what a search has found, as one static HTML page."""

from collections.abc import Sequence

import numpy as np

from moe_jax.plan.plan import Plan
from moe_jax.plan.search import Found
from moe_jax.plan.sections import Section, found_verdict, sections, verdict
from moe_jax.reporting import page, plots

GiB = 2**30


def plan_page(plan: Plan) -> str:
    """Everything about a plan inside one page."""
    parts = [
        page.text(verdict(plan)),
        page.figure(times(plan)),
        page.figure(memory(plan)),
        *map(_section, sections(plan)),
        page.folded("config", plan.exp.to_json()),
    ]
    return page.page(f"Plan for {plan.on.name}", parts)


def found_page(found: Found, on: str, shown: Sequence[Section]) -> str:
    """The options of a search inside one page; `shown` as on the command line."""
    return page.page(f"Search on {on}", [page.text(found_verdict(found, on)), *map(_section, shown)])


def _section(section: Section) -> str:
    note = page.text(section.note) if section.note else ""
    return f"<section>{page.heading(section.title)}{note}{page.table(section.head, section.rows)}</section>"


def times(plan: Plan) -> plots.Plot:
    """Time of each part of a step."""
    parts = plan.roofline.parts
    note = "seconds of a device, each part alone"
    return plots.bars(list(parts), {"seconds": list(parts.values())}, "seconds", "A step", note, write="{:.3f}")


def memory(plan: Plan) -> plots.Plot:
    """Bytes on a device in each phase, against its memory."""
    need, phases = plan.memory, plan.memory.phases
    state = (need.parameters + need.optimizer) / GiB
    values = {"state": np.full(len(phases), state), "phase": np.array(list(phases.values())) / GiB}
    note, room = "the state, and what a phase needs besides; line: all", plan.on.chip.usable / GiB
    return plots.bars(list(phases), values, "GiB", "Memory of a device", note, level=room, stacked=True)
