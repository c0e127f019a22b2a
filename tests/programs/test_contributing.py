"""The examples of CONTRIBUTING.md go through by copy and paste, in a copy of the tree, with their commands."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
FOLDERS = ("moe_jax", "configs", "experiments", "tests")


def blocks(title: str, language: str) -> list[str]:
    """Blocks of code in this language under this title."""
    (text,) = re.findall(rf"\n## [^\n]*{title}\n(.*?)(?=\n## |\Z)", TEXT, re.DOTALL)
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def patched(lines: list[str], diff: list[str]) -> list[str]:
    """Lines of a file after a diff without line numbers: each line that is no addition is found behind the last one."""
    after, at = list(lines), None  # at: where the next addition goes
    for i, line in enumerate(diff):
        if line.startswith("+"):
            if at is None:  # in front of the first line that is found
                at = after.index(next(other[1:] for other in diff[i:] if not other.startswith("+")))
            after.insert(at, line[1:])
            at += 1
        else:
            found = [n for n, text in enumerate(after) if text == line[1:] and n >= (at or 0)]
            assert found, f"{line!r} is not there once"
            assert len(found) == 1 or at is not None, f"{line!r} is not there once"
            at = found[0] + line.startswith(" ")
            if line.startswith("-"):
                del after[found[0]]
    return after


def apply(diff: str, root: Path) -> None:
    header, *lines = diff.splitlines()
    path = root / header.removeprefix("--- ")
    path.write_text("\n".join(patched(path.read_text().splitlines(), lines)) + "\n")


@pytest.mark.parametrize(
    ("title", "file"),
    [("a new router", "moe_jax/routers/min_p.py"), ("a new attention", "moe_jax/attention/fading.py")],
)
def test_example_goes_through_by_copy_and_paste(title, file, tmp_path):
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (code,), (command, *_) = blocks(title, "python"), blocks(title, "sh")
    (tmp_path / file).write_text(code)
    for diff in blocks(title, "diff"):
        apply(diff, tmp_path)
    python, *words = shlex.split(command)
    assert python == ".venv/bin/python"
    ran = subprocess.run(
        [sys.executable, *words, "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-3000:]
    name = next(line.split()[1].rstrip(":") for line in code.splitlines() if line.startswith("class "))
    passed = re.search(r"(\d+) passed", ran.stdout) or re.search(r"^(\.+)\s+\[100%\]", ran.stdout, re.MULTILINE)
    assert passed, f"{name}: {ran.stdout}"


def test_a_line_that_is_not_there_is_not_passed_over():
    with pytest.raises(AssertionError, match="not there once"):
        patched(["a", "b"], [" c", "+d"])
    assert patched(["a", "b"], [" a", "+c"]) == ["a", "c", "b"]
    assert patched(["a", "b"], ["+c", " b"]) == ["a", "c", "b"]
    assert patched(["a", "b"], ["-a", "+c"]) == ["c", "b"]


def test_paths_exist():
    """Every path the page names is there, but the files that the examples make."""
    for path in set(re.findall(r"`((?:moe_jax|tests|configs|experiments|docs)/[\w/.]*)`", TEXT)):
        assert (ROOT / path).exists() or path.endswith(("min_p.py", "fading.py")), path
