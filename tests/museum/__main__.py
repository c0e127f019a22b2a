"""Plants every bug of the museum, and tells what catches it. The exit code is 1 where one survives.

python -m tests.museum --only=padding
python -m tests.museum --out=docs/museum.md
"""

import argparse
import pathlib
import sys
import tempfile
from collections.abc import Sequence

from tests.museum import forks, page
from tests.museum.catch import Audit, Outcome, Pytest
from tests.museum.entries import MUSEUM, Entry


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.museum", description=__doc__)
    parser.add_argument("--only", default="", help="Mutants whose name contains this.")
    parser.add_argument("--jobs", type=int, default=2, help="Mutants at a time.")
    parser.add_argument("--cache", type=pathlib.Path, help="A folder where compiled programs are kept.")
    parser.add_argument("--out", type=pathlib.Path, help="A file for the page.")
    given = parser.parse_args(argv)
    chosen = [entry for entry in MUSEUM if given.only in entry.mutant.name]
    if given.out and len(chosen) < len(MUSEUM):
        parser.error("--out writes the page of all bugs; leave out --only.")
    with tempfile.TemporaryDirectory() as kept:
        cache = given.cache or pathlib.Path(kept)
        bad = controls(list(dict.fromkeys(entry.catch for entry in chosen if not entry.refused)), given.jobs, cache)
        found = plant(chosen, given.jobs, cache)
    survived = [entry.mutant.name for entry, outcome, _ in found if not caught(entry, outcome)]
    print(f"{len(found) - len(survived)} of {len(found)} caught, in {sum(s for *_, s in found):.0f} CPU seconds")
    if survived:
        print(f"NOT caught: {', '.join(survived)}")
    if given.out and not survived and not bad:
        given.out.write_text(page.page(found), encoding="utf-8")
    return int(bool(survived or bad))


def controls(checks: Sequence[Audit | Pytest], at_once: int, cache: pathlib.Path) -> int:
    """Runs every check on the code as it is; returns how many do not hold."""
    bad = 0
    for check, done in zip(checks, forks.run([check.job() for check in checks], at_once, cache), strict=True):
        outcome = check.judge(done)
        bad += outcome.verdict != "holds"
        flags = " ".join(getattr(check, "flags", ())).replace("--config.", "")
        print(f"{check.name:<50} {outcome.verdict:<8} {done.seconds:4.0f} s  {flags}{outcome.line}", flush=True)
    return bad


def plant(entries: Sequence[Entry], at_once: int, cache: pathlib.Path) -> list[tuple[Entry, Outcome, float]]:
    """Runs every entry's check on its mutant."""
    found = []
    jobs = [entry.catch.job(entry.mutant) for entry in entries]
    for entry, done in zip(entries, forks.run(jobs, at_once, cache), strict=True):
        outcome = entry.catch.judge(done)
        found.append((entry, outcome, done.seconds))
        print(f"{entry.mutant.name:<40} {outcome.verdict:<8} {done.seconds:4.0f} s  {outcome.line}", flush=True)
    return found


def caught(entry: Entry, outcome: Outcome) -> bool:
    """Tells whether a mutant's outcome is the expected one."""
    return outcome.verdict == ("refused" if entry.refused else "broken")


if __name__ == "__main__":
    sys.exit(main())
