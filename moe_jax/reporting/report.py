"""The report of a run: one static HTML page, everything inside it, written from `metrics.jsonl` alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from moe_jax.files import write_file
from moe_jax.reporting import page, plots
from moe_jax.reporting.formulas import AUXILIARY, HIDDEN, LOSS, METRICS, SYMBOLS, Metric
from moe_jax.reporting.metrics import curve, last, read, summary_rows
from moe_jax.reporting.names import run_names
from moe_jax.reporting.verdict import run_verdict

FILE = "report.html"
FIRST = ("drop_rate", "load_max_over_mean", "dead_experts", "router_entropy")  # of the metrics of MoE layers


def write_report(
    workdir: str | Path,
    config_text: str,
    others: Sequence[str | Path] = (),
    file: str = FILE,
    reload: int | None = None,
    about: Mapping[str, str] | None = None,
    steps: int | None = None,
) -> Path:
    """Writes and returns `workdir`/report.html; `others` are workdirs whose losses are shown beside its own.

    reload: seconds after which a browser reads it again, for a run in progress. about: what the run is, by name (see
    `costs.headline`). steps: how many the config asks for. ValueError where a run has no log.
    """
    workdir = Path(workdir)
    runs = {name: read(path) for name, path in run_names([workdir, *others]).items()}
    name = next(iter(runs))
    parts = [*head(runs, about or {}, steps), page.text("no records yet")]
    if runs[name]:
        parts = [*parts[:-1], summary(runs), *figures(runs)]
    return write_file(workdir / file, page.page(name, [*parts, page.folded("Resolved config", config_text)], reload))


def head(runs: plots.Runs, about: Mapping[str, str], steps: int | None = None) -> list[str]:
    """The question, the verdict, and what was run; without rows for what is not known."""
    start = last(next(iter(runs.values())), "start")
    rows = dict(about)
    if "data" in start:
        rows["data"] = "; ".join([*([rows["data"]] if "data" in rows else []), f"fingerprint {start['data'][:16]}"])
    if "command" in start:
        rows["command"] = start["command"]
    said = " ".join(run_verdict(runs, steps))
    question = [page.heading(start["question"])] if "question" in start else []
    return [*question, *([page.text(said)] if said else []), *([page.facts_list(rows)] if rows else [])]


def summary(runs: plots.Runs) -> str:
    """A row per quantity, a column per run."""
    columns = [dict(summary_rows(records)) for records in runs.values()]
    words = dict.fromkeys(word for column in columns for word in column)
    head = ["", *runs] if len(runs) > 1 else []
    return page.table(head, [[word, *(column.get(word, "-") for column in columns)] for word in words])


def figures(runs: plots.Runs) -> list[str]:
    """The figures of the page; of what is constant a sentence, of what was not measured nothing."""
    records = next(iter(runs.values()))
    drawn = loss_figures(runs)
    if curve(records, "moe.load")[0].size:
        drawn += moe_figures(records)
    if np.isfinite([v for v in last(records, "eval").get("loss_by_domain", {}).values() if v is not None]).any():
        drawn.append(page.figure(plots.domains(runs)))
    return drawn


def loss_figures(runs: plots.Runs) -> list[str]:
    """Loss by steps and by time, where any run has two finite losses to draw; or else a sentence."""
    for records in runs.values():
        if any(np.isfinite(curve(records, "loss", kind)[1]).sum() > 1 for kind in ("train", "eval")):
            return [page.figure(plots.losses(runs)), page.figure(plots.losses(runs, "seconds"))]
    steps, losses = curve(next(iter(runs.values())), "loss")
    return [constant(Metric("Training loss", LOSS, "nats"), steps, losses)] if losses.size else []


def moe_figures(records: list[dict]) -> list[str]:
    """The load as a heat map, and every other metric of MoE layers that there is: first those that change."""
    layers, known = last(records, "train")["moe"], [*FIRST, *METRICS]
    order = [key for key in dict.fromkeys([*known, *layers]) if key in layers and key not in ("layer", "load", *HIDDEN)]
    drawn, said = [page.text(SYMBOLS), page.figure(plots.loads(records), wide=True)], list[str]()
    for key in order:
        metric = METRICS.get(key, Metric(key.replace("_", " ").capitalize(), "", "per layer"))
        steps, values = curve(records, f"moe.{key}")
        if values.ndim == 2:
            if changing_metrics(values):
                drawn.append(page.figure(plots.layers(records, key, *metric)))
            elif np.isfinite(values).any():
                said.append(constant(metric, steps, values))
    steps, values = curve(records, "aux_loss")
    if changing_metrics(values):
        drawn.append(page.figure(plots.auxiliary(records, *AUXILIARY)))
    elif np.isfinite(values).any():
        said.append(constant(AUXILIARY, steps, values))
    return drawn + said


def changing_metrics(values: np.ndarray) -> bool:
    """Returns whether a series, [n] or [n, layers], has two different finite values of anything."""
    series = [v[np.isfinite(v)] for v in values.reshape(len(values), -1).T] if values.size else []
    return any(v.size and np.ptp(v) > 0 for v in series)


def constant(metric: Metric, steps: np.ndarray, values: np.ndarray) -> str:
    """A sentence about a series that is the same in all its records, with its formula; values [n] or [n, layers]."""
    series = [(v[np.isfinite(v)], v.size) for v in values.reshape(len(values), -1).T]
    known = [(v, n) for v, n in series if v.size]
    shown = [f"{v[0]:.6g}" for v, _ in known]
    words = "not finite" if not shown else shown[0] if len(set(shown)) == 1 else f"{', '.join(shown)} in the layers"
    when = f"in all {steps[-1]:,} steps" if len(steps) > 1 else f"at step {steps[-1]:,}"
    if any(v.size < n for v, n in known):
        when = "wherever it is finite"
    formula = f" ({metric.formula})" if metric.formula else ""
    return page.text(f"{metric.title}: {words} {when}{formula}.")
