"""Compares runs: which fields of their configs differ, what they came to, and their losses in one plot.

    python -m experiments.compare runs/*
    python -m experiments.compare runs/glam_nano runs/dense_nano --report=runs/compared.html --json=runs/compared.json

Takes the workdirs of runs, or folders with runs in them. Runs that differ in nothing but their seeds are one row: the
mean and its standard error. A run that is not finished is shown as far as it is; one that is empty, damaged or of
another version is left out, and a line says why.
"""

import pathlib
import sys
from collections.abc import Sequence

import rich.console

from experiments import cli
from experiments.compare import present
from experiments.compare.runs import find, grouped, open_runs
from moe_jax.files import write_file

REPORT = cli.report()
JSON = cli.as_json()


def main(*folders: str) -> None:
    if not folders:
        raise ValueError("No runs were given; say python -m experiments.compare runs/*, for instance.")
    files = cli.file("report", REPORT.value), cli.file("json", JSON.value)
    found, notes = find(folders)
    compare(found, notes, *files)


def compare(
    folders: Sequence[pathlib.Path],
    notes: Sequence[str] = (),
    report: pathlib.Path | None = None,
    numbers: pathlib.Path | None = None,
) -> None:
    """Compares the runs in these folders; ValueError where none of them can be read. notes: lines to end with."""
    runs, more = open_runs(folders)
    lines = [*notes, *more]
    if not runs:
        raise ValueError(f"There is no run to compare: {'; '.join(lines)}.")
    groups = grouped(runs)
    console = rich.console.Console(width=None if sys.stdout.isatty() else 200)
    present.say(groups, lines, console)
    if report is not None:
        write_file(report, present.comparison_page(groups, lines))
        print(f"written: {report}", file=sys.stderr, flush=True)
    cli.write_json(numbers, present.numbers(groups, lines))


if __name__ == "__main__":
    cli.run(main)
