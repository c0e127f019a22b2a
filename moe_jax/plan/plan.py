"""Plan of a train step on a slice of a TPU pod: memory, time, and the cost of a whole run."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from moe_jax import costs
from moe_jax.audit.communication import ComparedCollective, compare_collectives
from moe_jax.config import Experiment
from moe_jax.costs.chips import Chip
from moe_jax.costs.communication import step
from moe_jax.costs.energy import CARBON, CARBON_SOURCE, PUE, PUE_SOURCE, Energy, energy
from moe_jax.costs.memory import Memory, memory
from moe_jax.plan import compile as compiler
from moe_jax.plan.roofline import Roofline, network_seconds, roofline
from moe_jax.plan.topology import Topology


class Site(NamedTuple):
    """Site of a run: power, carbon and price, every figure with its source."""

    watts: float | None  # of a chip, on average, with its part of the host; None where it is not published
    watts_source: str
    pue: float = PUE
    pue_source: str = PUE_SOURCE
    carbon: float = CARBON  # kg CO2e per kWh
    carbon_source: str = CARBON_SOURCE
    price: float | None = None  # of a chip for an hour

    @classmethod
    def of(
        cls,
        chip: Chip,
        watts: float | None = None,
        pue: float | None = None,
        carbon: float | None = None,
        price: float | None = None,
    ) -> "Site":
        """Builds a site from the given figures, and published ones where None."""
        given = "as given"
        return cls(
            *((chip.watts, chip.watts_source) if watts is None else (watts, given)),
            *((PUE, PUE_SOURCE) if pue is None else (pue, given)),
            *((CARBON, CARBON_SOURCE) if carbon is None else (carbon, given)),
            price,
        )


class RunCost(NamedTuple):
    """Cost of a run at a given step time."""

    seconds: float
    mfu: float
    tokens_per_day: float
    tokens: float
    steps: float
    days: float
    chip_hours: float
    energy: Energy | None
    price: float | None


class Plan(NamedTuple):
    """Plan of a train step: its memory, time and cost before it runs."""

    exp: Experiment  # whose mesh fills the topology
    on: Topology
    site: Site
    parameters: costs.ParameterCount
    published: Mapping[str, Any]  # of the model, by its authors; {} where its config has none
    memory: Memory
    roofline: Roofline
    runs: dict[str, RunCost]  # all overlapped, nothing overlapped; as scheduled, and with cheap fills, plus the network
    compiled: Any  # compile.Compiled, or None
    rows: list[ComparedCollective]  # collectives, predicted and compiled
    missing: str  # reason why nothing was compiled

    @property
    def room(self) -> float:
        """Predicted bytes left on a device; negative where the step does not fit."""
        return self.on.chip.usable - self.memory.total

    @property
    def fits(self) -> bool:
        """Tells whether the step fits: by the compiler where it was run, else by prediction."""
        return self.compiled.fits if self.compiled is not None else self.room >= 0


def plan(
    exp: Experiment,
    on: Topology,
    site: Site | None = None,
    tokens: float | None = None,
    published: Mapping[str, Any] | None = None,
    analytic: bool = False,
) -> Plan:
    """Plans an experiment whose mesh fills the topology; tokens: of the run; by default those of the config's steps.

    Unless `analytic`, the step is compiled if the compiler is installed. ValueError where that fails.
    """
    site, line = site or Site.of(on.chip), roofline(exp, on)
    missing = "not asked for" if analytic else (compiler.available() or "")
    compiled = None if missing else compiler.compile_step(exp, on.name)
    total = float(exp.run.steps * line.tokens) if tokens is None else tokens
    times = {"all overlapped": line.best, "nothing overlapped": line.worst}
    if compiled is not None and compiled.scheduled is not None:
        network = network_seconds(compiled.collectives, exp, on)
        times["as scheduled"] = compiled.scheduled + network
        if (cheap := compiled.without_fills) is not None:
            times["with cheap fills"] = cheap + network
    return Plan(
        exp,
        on,
        site,
        costs.parameters(exp.model),
        published or {},
        memory(exp, dict(exp.mesh)),
        line,
        {name: run_cost(line, on, site, seconds, total) for name, seconds in times.items()},
        compiled,
        compare_collectives(step(exp, dict(exp.mesh), "tpu"), compiled.collectives) if compiled else [],
        missing,
    )


def run_cost(line: Roofline, on: Topology, site: Site, seconds: float, tokens: float) -> RunCost:
    """Cost of a run over `tokens` tokens, whose steps take `seconds`."""
    steps = tokens / line.tokens
    hours = steps * seconds / 3600
    spent = None if site.watts is None else energy(hours, on.chips, site.watts, site.pue, site.carbon)
    price = None if site.price is None else hours * on.chips * site.price
    per_day = line.tokens / seconds * 86400
    return RunCost(seconds, line.mfu(seconds), per_day, tokens, steps, hours / 24, hours * on.chips, spent, price)


def plan_to_dict(value: Any) -> Any:
    """Converts a plan, or a part of one, to JSON types."""
    if isinstance(value, Experiment):
        return value.to_json()
    if hasattr(value, "_asdict"):
        extra = {"total": value.total} if hasattr(value, "total") else {}
        extra |= {"active": value.active} if isinstance(value, costs.ParameterCount) else {}
        return {name: plan_to_dict(part) for name, part in value._asdict().items()} | extra
    if isinstance(value, Mapping):
        return {str(name): plan_to_dict(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plan_to_dict(part) for part in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
