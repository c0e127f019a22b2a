"""A program of `experiments/` with these arguments, in this process, and what came of it."""

import contextlib
import io
import sys
from types import ModuleType
from typing import NamedTuple

import pytest
from absl.testing import flagsaver

from experiments import cli


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that an error is."""
        assert self.code == 2, self
        lines = self.err.splitlines()
        assert lines[-1].startswith("error: "), self.err
        assert "Traceback" not in self.err
        assert not any(line.startswith("error") for line in lines[:-1])
        return lines[-1].removeprefix("error: ")


def call(program: ModuleType, *argv: object) -> Outcome:
    """Runs a program; returns its exit code and output."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, flagsaver.flagsaver():
        patch.setattr(sys, "argv", [f"{program.__name__.replace('.', '/')}.py", *map(str, argv)])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.run(program.main)
            except SystemExit as end:
                code = int(end.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())
