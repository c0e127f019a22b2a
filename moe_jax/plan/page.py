"""A plan, or what a search has found, as one static HTML page."""

import html
from collections.abc import Sequence

from matplotlib import rc_context
from matplotlib.figure import Figure

from moe_jax.audit.page import table
from moe_jax.plan.plan import Plan
from moe_jax.plan.search import Found
from moe_jax.plan.sections import Section, found_verdict, sections, verdict
from moe_jax.report import COLOURS, PAGE, STYLE, figure_of


def page(plan: Plan) -> str:
    """Everything about a plan inside one page."""
    with rc_context(STYLE):
        drawn = [
            figure_of("A step", "seconds of a device, each part alone", _times, plan),
            figure_of("Memory of a device", "GiB: the state, and what a phase needs besides; line: all", _memory, plan),
        ]
    parts = [f"<p>{html.escape(verdict(plan))}</p>", *drawn, *map(_section, sections(plan))]
    parts.append(f"<details><summary>config</summary><pre>{html.escape(plan.exp.to_json())}</pre></details>")
    return PAGE.replace("TITLE", html.escape(f"Plan for {plan.on.name}")).replace("BODY", "\n".join(parts))


def found_page(found: Found, on: str, shown: Sequence[Section]) -> str:
    """The options of a search inside one page; `shown` as on the command line."""
    parts = [f"<p>{html.escape(found_verdict(found, on))}</p>", *map(_section, shown)]
    return PAGE.replace("TITLE", html.escape(f"Search on {on}")).replace("BODY", "\n".join(parts))


def _section(section: Section) -> str:
    note = f"<p>{html.escape(section.note)}</p>" if section.note else ""
    return f"<section><h2>{html.escape(section.title)}</h2>{note}{table(section.head, section.rows)}</section>"


def _times(figure: Figure, plan: Plan) -> None:
    axes, parts = figure.subplots(), plan.roofline.parts
    bars = axes.barh(list(parts), list(parts.values()), color=COLOURS[: len(parts)])
    axes.bar_label(bars, fmt="%.3f", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.15)


def _memory(figure: Figure, plan: Plan) -> None:
    axes, need = figure.subplots(), plan.memory
    state = (need.parameters + need.optimizer) / 2**30
    for phase, n in need.phases.items():
        axes.barh(phase, state, color=COLOURS[0])
        axes.barh(phase, n / 2**30, left=state, color=COLOURS[1])
    axes.axvline(plan.on.chip.usable / 2**30, color=COLOURS[5])
    axes.invert_yaxis()
