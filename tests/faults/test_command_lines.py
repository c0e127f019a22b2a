"""Any command line is accepted, or ends in one sentence with exit code 2: no traceback, no hang, no flood of memory."""

import contextlib
import importlib
import resource
import signal
import time

import pytest

from experiments import train
from moe_jax.core.quoted import LONGEST
from tests.faults.command_lines import command_line
from tests.programs import Outcome, call

SHORT, WHOLE = 100, 2000  # command lines
SECONDS = 20  # of one, on a machine that does much else
MEMORY = 1 << 20  # kB, of all together
# A config file's text: what a file may do that a flag cannot.
FILES = {
    "deep": "def get_config():\n x = 1\n for _ in range(5000): x = [x]\n return {'model': {'D': x}, 'data': {'L': x}}",
    "deep_dict": "def get_config():\n x = {}\n for _ in range(5000): x = {'model': x}\n return x",
    "huge": "def get_config(): return {'model': {'D': 10**100_000}, 'seed': -10**5000}",
    "text": "def get_config(): return {'model': {'D': 'x' * 10**6}, 'run': {'steps': 'y ' * 10**5}}",
    "keys": "def get_config(): return {1: 2, None: 3, ('a',): 4, 'x' * 5000: 5}",
    "kind": "def get_config(): return {'model': {'kind': ['LM']}, 'mesh': {'data': [8]}}",
    "unlike": "def get_config(): return {'model': {'D': object(), 'attention': 1j}, 'mesh': {3: 4}}",
    "list": "def get_config(): return ['x' * 5000] * 100",
    "raises": "def get_config(): raise RuntimeError('x' * 5000)",
    "leaves": "import sys\ndef get_config(): sys.exit(3)",
    "minus": "x = " + "-" * 5000 + "1",
    "brackets": "x = " + "[" * 5000,
    "zeros": "\0\0\0",
}


class Hang(BaseException):
    """A command line has taken too long; nothing catches it on the way."""


@contextlib.contextmanager
def limited(seconds: int):
    """Ends what takes longer, in a Hang."""

    def stop(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def nothing_runs(monkeypatch, tmp_path):
    """An accepted line ends where training would begin."""
    monkeypatch.setattr(train, "run", lambda *_: None)
    monkeypatch.setattr(train.jax.config, "update", lambda *_: None)
    (tmp_path / "configs").symlink_to(train.cli.ROOT / "configs")
    monkeypatch.chdir(tmp_path)  # names of folders mean nothing there


def wrong_with(argv: list[str], outcome: Outcome) -> str:
    """Describes what is wrong with the outcome of a command line; "" where nothing is."""
    if outcome.code == 0:
        return ""
    lines = outcome.err.splitlines()
    if outcome.code != 2 or len(lines) != 1 or not lines[0].startswith("error: "):
        return f"exit code {outcome.code}, {len(lines)} lines"
    line = lines[0]
    ends = range(len(line) - LONGEST)
    if any(len(word) > LONGEST and line[i : i + LONGEST + 1] in word for word in argv for i in ends):
        return f"more than {LONGEST} characters of what was given"
    return "" if len(line) < 1500 else f"{len(line)} characters"


def tried(program: str, argv: list[str]) -> tuple[int, str]:
    """Exit code of a command line of a program, and what is wrong with the outcome; "" where nothing is."""
    try:
        with limited(SECONDS):
            outcome = call(importlib.import_module(f"experiments.{program}"), *argv)
    except Hang:
        return -1, f"no end after {SECONDS} s"
    except Exception as error:
        return -1, f"{type(error).__name__}: {str(error)[:200]}"
    fault = wrong_with(argv, outcome)
    return outcome.code, fault and f"{fault}: {outcome.err[:300]!r}"


@pytest.mark.parametrize("n", [SHORT, pytest.param(WHOLE, marks=pytest.mark.faults)])
def test_any_command_line_is_accepted_or_ends_in_a_sentence(n, nothing_runs):
    memory, found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, {}
    for i in range(n):
        program, argv = command_line(i)
        found[i] = (*tried(program, argv), program, [word[:200] for word in argv])
    assert {i: line for i, line in found.items() if line[1]} == {}
    accepted = sum(code == 0 for code, *_ in found.values())
    assert n // 20 < accepted < n // 2, "or the lines would show little"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < MEMORY


@pytest.mark.parametrize("name", FILES)
def test_any_config_file_is_accepted_or_ends_in_a_sentence(name, nothing_runs, tmp_path):
    (tmp_path / "hostile.py").write_text(FILES[name])
    for argv in (
        ["--config=hostile.py"],
        ["--config=hostile.py:" + "a" * 5000],
        ["--config.seed=1", "--config=hostile.py"],
    ):
        assert tried("train", argv) == (2, "")


def test_a_fault_is_seen():
    line = f"error: {'x' * 300} is wrong."
    assert "characters" in wrong_with(["--config.a=" + "x" * 300], Outcome(2, "", line))
    assert "exit code 1" in wrong_with([], Outcome(1, "", "Traceback\n"))
    assert "2 lines" in wrong_with([], Outcome(2, "", "warning\nerror: no"))
    with pytest.raises(Hang), limited(1):
        time.sleep(5)
