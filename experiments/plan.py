"""Plans an experiment on a slice of a TPU pod without a TPU: whether it fits, its speed, and the cost of a run.

    python -m experiments.plan --config=configs/glam_pod.py --topology=v5e:4x4
    python -m experiments.plan --config=configs/glam_pod.py --topology=v4:4x4x4 --search --report=runs/plan.html

Parameters, FLOPs, memory of a device, every collective, the least time of a step, days, energy and carbon of a run, by
arithmetic on the config; then the train step itself is compiled for the slice by the TPU compiler (pip install .[tpu]),
which says whether it fits, and what it really sends. Topologies: v3, v4, v5e, v5p, v6e, tpu7x, as v4:8x8x16, or
2*v5e:16x16 for two slices. docs/planning.md has the formulas, what they assume and where each figure is from.
"""

import dataclasses
import pathlib
import runpy
import sys
from collections.abc import Callable, Mapping
from typing import Any

from absl import flags

from experiments import cli
from moe_jax.config import Experiment
from moe_jax.files import write_file
from moe_jax.plan import compile as compiler
from moe_jax.plan import sections
from moe_jax.plan.page import found_page, plan_page
from moe_jax.plan.plan import Site, plan, plan_to_dict
from moe_jax.plan.search import Option, option, search
from moe_jax.plan.sections import SearchTable
from moe_jax.plan.topology import Topology, side_lengths, topology

cli.define_config()
FLAGS = flags.FLAGS
TOPOLOGY = flags.DEFINE_string("topology", None, "CHIP:SHAPE of the slice, v4:8x8x16; N*CHIP:SHAPE for N slices.")
ANALYTIC = flags.DEFINE_bool("analytic", False, "Arithmetic only, nothing is compiled.")
SEARCH = flags.DEFINE_bool("search", False, "Try all meshes, exchanges, rematerialisations, pieces and ZeRO-1.")
BEST = flags.DEFINE_integer("best", 3, "How many of the options that a search finds are compiled.")
TOKENS = flags.DEFINE_float("tokens", None, "Tokens of the run (default: its authors', or those of the steps).")
PUE = flags.DEFINE_float("pue", None, "Power usage effectiveness of the data centre.")
CARBON = flags.DEFINE_float("carbon", None, "kg of CO2e per kWh of its grid.")
POWER = flags.DEFINE_float("power", None, "Mean power of a chip, with its part of the host, in W.")
PRICE = flags.DEFINE_float("price", None, "Price of a chip for an hour.")
REPORT = cli.report()
JSON = cli.as_json()


def main() -> None:
    exp = cli.experiment()
    if not TOPOLOGY.value:
        raise ValueError("No topology was given; say --topology=v4:4x4x4, for instance.")
    on, files = topology(TOPOLOGY.value), (cli.file("json", JSON.value), cli.file("report", REPORT.value))
    check_numbers()
    site = Site.of(on.chip, POWER.value, PUE.value, CARBON.value, PRICE.value)
    if SEARCH.value:
        searched(exp, on, site, *files)
    else:
        planned(on_mesh(exp, on), on, site, *files)


def check_numbers() -> None:
    for name, flag in (("tokens", TOKENS), ("power", POWER), ("carbon", CARBON), ("price", PRICE)):
        if flag.value is not None and not 0 < flag.value < float("inf"):
            raise ValueError(f"--{name}={flag.value:g} must be a positive number.")
    if PUE.value is not None and not 1 <= PUE.value < float("inf"):
        raise ValueError(f"--pue={PUE.value:g} must be at least 1, which is a data centre that wastes nothing.")
    if BEST.value < 0:
        raise ValueError(f"--best={BEST.value} must not be negative; 0 compiles nothing.")


def on_mesh(exp: Experiment, on: Topology) -> Experiment:
    """The experiment with a mesh that fills the topology, -1 being the rest."""
    return dataclasses.replace(exp, mesh=tuple(side_lengths(dict(exp.mesh), on).items()))


def published() -> Mapping[str, Any]:
    """The figures that the config file names as its model's, PUBLISHED; {} if it names none."""
    return runpy.run_path(str(cli.config_file(FLAGS["config"].value.partition(":")[0]))).get("PUBLISHED", {})


def planned(exp: Experiment, on: Topology, site: Site, table: pathlib.Path | None, report: pathlib.Path | None) -> None:
    """One plan, said and written."""
    if not ANALYTIC.value and compiler.available() is None:
        say(f"compiling the train step for {on.name}: seconds to minutes")
    said = published()
    found = plan(exp, on, site, tokens_of(said), said, ANALYTIC.value)
    print(sections.plan_text(sections.plan_sections(found)), sections.verdict(found), sep="\n\n")
    cli.write_json(table, plan_to_dict(found))
    write(report, lambda: plan_page(found))


def searched(
    exp: Experiment, on: Topology, site: Site, table: pathlib.Path | None, report: pathlib.Path | None
) -> None:
    """The options that fit, the first of them compiled."""
    found, missing = search(exp, on, max(10, BEST.value), say), compiler.available()
    compiled: dict[int, str] = {}
    if ANALYTIC.value or missing:
        say(f"nothing is compiled: {'not asked for' if ANALYTIC.value else missing}")
    else:
        for i, option in enumerate(found.options[: BEST.value]):
            say(f"compiling option {i + 1} of {min(BEST.value, len(found.options))}")
            compiled[i] = outcome(option.exp, on)
    done = SearchTable(found, on, site, tokens_of(published()), own(exp, on), compiled)
    print(sections.plan_text(sections.found_sections(done)), sections.found_verdict(found, on.name), sep="\n\n")
    if found.options:
        fitting = [i for i in range(len(found.options)) if not compiled.get(i, "").startswith("no")]
        print(f"The first{' that compiles' if compiled else ''}: {found.options[fitting[0]].flags}" if fitting else "")
    cli.write_json(table, {"topology": on.name, **plan_to_dict(found), "compiled": plan_to_dict(compiled)})
    write(report, lambda: found_page(done))


def tokens_of(said: Mapping[str, Any]) -> float | None:
    """Tokens of the whole run, as given or as its authors say; None where nobody does."""
    return TOKENS.value or (float(said["tokens"]) if said.get("tokens") else None)


def own(exp: Experiment, on: Topology) -> Option | None:
    """The config as it is, on its own mesh; None where that does not fill the topology."""
    try:
        return option(on_mesh(exp, on), on)
    except ValueError:
        return None


def outcome(exp: Experiment, on: Topology) -> str:
    """Outcome of an option by the compiler."""
    try:
        made = compiler.compile_step(exp, on.name)
    except ValueError as error:
        return f"no: {cli.one_line(error)}"
    return sections.size(made.peak) if made.fits else f"no, {sections.size(made.over)} too much"


def write(path: pathlib.Path | None, text: Callable[[], str]) -> None:
    if path is not None:
        write_file(path, text())
        say(f"written: {path}")


def say(text: str) -> None:
    """Progress, beside what is asked for."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main)
