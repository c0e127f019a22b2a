"""The notebooks run from top to bottom, each in a kernel of its own, and are committed without outputs."""

import ast
import dataclasses
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

from experiments.train import run
from moe_jax.config import DataConfig, Experiment, OptimConfig, RunConfig
from moe_jax.data import Folder
from moe_jax.experts import GLU, MLP
from moe_jax.models import LMConfig
from moe_jax.moe import MoEConfig
from moe_jax.optim import Constant
from moe_jax.routers import Top2

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
DOMAINS = ("letters", "numbers", "words")


def executed(name: str) -> str:
    """What a notebook prints; a failed cell raises."""
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    client = NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(NOTEBOOKS)}})
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", ()) for output in outputs) >= 4
    return "".join(output["text"] for output in outputs if output.output_type == "stream")


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_committed_clean(path):
    """No outputs and no counts; nothing that belongs in the package: no class, no function of a screen."""
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type != "code":
            continue
        assert cell.outputs == []
        assert cell.execution_count is None
        for node in ast.walk(ast.parse(cell.source)):
            assert not isinstance(node, ast.ClassDef)
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 15, node.name


def test_routers(monkeypatch):
    """Four routers are trained, and eight devices give what one gives."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    printed = executed("routers.ipynb")
    assert "has the constant weight 1 and never trains its router" in printed
    assert "the same on one device and on eight" in printed
    table = [line.split() for line in printed.splitlines() if line.startswith(("Switch ", "TopK ", "Top2 "))]
    assert len(table) == 8
    for alone, balanced in zip(table[::2], table[1::2], strict=True):
        assert float(balanced[-4]) < float(alone[-4])  # the error
        assert float(balanced[-3].rstrip("%")) < float(alone[-3].rstrip("%"))  # the drop rate


def test_a_finished_run(tmp_path, monkeypatch):
    """A run of a few steps and its dense twin, on three domains of generated text."""
    rng = np.random.default_rng(0)
    symbols = {"letters": list("abc d"), "numbers": list("012 9"), "words": ["moe ", "jax ", "is ", "\n"]}
    for domain in DOMAINS:
        (tmp_path / "text" / domain).mkdir(parents=True)
        for i in range(6):
            text = "".join(rng.choice(symbols[domain], 400))
            (tmp_path / "text" / domain / f"{i}.txt").write_text(text)
    moe = MoEConfig(E=4, router=Top2(), experts=MLP(F=8), S=32)
    model = LMConfig(V=257, D=8, N=2, H=2, A=4, ffn=GLU(F=8), moe=moe, remat="none")
    exp = Experiment(
        model=model,
        data=DataConfig(source=Folder(str(tmp_path / "text")), L=16, B=16),
        optim=OptimConfig(schedule=Constant(0.01)),
        run=RunConfig(steps=6, log_every=1, eval_every=3, eval_windows=32, save_every=6),
        mesh=(("data", 2), ("expert", 4)),
    )
    twin = dataclasses.replace(exp, model=model.dense_twin())
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    for name, each in {"RUN": exp, "TWIN": twin}.items():
        run(each, tmp_path / name, tmp_path / "data")
        monkeypatch.setenv(f"MOE_JAX_{name}", str(tmp_path / name))
    monkeypatch.setenv("MOE_JAX_DATA", str(tmp_path / "data"))
    printed = executed("a_finished_run.ipynb")
    assert "bits per byte" in printed
    assert "restored step 6" in printed
    for domain in DOMAINS:
        assert f"{domain:16} differs by" in printed
    assert printed.count("def __init__(self") == 2
