"""A plan as sections, which are a text or part of a page; and so are the options of a search."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from moe_jax.costs.headline import headline, mesh_words
from moe_jax.plan.compile import Compiled
from moe_jax.plan.kernels import REACHED
from moe_jax.plan.plan import Plan, RunCost, Site, run_cost
from moe_jax.plan.search import Found, Option
from moe_jax.plan.topology import Topology

Rows = list[tuple[str, ...]]


class PlanSection(NamedTuple):
    """A table with a title; the first column is left-aligned."""

    title: str
    note: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def plan_text(sections: Sequence[PlanSection]) -> str:
    """Tables of aligned columns, one below the other."""
    return "\n\n".join("\n".join(text_lines(section)) for section in sections)


def text_lines(section: PlanSection) -> Iterator[str]:
    cells = [section.head, *section.rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(section.head))]
    prose = section.head[-1] in PROSE
    yield section.title + (f" ({section.note})" if section.note else "")
    for row in cells:
        last = row[-1].ljust(widths[-1]) if prose else row[-1].rjust(widths[-1])
        numbers = [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True)]
        yield "  " + "  ".join([row[0].ljust(widths[0]), *numbers, *([last] if len(row) > 1 else [])]).rstrip()


UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
PROSE = ("source", "for", "which", "example")  # heads of columns that hold sentences


# ---------------------------------------------------------------- of a plan


def verdict(plan: Plan) -> str:
    """Verdict of a plan: whether it fits, and its speed, in a sentence or two."""
    by = "compiled" if plan.compiled is not None else "predicted"
    best, worst = plan.roofline.best, plan.roofline.worst
    over = plan.compiled.over if plan.compiled is not None else -plan.room
    fits = "fits" if plan.fits else f"does not fit, by {size(over)} a device"
    return (
        f"{plan.on.name}, {plan.on.chips:,} chips: {fits} ({by}). "
        f"A step takes {seconds(best)} to {seconds(worst)}, bound by {plan.roofline.bound}: "
        f"MFU {plan.roofline.mfu(worst):.0%} to {plan.roofline.mfu(best):.0%}."
    )


def plan_sections(plan: Plan) -> list[PlanSection]:
    """All of a plan."""
    found = [
        model_section(plan),
        step_section(plan),
        memory_section(plan),
        network_section(plan),
        times_section(plan),
        run_section(plan),
    ]
    return [*found, *compiled(plan), sources(plan)]


def model_section(plan: Plan) -> PlanSection:
    count, said = plan.parameters, plan.published
    rows: Rows = [(name, f"{kind.total:,}", f"{kind.active:,}") for name, kind in count.kinds.items() if kind.total]
    rows.append(("in all", f"{count.total:,}", f"{count.active:,}"))
    note = ""
    if said:
        pairs = (("total", count.total), ("active", count.active))
        rows.append(("published", *(str(said.get(name, "")) for name, _ in pairs)))
        rows.append(
            ("difference", *(f"{n / number(said[name]) - 1:+.1%}" if said.get(name) else "" for name, n in pairs))
        )
        why = [f"{name}: {reason}" for name, reason in said.get("differs", {}).items()]
        note = "; ".join([*(str(said[key]) for key in ("source", "note") if said.get(key)), *why])
    return PlanSection("Parameters", note, ("kind", "total", "active"), rows)


def number(said: str | float | int) -> float:
    """A figure as it is printed, 96.6B."""
    if not isinstance(said, str):
        return float(said)
    return float(said.rstrip("KMBT")) * {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(said[-1], 1.0)


def step_section(plan: Plan) -> PlanSection:
    line, n = plan.roofline, plan.on.devices
    rows: Rows = [
        ("tokens", f"{line.tokens:,}", f"{line.tokens / n:,.0f}"),
        ("model FLOPs", f"{line.flops * n:.3e}", f"{line.flops:.3e}"),
        ("executed FLOPs", f"{line.executed * n:.3e}", f"{line.executed:.3e}"),
        *((f"HBM bytes, {name}", size(moved * n), size(moved)) for name, moved in line.memory.items()),
    ]
    return PlanSection("A step", mesh_words(plan.exp.mesh), ("", "in all", "a device"), rows)


def memory_section(plan: Plan) -> PlanSection:
    need = plan.memory
    rows: Rows = [(name, size(n)) for name, n in need._asdict().items()]
    rows += [(f"at once, besides the state: {phase}", size(n)) for phase, n in need.phases.items()]
    rows += [("state and the largest phase", size(need.total)), ("what a program may use", size(plan.on.chip.usable))]
    return PlanSection("Memory of a device", "predicted; parameters and optimizer are the state", ("", "bytes"), rows)


def network_section(plan: Plan) -> PlanSection:
    rows: Rows = [
        (
            f"{s.what.op} over {' x '.join(s.what.axes)}",
            f"{s.what.count:,}",
            size(s.wire),
            f"{s.wire / s.seconds / 1e9:,.0f}" if s.seconds else "-",
            seconds(s.seconds),
            s.what.where,
        )
        for s in plan.roofline.sent
        if s.seconds >= plan.roofline.network / 1000
    ]
    head = ("collective", "count", "sent", "GB/s", "alone", "for")
    return PlanSection("Collectives of a device", "those of a thousandth of the network's time and more", head, rows)


def times_section(plan: Plan) -> PlanSection:
    line = plan.roofline
    rows: Rows = [(name, seconds(took), f"{took / line.best:.0%}") for name, took in line.parts.items()]
    rows += [("all overlapped", seconds(line.best), f"MFU {line.mfu(line.best):.1%}")]
    rows += [("nothing overlapped", seconds(line.worst), f"MFU {line.mfu(line.worst):.1%}")]
    return PlanSection("Time of a step", f"bound by {line.bound}", ("", "seconds", ""), rows)


def run_section(plan: Plan) -> PlanSection:
    runs = list(plan.runs.values())

    def row(name: str, what: Callable[[RunCost], str]) -> tuple[str, ...]:
        return name, *(what(r) for r in runs)

    def spent(what: Callable[[Any], str]) -> tuple[str, ...]:
        return tuple("unknown" if r.energy is None else what(r.energy) for r in runs)

    rows: Rows = [
        row("tokens a day", lambda r: f"{r.tokens_per_day:.3g}"),
        row("steps", lambda r: f"{r.steps:,.0f}"),
        row("days", lambda r: f"{r.days:,.1f}"),
        row("chip-hours", lambda r: f"{r.chip_hours:,.0f}"),
        ("energy, MWh", *spent(lambda e: f"{e.mwh:,.1f}")),
        ("carbon, tCO2e", *spent(lambda e: f"{e.tco2e:,.1f}")),
    ]
    if plan.site.price is not None:
        rows.append(row("price", lambda r: f"{r.price:,.0f}"))
    return PlanSection("The run", f"{runs[0].tokens:.4g} tokens", ("", *plan.runs), rows)


def compiled(plan: Plan) -> list[PlanSection]:
    """Sections with the compiler's figures; none where it was not run."""
    c = plan.compiled
    if c is None:
        return []
    known = {"arguments": c.arguments, "temporaries": c.temporaries}
    rows: Rows = [("fits", "yes" if c.fits else "NO"), ("peak", size(c.peak)), ("limit", size(c.limit))]
    rows += [("too much", size(c.over))] * bool(c.over)
    rows += [(name, size(n)) for name, n in known.items() if n is not None]
    rows += [("peak, predicted", f"{size(plan.memory.total)}, {plan.memory.total / c.peak - 1:+.0%}")]
    if c.flops is not None:
        rows += [
            ("FLOPs of matrices", f"{c.flops:.3e}"),
            ("executed, predicted", f"{plan.roofline.executed:.3e}"),
        ]
    if c.optimal_seconds is not None:
        predicted = plan.roofline.compute + plan.roofline.hbm
        rows += [("compute and memory, estimated", seconds(c.optimal_seconds))]
        rows += [("kernels without an estimate", seconds(sum(k.seconds for k in c.kernels)))] * bool(c.kernels)
        rows += odd_fill_rows(c)
        rows += [("compute and memory, predicted", seconds(predicted))]
    rows += [("to trace, to compile", f"{c.lower_seconds:.0f} s, {c.compile_seconds:.0f} s")]
    rows += [("memory of this host", size(c.host_bytes))]
    found = [PlanSection("Compiled", "of a device, by the TPU compiler", ("", ""), rows)]
    sent: Rows = [
        (
            f"{r.compiled.op} over {' x '.join(r.compiled.axes)}",
            f"{r.compiled.count:,}",
            size(r.compiled.bytes),
            size(r.predicted.bytes),
            "yes" if r.holds else f"{r.compiled.bytes / r.predicted.bytes:.2f} times" if r.predicted.bytes else "no",
        )
        for r in plan.rows
    ]
    found += [kernel_section(c)] * bool(c.kernels)
    head = ("collective", "count", "compiled", "predicted", "as predicted")
    found += [PlanSection("Collectives, compiled against predicted", "", head, sent)] * bool(sent)
    hidden: Rows = [
        (f"{o.op}, {o.how}", f"{o.count:,}", size(o.bytes), "-" if o.seconds is None else seconds(o.seconds))
        for o in c.overlaps
    ]
    note = "what is computed while they travel, by the compiler's estimate"
    titles = ("collective", "count", "bytes", "computed meanwhile")
    return found + [PlanSection("Overlap", note, titles, hidden)] * bool(hidden)


def odd_fill_rows(c: Compiled) -> Rows:
    """Rows about fills whose estimate is odd, and the sum without it; none where there are none."""
    if c.fills is None or not c.fills.count:
        return []
    said = f"{size(c.fills.bytes)} in {seconds(c.fills.seconds)}, {seconds(c.fills.at_bandwidth)} at HBM's bandwidth"
    return [("of it fills, oddly priced", said), ("all, fills at HBM's bandwidth", seconds(c.without_fills or 0.0))]


def kernel_section(c: Compiled) -> PlanSection:
    """Kernels by name, and how they are priced."""
    rows: Rows = [
        (k.name, f"{k.count:,}", f"{k.flops:.2e}", size(k.bytes), seconds(k.seconds), k.where) for k in c.kernels
    ]
    note = f"the compiler gives no estimate: used rows at {REACHED:.0%} of the chip's peak or at HBM's bandwidth"
    return PlanSection("Kernels", note, ("kernel", "count", "FLOPs", "bytes", "seconds", "for"), rows)


def sources(plan: Plan) -> PlanSection:
    """Sources of every figure, and assumptions."""
    chip, site = plan.on.chip, plan.site
    power = "not known" if site.watts is None else f"{site.watts:g} W a chip"
    rows: Rows = [
        ("compute", f"{chip.flops / 1e12:g} TFLOP/s a chip", f"dense bfloat16; {chip.source}"),
        ("memory", f"{chip.hbm_rate / 1e9:g} GB/s a chip", chip.source),
        ("links", f"{2 * chip.dims} of {chip.link / 1e9:g} GB/s, each way", chip.source),
        ("usable memory", f"{size(chip.usable)} a device", "what the compiler allows a program"),
        ("power", power, site.watts_source),
        ("PUE", f"{site.pue:g}", site.pue_source),
        ("grid", f"{site.carbon:g} kg CO2e per kWh", site.carbon_source),
    ]
    rows += [("price", f"{site.price:g} a chip-hour", "as given")] if site.price is not None else []
    rows += [("between slices", f"{chip.dcn / 1e9:g} GB/s a chip", chip.source)] if plan.on.slices > 1 else []
    rows += [("not compiled", "", plan.missing)] if plan.missing else []
    return PlanSection("Sources", "", ("", "figure", "source"), rows)


# ---------------------------------------------------------------- searches


def found_verdict(found: Found, on: str) -> str:
    if found.options:
        return f"{on}: {len(found.options)} of the options that fit, the fastest first."
    if found.smallest is None:
        return f"{on}: no mesh can be built whose devices hold the parameters and what the optimizer remembers."
    return f"{on}: nothing fits; the least is {size(found.smallest.memory.total)} a device."


class SearchTable(NamedTuple):
    """A search and what it was for."""

    found: Found
    on: Topology
    site: Site
    tokens: float | None  # of the whole run, if not the config's steps
    own: Option | None  # the config as it is, on its own mesh; None where that does not fill the topology
    compiled: Mapping[int, str]  # what the compiler says of the first options, by place

    @property
    def shown(self) -> list[Option]:
        """The options, or what needs least memory where nothing fits; then the config, if its mesh is not there."""
        options = self.found.options or ([self.found.smallest] if self.found.smallest else [])
        return [*options, *([self.own] if self.own and not any(map(self.is_own, options)) else [])]

    def is_own(self, option: Option) -> bool:
        return self.own is not None and option.exp.mesh == self.own.exp.mesh

    def mark(self, option: Option) -> str:
        """A word beside the config's own mesh."""
        if not self.is_own(option):
            return ""
        return " (config)" if option.memory.total <= self.on.chip.usable else " (config, too large)"

    def run(self, option: Option) -> RunCost:
        """The whole run, with nothing overlapped."""
        tokens = self.tokens or float(option.exp.run.steps * option.roofline.tokens)
        return run_cost(option.roofline, self.on, self.site, option.seconds, tokens)


def found_facts(search: SearchTable) -> dict[str, str]:
    """Facts about the run: what is placed, and what it costs on the first option; {} where no mesh can be built."""
    exp = search.shown[0].exp if search.shown else None
    if exp is None:
        return {}
    about = headline(exp)
    facts = {name: about[name] for name in ("model", "parameters", "data")}
    run = search.run(search.shown[0])
    steps = f"{run.tokens:.4g} tokens in {run.steps:,.0f} steps"
    price = f"{few(run.chip_hours)} chip-hours"
    if run.price is not None:
        price += f", {few(run.price)} at {search.site.price:g} a chip-hour"
    facts |= {"run": steps, "days": f"{few(run.days)}, of the first option, nothing overlapped", "price": price}
    if search.own is not None:
        facts["mesh of the config"] = mesh_words(search.own.exp.mesh)
    else:
        facts["mesh of the config"] = "does not fill this topology"
    return facts


def found_sections(search: SearchTable) -> list[PlanSection]:
    """The options, the config's own mesh marked, what the compiler says of the first, why others are not there."""
    found = search.found
    rows = [
        (
            option.words["mesh"] + search.mark(option),
            *list(option.words.values())[1:],
            size(option.memory.total),
            seconds(option.roofline.best),
            seconds(option.seconds),
            f"{option.roofline.mfu(option.seconds):.0%}",
            few(search.run(option).days),
            option.roofline.bound,
            search.compiled.get(i, ""),
        )
        for i, option in enumerate(search.shown)
    ]
    head = (
        "mesh",
        "exchange",
        "remat",
        "microbatches",
        "zero1",
        "memory",
        "overlapped",
        "not",
        "MFU",
        "days",
        "bound by",
        "compiled",
    )
    refused = [(why, f"{n:,}") for why, n in found.refused.items()]
    refused += [("the state alone is more than a device has", f"{found.large:,}")] * bool(found.large)
    sections = [PlanSection("Options", f"{found.tried:,} tried on {found.meshes:,} meshes", head, rows)]
    return sections + [PlanSection("Left out", "", ("why", "meshes"), refused)] * bool(refused)


def size(n: float | int) -> str:
    """Bytes, in three digits."""
    unit = next((u for u in ("TiB", "GiB", "MiB", "KiB") if n >= UNITS[u]), "B")
    value = n / UNITS[unit]
    return f"{value:.0f} {unit}" if value >= 100 or unit == "B" else f"{value:.3g} {unit}"


def few(n: float) -> str:
    """A number in the digits that a reader needs."""
    return f"{n:,.0f}" if n >= 100 else f"{n:.3g}"


def seconds(n: float | int) -> str:
    return f"{n:.3f} s" if n >= 0.01 or not n else f"{1000 * n:.3f} ms" if n >= 1e-5 else f"{1e6 * n:.1f} us"
