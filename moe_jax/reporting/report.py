"""The report of a run: one static HTML page, everything inside it, written from `metrics.jsonl` alone."""

from collections.abc import Sequence
from pathlib import Path

from moe_jax.files import write_file
from moe_jax.reporting import page, plots
from moe_jax.reporting.metrics import curve, last, read, summary_rows
from moe_jax.reporting.names import run_names

FILE = "report.html"
# What is drawn of MoE layers, a line for each: key, title, what it is, unit.
PANELS = (
    ("drop_rate", "Dropped choices", "fraction of the choices without a slot", "fraction dropped"),
    ("load_max_over_mean", "Load, busiest expert over mean", "1 is balanced", "max load / mean load"),
    ("dead_experts", "Dead experts", "experts that nobody chose", "experts"),
    ("router_entropy", "Router entropy", "of the router's distribution, per token", "nats"),
)


def write_report(
    workdir: str | Path,
    config_text: str,
    others: Sequence[str | Path] = (),
    file: str = FILE,
    reload: int | None = None,
) -> Path:
    """Writes and returns `workdir`/report.html; `others` are workdirs whose losses are shown beside its own.

    reload: seconds after which a browser reads it again, for a run in progress. ValueError where a run has no log.
    """
    workdir = Path(workdir)
    runs = {name: read(path) for name, path in run_names([workdir, *others]).items()}
    name = next(iter(runs))
    parts = [summary(runs), *figures(runs), page.folded("Resolved config", config_text)]
    return write_file(workdir / file, page.page(name, parts if runs[name] else [page.text("no records yet")], reload))


def summary(runs: plots.Runs) -> str:
    """A row per quantity, a column per run."""
    columns = [dict(summary_rows(records)) for records in runs.values()]
    words = dict.fromkeys(word for column in columns for word in column)
    head = ["", *runs] if len(runs) > 1 else []
    return page.table(head, [[word, *(column.get(word, "-") for column in columns)] for word in words])


def figures(runs: plots.Runs) -> list[str]:
    """The figures of the page, without those the run has no numbers for."""
    records = next(iter(runs.values()))
    drawn = [page.figure(plots.losses(runs)), page.figure(plots.losses(runs, "seconds"))]
    if curve(records, "moe.load")[0].size:
        drawn += moe_figures(records)
    if last(records, "eval").get("loss_by_domain"):
        drawn.append(page.figure(plots.domains(runs)))
    return drawn


def moe_figures(records: list[dict]) -> list[str]:
    shown = {"layer", "load", "load_cv", *(key for key, *_ in PANELS)}
    rest = [key for key in last(records, "train").get("moe", {}) if key not in shown]
    panels = [*PANELS, *((key, key.replace("_", " ").capitalize(), "unweighted", "per layer") for key in rest)]
    drawn = [page.figure(plots.loads(records), wide=True)]
    for key, title, note, unit in panels:
        if curve(records, f"moe.{key}")[1].ndim == 2:
            drawn.append(page.figure(plots.layers(records, key, title, note, unit)))
    if curve(records, "aux_loss")[0].size:
        drawn.append(page.figure(plots.auxiliary(records)))
    return drawn
