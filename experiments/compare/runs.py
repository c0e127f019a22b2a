"""Opens runs, and says which cannot be compared; puts together those that differ in their seeds alone."""

import dataclasses
import json
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax import costs
from moe_jax.config import Experiment, build, plain
from moe_jax.reporting.metrics import FILE, last, median_speed, read, wall_time
from moe_jax.reporting.names import run_names
from moe_jax.workdir import CONFIG, confirmed_config, log_changes, read_config

PARTS = (CONFIG, FILE, "checkpoints")  # one of these makes a folder a run's
NUMBERS = ("loss", "drop_rate", "load_max_over_mean", "tokens_per_second", "seconds")


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that has logged something. step: its last; diverged: its log says so."""

    name: str
    path: Path
    exp: Experiment
    records: list[dict]
    step: int
    finished: bool
    diverged: bool
    numbers: dict[str, float | None]  # see NUMBERS

    @cached_property
    def config(self) -> dict[str, Any]:
        """All that makes the run: its config, and the run whose parameters it began with."""
        origin = last(self.records, "start").get("origin") or {}
        began = f"{origin.get('run')} step {origin.get('step')}" if origin else None
        return {"config": plain(self.exp), "init_from": began}

    @property
    def data(self) -> str | None:
        """The fingerprint of its data."""
        return last(self.records, "start").get("data")


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seeds."""

    runs: tuple[Run, ...]

    @cached_property
    def name(self) -> str:
        """The name of the run, or of all: "sweep/seed={0,1,2}"."""
        names = [re.findall(r"[^\W_]+|[\W_]", run.name) for run in self.runs]  # words, and what is between them
        if len(names) == 1:
            return self.runs[0].name
        start = _shared(names)
        ends = [name[len(start) :] for name in names]
        end = _shared([name[::-1] for name in ends])[::-1]
        middles = ["".join(name[: len(name) - len(end)]) for name in ends]
        return f"{''.join(start)}{{{','.join(middles)}}}{''.join(end)}"

    def mean(self, number: str) -> float | None:
        """The mean over seeds; None where one of them lacks the number."""
        values = [run.numbers[number] for run in self.runs]
        return float(np.mean(values)) if None not in values else None  # type: ignore[arg-type]

    def error(self, number: str) -> float | None:
        """The standard error of that mean; None for one seed."""
        values = [run.numbers[number] for run in self.runs]
        if len(values) < 2 or None in values:
            return None
        return float(np.std(values, ddof=1)) / math.sqrt(len(values))  # type: ignore[arg-type]

    @property
    def finished(self) -> bool:
        return self.runs[0].finished

    @property
    def parameters(self) -> costs.ParameterCount:
        return costs.parameters(self.runs[0].exp.model)


def _shared(names: Sequence[Sequence[str]]) -> list[str]:
    """The words that all names begin with."""
    return [words[0] for words in takewhile(lambda words: len(set(words)) == 1, zip(*names, strict=False))]


def find(folders: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The runs in these folders and in all folders in them, and a line for each that holds none.

    ValueError for a folder that is not there.
    """
    found, notes = list[Path](), list[str]()
    for folder in map(Path, folders):
        if not folder.exists():
            raise ValueError(f"There is no folder {folder}; give the workdirs of runs, or folders of them.")
        below = list(_runs_below(folder)) if folder.is_dir() else []
        if not below:
            notes.append(f"{folder}: left out, {'no run is in it' if folder.is_dir() else 'it is a file'}")
        found += below
    return found, notes


def _runs_below(folder: Path) -> list[Path]:
    """A run's own folder, or those of all runs in it, in the order of their names."""
    found = []
    for root, folders, files in os.walk(folder):
        if {*folders, *files}.intersection(PARTS):
            found.append(Path(root))
            folders.clear()  # what a run writes is no other run
        folders.sort(key=_natural)
    return found


def _natural(name: str) -> list[str | int]:
    """A key that sorts run_2 before run_10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def open_runs(folders: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """The runs that can be compared, and a line for each that cannot or is not finished."""
    runs, notes = list[Run](), list[str]()
    for name, path in run_names(folders).items():
        try:
            run = _open(name, path)
        except ValueError as error:
            notes.append(f"{name}: left out, {' '.join(str(error).split())}")
            continue
        runs.append(run)
        if changed := log_changes(path):
            notes.append(f"{name}: {changed}")
        if not run.finished:
            how = "diverged" if run.diverged else "unfinished"
            notes.append(f"{name}: {how}, at step {run.step:,} of {run.exp.run.steps:,}")
    return runs, notes


def _open(name: str, path: Path) -> Run:
    """A run; ValueError says why it cannot be compared."""
    if not (path / CONFIG).is_file():
        raise ValueError(f"it has no {CONFIG}")
    try:
        read_config(path)
    except ValueError:
        raise ValueError(f"its {CONFIG} is damaged") from None
    values = confirmed_config(path)
    try:
        exp = build(values)
    except ValueError as error:
        raise ValueError(f"its config is of another version: {error}") from None
    records = read(path) if (path / FILE).is_file() else []
    if not records:
        raise ValueError("nothing has been logged")
    try:
        step = max(int(record["step"]) for record in records)
        end, numbers = last(records, "end"), _numbers(records)
    except (TypeError, ValueError, AttributeError):
        raise ValueError(f"its {FILE} is damaged: a number is none") from None
    diverged = bool(end.get("diverged"))
    return Run(name, path, exp, records, step, bool(end) and not diverged, diverged, numbers)


def _numbers(records: list[dict]) -> dict[str, float | None]:
    train = last(records, "train")
    found = {
        "loss": last(records, "eval").get("loss"),
        "drop_rate": train.get("drop_rate"),
        "load_max_over_mean": train.get("load_max_over_mean"),
        "tokens_per_second": median_speed(records),
        "seconds": wall_time(records),
    }
    return {name: None if value is None else float(value) for name, value in found.items()}


def grouped(runs: Sequence[Run]) -> list[Group]:
    """The runs, those that differ in their seeds alone as one; the lowest held-out loss first, finished ones before."""
    groups: dict[tuple, list[Run]] = {}
    there: Counter[tuple] = Counter()
    for run in runs:
        config = {**run.config, "config": {**run.config["config"], "seed": None}}
        key = (json.dumps(config), run.finished, run.step)
        groups.setdefault((*key, there[*key, run.exp.seed]), []).append(run)  # no seed is twice in a group
        there[*key, run.exp.seed] += 1
    found = [Group(tuple(sorted(several, key=lambda run: run.exp.seed))) for several in groups.values()]
    return sorted(found, key=lambda g: (not g.finished, (g.mean("loss") is None), g.mean("loss") or 0.0))


def best(groups: Sequence[Group]) -> float | None:
    """The lowest held-out loss of what has finished, or of all where nothing has."""
    losses = [(not g.finished, loss) for g in groups if (loss := g.mean("loss")) is not None]
    return min(losses)[1] if losses else None
