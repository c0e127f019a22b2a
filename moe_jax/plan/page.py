"""A plan, or what a search has found, as one static HTML page."""

import numpy as np

from moe_jax.costs.chips import GiB
from moe_jax.plan.plan import Plan
from moe_jax.plan.sections import (
    PlanSection,
    SearchTable,
    found_facts,
    found_sections,
    found_verdict,
    plan_sections,
    verdict,
)
from moe_jax.reporting import page, plots


def plan_page(plan: Plan) -> str:
    """Everything about a plan inside one page."""
    parts = [
        page.text(verdict(plan)),
        page.figure(times_figure(plan)),
        page.figure(memory_figure(plan)),
        *map(_section, plan_sections(plan)),
        page.folded("config", plan.exp.to_json()),
    ]
    return page.page(f"Plan for {plan.on.name}", parts)


def found_page(search: SearchTable) -> str:
    """The options of a search inside one page: as on the command line, with the flags that select each."""
    options, *rest = found_sections(search)
    rows = [(*row, option.flags) for row, option in zip(options.rows, search.shown, strict=True)]
    own = [i for i, option in enumerate(search.shown) if search.is_own(option)]
    parts = [
        page.text(found_verdict(search.found, search.on.name)),
        page.facts_list(found_facts(search)),
        page.heading(options.title),
        page.text(options.note),
        page.table((*options.head, "flags"), rows, words=True, marked=own),
        *map(_section, rest),
    ]
    return page.page(f"Search on {search.on.name}", parts)


def _section(section: PlanSection) -> str:
    note = page.text(section.note) if section.note else ""
    return f"<section>{page.heading(section.title)}{note}{page.table(section.head, section.rows)}</section>"


def times_figure(plan: Plan) -> plots.Plot:
    """Time of each part of a step."""
    parts = plan.roofline.parts
    note = "seconds of a device, each part alone"
    return plots.bars(list(parts), {"seconds": list(parts.values())}, "seconds", "A step", note, write="{:.3f}")


def memory_figure(plan: Plan) -> plots.Plot:
    """Bytes on a device in each phase, against its memory."""
    need, phases = plan.memory, plan.memory.phases
    state = (need.parameters + need.optimizer) / GiB
    values = {"state": np.full(len(phases), state), "phase": np.array(list(phases.values())) / GiB}
    note, room = "the state, and what a phase needs besides; line: all", plan.on.chip.usable / GiB
    return plots.bars(list(phases), values, "GiB", "Memory of a device", note, level=room, stacked=True)
