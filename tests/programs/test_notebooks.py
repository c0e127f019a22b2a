"""The notebooks run from top to bottom, each in a kernel of its own, and are committed without outputs."""

import ast
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Kernels compile more than they compute."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")


def executed(name: str, pictures: int = 4) -> str:
    """Output of a notebook; a failed cell raises, and so does a notebook with fewer pictures."""
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    client = NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(NOTEBOOKS)}})
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", ()) for output in outputs) >= pictures
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


def test_the_routing_notebook_trains_eight_routers(monkeypatch):
    """Eight routers are trained; the balancing loss helps those that it can reach, and nobody else."""
    monkeypatch.setenv("MOE_JAX_STEPS", "150")
    printed = executed("01_routing.ipynb", pictures=9)
    assert "has the constant weight 1 and never trains its router" in printed
    found = re.findall(r"^(\w+(?: plain)?) +squared error +([\d.]+) by the error alone, +([\d.]+) with", printed, re.M)
    errors = {name: (float(alone), float(balanced)) for name, alone, balanced in found}
    assert len(errors) == 8
    for name in ("Switch", "TopK plain", "TopK", "Top2", "NoisyTopK"):
        assert errors[name][1] < errors[name][0], name
    for name in ("ExpertChoice", "Random"):  # the loss is constant for them
        assert errors[name][0] == pytest.approx(errors[name][1], abs=2e-3)
    assert errors["Switch"][0] > errors["Random"][0]  # a collapsed router is worse than none


def test_the_dispatch_notebook_finds_the_causal_priorities():
    """The notebook names the causal priorities; its dispatchers agree to rounding and to every drop."""
    printed = executed("02_dispatch.ipynb", pictures=12)
    causal = re.findall(r"^K=(\d) ([\w-]+) +causal: (\w+)$", printed, re.M)
    assert {(int(K), priority) for K, priority, holds in causal if holds == "True"} == {
        (1, "token-major"),
        (1, "choice-major"),
        (2, "token-major"),
    }
    kept = re.findall(r"^(.+?) +kept choices (\d+) and (\d+)$", printed, re.M)
    assert len(kept) == 4
    assert all(one == other for _, one, other in kept)
    assert int(kept[0][1]) < int(kept[1][1])  # something is dropped where there is a limit
    (difference,) = re.findall(r"^largest difference (\S+)$", printed, re.M)
    assert float(difference) < 1e-6


def test_expert_parallelism():
    """Every mesh keeps the choices of one device, and sends what is predicted, to the byte."""
    printed = executed("03_expert_parallelism.ipynb", pictures=8)
    alone, every = re.findall(r"^one device keeps (\d+) of (\d+) choices$", printed, re.M)[0]
    assert int(alone) < int(every)  # something is dropped
    assert re.findall(r"^data \d, expert \d +keeps (\d+)$", printed, re.M) == [alone] * 4
    found = dict(re.findall(r"^(\w.*?) +predicted to the byte, keeps (\d+) choices$", printed, re.M))
    assert len(found) == 7
    assert found.pop("RaggedAllToAll") == every
    assert set(found.values()) == {alone}
    assert "WRONGLY" not in printed
