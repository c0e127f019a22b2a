"""The README is true: its code runs, its configs and components exist."""

import pathlib
import re
import subprocess
import sys

from moe_jax.config import COMPONENTS

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_code_runs(tmp_path):
    """As a stranger would run it: from the root of the tree, in a fresh process, all of its 20 lines."""
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 20
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=_environment(tmp_path)
    )
    assert ran.returncode == 0, ran.stderr
    kinds = [line.split()[0] for line in ran.stdout.splitlines() if line.split()[0].isalpha()]
    assert kinds == ["start", "train", "train", "eval", "end"]


def _environment(tmp_path):
    import os

    return {**os.environ, "JAX_PLATFORMS": "cpu", "MOE_JAX_DATA": str(tmp_path)}


def test_every_config_is_in_its_table():
    named = set(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE))
    assert named == {p.stem for p in (ROOT / "configs").glob("*.py")} - {"__init__"}


def test_every_component_is_named():
    for name in COMPONENTS:
        assert re.search(rf"\b{name}\b", README), f"{name} is not in the README"
