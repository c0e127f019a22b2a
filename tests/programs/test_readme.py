"""The README is true and short: its code runs, every component is named, it fits on a few screens."""

import os
import pathlib
import re
import subprocess
import sys

from moe_jax.config import COMPONENTS

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_code_runs(tmp_path):
    """Runs the code as a stranger would: from the root of the tree, in a fresh process, all of its 25 lines."""
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 25
    checks = [
        "params['params']['up_EDF'].addressable_shards[0].data.shape == (8 // 4, 32, 64)",
        "0 < metrics['drop_rate'] < 0.5 and metrics['load'].shape == (8,)",
        "abs(state['bias_E']).sum() > 0",
    ]
    ran = subprocess.run(
        [sys.executable, "-c", "\n".join([code, *(f"assert {check}" for check in checks)])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "MOE_JAX_DATA": str(tmp_path)},
    )
    assert ran.returncode == 0, ran.stderr


def test_it_is_short():
    assert len(README.splitlines()) <= 150


def test_every_component_is_named():
    for name in COMPONENTS:
        assert re.search(rf"\b{name}\b", README), f"{name} is not in the README"
