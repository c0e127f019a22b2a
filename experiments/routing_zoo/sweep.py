"""Runs the contestants one after another, and skips those that are finished."""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments import cli
from experiments.routing_zoo import zoo
from experiments.routing_zoo.zoo import Contestant
from moe_jax.config import Experiment, build
from moe_jax.files import write_file
from moe_jax.reporting.metrics import FILE, Logger, curve, duration, last, read, to_json
from moe_jax.train import TrainingDiverged, train


@dataclasses.dataclass(frozen=True)
class Run:
    """One contestant on one seed."""

    contestant: Contestant
    seed: int
    exp: Experiment
    folder: Path

    @property
    def title(self) -> str:
        return f"{self.contestant.name}, seed {self.seed}"

    @property
    def finished(self) -> bool:
        return (self.folder / FILE).is_file() and bool(last(read(self.folder), "end"))


class Sweep:
    """All runs in a folder, and their times."""

    def __init__(self, base: ConfigDict, workdir: Path, data_dir: Path | None = None):
        self.base, self.workdir, self.data_dir = base, workdir, data_dir
        self.took: list[float] = []  # seconds of each run trained here

    def run(
        self, contestants: Sequence[Contestant], seeds: int = 1, leaders: int = 0, leader_seeds: int = 1
    ) -> list[dict[str, Any]]:
        """The results of all contestants, and of the best of them on more seeds."""
        runs = self.runs(contestants, range(seeds))
        more = range(seeds, leader_seeds)
        later = min(leaders, len(contestants)) * len(more)
        for run in [*runs, *self.runs(contestants, more)]:  # before anything is trained
            check(run)
        results = list(self.results(runs, later))
        best = ranked(results)[:leaders]
        runs_of_best = self.runs([c for c in contestants if c.name in best], more)
        return results + list(self.results(runs_of_best, 0, len(runs)))

    def runs(self, contestants: Sequence[Contestant], seeds: range) -> list[Run]:
        configs = [(c, seed, build(zoo.configure(c, self.base, seed))) for seed in seeds for c in contestants]
        return [Run(c, seed, exp, self.workdir / c.name / f"seed_{seed}") for c, seed, exp in configs]

    def results(self, runs: Sequence[Run], later: int, before: int = 0) -> Iterator[dict[str, Any]]:
        """Yields each run's result, training it if needed; before, later: numbers of other runs."""
        missing = sum(not run.finished for run in runs) + later
        for number, run in enumerate(runs, before + 1):
            if not run.finished:
                progress = f"[{number}/{before + len(runs) + later}] {run.title}"
                say(f"{progress}: training")
                self.took.append(self.train(run))
                missing -= 1
                left = duration(missing * float(np.mean(self.took)))
                loss = result(run, self.base)["loss"]
                words = "diverged" if math.isnan(loss) else f"held-out loss {loss:.4f}"
                say(f"{progress}: {words} after {self.took[-1]:.0f} s; {left} left")
            yield result(run, self.base)

    def train(self, run: Run) -> float:
        """Trains one run from its beginning, its records into its folder; returns the seconds it took."""
        cli.simulate(run.exp)
        began = time.monotonic()
        run.folder.mkdir(parents=True, exist_ok=True)
        write_file(run.folder / "config.json", run.exp.to_json())
        with Logger(run.folder, run.exp.run.steps, quiet=True) as log:
            with suppress(TrainingDiverged):  # its last record says so
                for record in train(run.exp, data_dir=self.data_dir):
                    log.write(record if record["kind"] != "end" else {**record, "wall": time.monotonic() - began})
        jax.clear_caches()  # programs of other contestants are not reused
        return time.monotonic() - began


def check(run: Run) -> None:
    """Refuses a folder that holds another run."""
    saved = run.folder / "config.json"
    if not saved.is_file():
        return
    try:
        same = Experiment.from_json(saved.read_text()) == run.exp
    except ValueError:
        same = False
    if not same:
        raise ValueError(f"{run.folder} holds a run of another sweep; choose another --workdir, or delete that folder.")


# ---------------------------------------------------------------- results


def result(run: Run, base: ConfigDict) -> dict[str, Any]:
    """The numbers of a finished run; NaN where it has none.

    Metrics of routing are means over layers, held-out and dropless; experts per token and FLOPs are means over
    training.
    """
    records = read(run.folder)
    held_out, end = last(records, "eval"), last(records, "end")
    moe = held_out.get("moe", {})

    def mean(key: str) -> float:
        return float(np.mean(moe[key])) if key in moe else math.nan

    step, seconds = curve(records, "seconds")
    layer, dense = run.exp.model.moe, run.contestant.router is None
    F = layer.F if dense else layer.experts.F
    visits = curve(records, "moe.active_experts")[1]
    active = float(np.mean(visits)) if visits.size else 1.0 if dense else math.nan
    return {
        "contestant": run.contestant.name,
        "router": run.contestant.words,
        "kind": run.contestant.kind,
        "seed": run.seed,
        "F": F,
        **{
            key: number(held_out.get(key))
            for key in ("loss", "bits_per_byte", "loss_capacity", "bits_per_byte_capacity", "drop_rate_capacity")
        },
        "load_cv": mean("load_cv"),
        "load_entropy": mean("load_entropy"),
        "active_experts": active,
        "active_flops": active * F / zoo.width(base),  # of the experts, relative to the dense baseline's
        "ms_per_step": float(np.median(np.diff(seconds) / np.diff(step))) * 1000 if len(step) > 1 else math.nan,
        "seconds": number(end.get("wall")),
    }


def number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def ranked(results: Sequence[dict[str, Any]]) -> list[str]:
    """The contestants' names by their mean held-out loss, those that diverged last."""
    means = {name: summary["loss"][0] for name, summary in summaries(results).items()}
    return sorted(means, key=lambda name: (math.isnan(means[name]), means[name]))


def summaries(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, tuple[float, float]]]:
    """Mean and standard deviation over seeds (NaN for one seed), for each contestant and number."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for name in dict.fromkeys(r["contestant"] for r in results):
        rows = [r for r in results if r["contestant"] == name]
        found[name] = {}
        for key in (key for key, value in rows[0].items() if isinstance(value, float)):
            values = np.array([row[key] for row in rows])
            found[name][key] = (float(values.mean()), float(values.std(ddof=1)) if len(rows) > 1 else math.nan)
    return found


def save(path: Path, base: ConfigDict, results: Sequence[dict[str, Any]]) -> None:
    """Writes results.json; missing numbers are null."""
    head = {"steps": base.run.steps, "tokens_per_step": base.data.B * base.data.L, "width": zoo.width(base)}
    write_file(path, json.dumps({**head, "runs": to_json(list(results))}, indent=1) + "\n")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
