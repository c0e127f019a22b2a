"""docs/museum.md: every bug with its thread, its mutant, what catches it, and the seconds that took."""

import re
from collections.abc import Sequence

from tests.museum.absent import ABSENT
from tests.museum.catch import Audit, Outcome
from tests.museum.entries import MUSEUM, Entry
from tests.museum.mutant import ROOT

PAGE = ROOT / "docs" / "museum.md"
HEAD = ("thread", "bug", "mutant", "file", "caught by", "what it says", "CPU s")
INTRO = """# The museum

Would this code have had the bugs of others? These are public numerical bugs of codebases for sparse models. Most were
silent: plausible losses, no error. Each is planted here as one edit of one file (`tests/museum/entries.py`), and a law
of the audit or a test catches it, or it is refused before it runs (replicas that differ).

    make museum

plants all; `python -m tests.museum --only=padding` plants those of a name. Each mutant runs in a fork of one warm
process, which imports the code with the edit in it; nothing on disk changes. An audit (`law N`) is
`experiments.audit --quick --law=N` of a tiny model (`tests/museum/tiny.py`), a test is run by pytest, and only a failed
assertion counts. Each check is also run on the code as it is, where it must hold. Threads are issues and pull requests
on GitHub; `log` is a commit's title. `python -m tests.mutations` runs further bugs, see
[parallelism.md](parallelism.md#does-it-see-every-bug).

This page is written by `python -m tests.museum --out=docs/museum.md`.
"""


class Row(tuple[str, ...]):
    """Cells of a row of a table."""

    def __str__(self) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in self)} |"


def page(found: Sequence[tuple[Entry, Outcome, float]]) -> str:
    """The page in Markdown. found: what came of every entry, and CPU seconds."""
    threads = {thread for entry, _, _ in found for thread in entry.threads}
    total = sum(seconds for _, _, seconds in found)
    rows = [Row(HEAD), Row(["---"] * (len(HEAD) - 1) + ["---:"])]
    rows += [row(*one) for one in found]
    absent = [Row(("thread", "bug", "why not")), Row(["---"] * 3)]
    absent += [Row((", ".join(a.threads), a.essence, a.reason)) for a in ABSENT]
    said = f"**{len(found)} bugs of {len(threads)} threads, each caught, in {total:.0f} CPU seconds.**"
    parts = [INTRO.strip(), said, lines(rows), "## What cannot be planted here", lines(absent)]
    return "\n\n".join(parts) + "\n"


def row(entry: Entry, outcome: Outcome, seconds: float) -> Row:
    """The row of one entry."""
    by = (
        "`check_vma`"
        if entry.refused
        else entry.catch.name
        if isinstance(entry.catch, Audit)
        else f"`{entry.catch.name}`"
    )
    mutant = entry.mutant
    cells = (", ".join(entry.threads), entry.essence, f"`{mutant.name}`", f"`{mutant.file}`", by)
    return Row((*cells, outcome.line, f"{seconds:.0f}"))


def lines(rows: Sequence[Row]) -> str:
    return "\n".join(map(str, rows))


def listed(text: str) -> list[str]:
    """Names of the mutants that a page lists."""
    return re.findall(r"^\| [^|]+ \| [^|]+ \| `(\w+)` \| `moe_jax/", text, re.MULTILINE)


__all__ = ["MUSEUM", "PAGE", "listed", "page"]
