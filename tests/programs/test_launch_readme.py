"""The commands that experiments/launch/README.md has a person type are complete, in order, and understood."""

import pathlib
import re
import subprocess

import pytest

from experiments import plan, prepare, train
from tests.programs import call

ROOT = pathlib.Path(__file__).parents[2]
PROGRAMS = {"plan": plan, "prepare": prepare, "train": train}
STUB = """#!/bin/bash
# Writes down what it is called with; of a remote command, that the shell understands it.
name=$(basename "$0")
echo "$name $*" >> "$CALLS"
for word in "$@"; do
    case $word in --command=*) bash -n <<< "${word#--command=}" || exit 1 ;; esac
done
[ "$name $1" = "gcloud projects" ] && echo 12345
exit 0
"""


@pytest.fixture(scope="module")
def commands() -> str:
    """Commands of the run on Cloud TPU, from the names to the deletion."""
    text = (ROOT / "experiments" / "launch" / "README.md").read_text()
    run = text[text.index("## 1. ") : text.index("# Variations")]
    return "".join(line[4:] for line in run.splitlines(keepends=True) if line.startswith("    "))


@pytest.fixture(scope="module")
def called(commands, tmp_path_factory) -> list[str]:
    """Calls that the commands make in a shell with stubs, where an unset variable is an error."""
    folder = tmp_path_factory.mktemp("shell")
    for name in ("gcloud", "python", "tensorboard"):
        (folder / name).write_text(STUB)
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "CALLS": str(folder / "calls"), "HOME": str(folder)}
    outcome = subprocess.run(
        ["bash", "-eu"], input=commands, env=environment, cwd=folder, capture_output=True, text=True, timeout=60
    )
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stderr == ""
    return [*(folder / "calls").read_text().splitlines(), *(folder / "run.sh").read_text().splitlines()]


def test_what_is_used_was_made_before_and_is_deleted_after(called):
    first = lambda words: next(i for i, line in enumerate(called) if words in line)  # noqa: E731
    order = [
        "buckets create",
        "experiments.prepare",
        "instances delete",
        "tpu-vm create",
        "gcsfuse",
        "experiments.train",
    ]
    made = [first(words) for words in order[:-1]]
    assert made == sorted(made)
    assert first("device_count") < first("bash run.sh") < first("tpu-vm delete") < first("storage rm -r")


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_flag_is_one_of_the_program(called, name):
    lines = [line for line in called if f"experiments.{name} " in line or f"-m experiments.{name}" in line]
    assert lines
    known = set(re.findall(r"^  --(\w+)", call(PROGRAMS[name], "--help").out, re.MULTILINE))
    for line in lines:
        given = line.split(f"experiments.{name}")[1].split(">")[0]
        flags = set(re.findall(r"--(\w[\w.]*)", given))
        assert {flag for flag in flags if not flag.startswith("config.")} <= known
        assert {"config", "config.data.source"} <= flags
