"""Checks that catch a mutant: a law of the audit, on a tiny experiment, or a test."""

import re
from typing import NamedTuple

from tests.museum.forks import Done, Job, pytest_job
from tests.museum.mutant import ROOT, Mutant

TINY = ROOT / "tests" / "museum" / "tiny.py"
REFUSALS = {  # words of errors about replicas that differ, and who says them
    "check_vma": "jax.shard_map",
    "manual axis types do not match": "jax.shard_map",
    "whose shards must all have the same tokens": "the next layer",
}
SAID = re.compile(r"^E +(\S.*)$", re.MULTILINE)  # what pytest says of a failure
ASSERTED = ("AssertionError", "assert ", "Failed: DID NOT RAISE")


class Outcome(NamedTuple):
    """Outcome of a check: holds, broken, refused (before it runs) or failed (otherwise); and a line about it."""

    verdict: str
    line: str = ""


class Audit(NamedTuple):
    """A law of the audit. flags: changes of the tiny experiment that bring what is broken into play."""

    law: int
    flags: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The law in a word."""
        return f"law {self.law}"

    def job(self, mutant: Mutant | None = None) -> Job:
        """The audit of this law, on the code as it is or with an edit."""
        argv = (f"--config={TINY}", "--stop", "--quick", "--devices=4", *self.flags, f"--law={self.law}")
        return Job("experiments.audit", argv, mutant)

    def judge(self, done: Done) -> Outcome:
        """The outcome, by exit code and output."""
        broken = [line for line in done.out.splitlines() if " NO   " in line]
        if done.code == 1 and broken:
            return Outcome("broken", short(broken[0]))
        if done.code == 0:
            return Outcome("holds")
        for words, speaker in REFUSALS.items():
            if words in done.err:
                return Outcome("refused", f"{speaker}: {words}")
        return Outcome("failed", last_line(done))


class Pytest(NamedTuple):
    """Tests of a file, chosen as by `pytest -k`."""

    file: str
    chosen: str

    @property
    def name(self) -> str:
        """The test's function."""
        return self.chosen.split(" and ")[0]

    def job(self, mutant: Mutant | None = None) -> Job:
        """The tests, on the code as it is or with an edit."""
        return pytest_job((self.file, "-k", self.chosen), mutant)

    def judge(self, done: Done) -> Outcome:
        """The outcome: a test is broken by an assertion that fails, not by any error."""
        if done.code == 0:
            return Outcome("holds")
        said = SAID.findall(done.out)
        if done.code == 1 and said and said[0].startswith(ASSERTED):
            words = " ".join(said[:4]).removeprefix("AssertionError:").replace("Not equal to tolerance", "").split()
            return Outcome("broken", " ".join(words)[:100])
        return Outcome("failed", last_line(done))


def short(line: str) -> str:
    """A line of the audit without what holds."""
    subject, _, detail = line.partition(" NO   ")
    parts = detail.split("; ")
    wrong = [part.partition(", where ")[0] for part in parts if part.startswith("NOT ")] or parts[1:] or parts
    return f"{subject.strip()}: {'; '.join(wrong)}"


def last_line(done: Done) -> str:
    """The last words of a job that ended otherwise."""
    lines = [*done.out.strip().splitlines()[-1:], *done.err.strip().splitlines()[-1:]]
    return f"exit code {done.code}: {' | '.join(lines)[-300:]}"
