"""The notebooks run from top to bottom, each in a kernel of its own, and are committed as they were executed."""

import ast
import re
from pathlib import Path

import nbformat
import pytest

from notebooks import execute

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))
MOST_BYTES = 400_000


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Kernels compile more than they compute."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")


def executed(name: str, pictures: int = 4) -> str:
    """Text of a fresh execution; a failed cell raises. Each cell must show what the committed one shows, in kind."""
    notebook = execute.executed(NOTEBOOKS / name, timeout=240)
    shown = execute.kinds(notebook)
    assert shown == execute.kinds(nbformat.read(NOTEBOOKS / name, as_version=4))
    assert sum(cell.count("image/png") for cell in shown) >= pictures
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = [output.get("text") or output.get("data", {}).get("text/markdown", "") for output in outputs]
    return "\n".join(text)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_committed_notebooks_are_executed(path):
    """Run once from top to bottom, by this very code, without errors and paths; of moderate size."""
    assert path.stat().st_size < MOST_BYTES
    assert execute.problems(nbformat.read(path, as_version=4)) == []


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_notebooks_define_no_library(path):
    """Notebooks define nothing that belongs into the package: no class, no long function."""
    for cell in nbformat.read(path, as_version=4).cells:
        for node in ast.walk(ast.parse(cell.source if cell.cell_type == "code" else "")):
            assert not isinstance(node, ast.ClassDef)
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 15, node.name


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_prose_has_no_results(path):
    """A fraction or a percentage in a text cell is a setting in the code. Results are computed by code cells."""
    cells = nbformat.read(path, as_version=4).cells
    text, code = ("\n".join(c.source for c in cells if c.cell_type == kind) for kind in ("markdown", "code"))
    text = re.sub(r"https?://\S+", "", text)
    assert [n for n in re.findall(r"\d+\.\d+|\d+ ?%|\d+(?:,\d{3})+", text) if n not in code] == []


def built(**changes) -> nbformat.NotebookNode:
    """A notebook of two executed cells, with a change of its second one."""
    cells = [nbformat.v4.new_code_cell("x = 1", execution_count=1), nbformat.v4.new_code_cell("x", execution_count=2)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata["moe_jax"] = {"executed_code": execute.digest(notebook)}
    cells[1].update(changes)
    return notebook


ERROR = nbformat.v4.new_output("error", ename="ValueError", evalue="no", traceback=[])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, []),
        ({"execution_count": 3}, ["execution counts are [1, 3]"]),
        ({"execution_count": None}, ["execution counts are [1, None]"]),
        ({"source": "x + 1"}, ["not the code that was executed"]),
        ({"outputs": [ERROR]}, ["code cell 2 has an error"]),
        ({"outputs": [nbformat.v4.new_output("stream", name="stderr", text="careful")]}, ["writes to stderr: careful"]),
        ({"outputs": [nbformat.v4.new_output("stream", text="in /home/me/a")]}, ["absolute path: /home/me/a"]),
        (
            {"outputs": [nbformat.v4.new_output("execute_result", {"text/plain": "<Plot object at 0x7fab>"})]},
            ["address in memory"],
        ),
        ({"outputs": [nbformat.v4.new_output("stream", text="runs/a of https://a.org/home/b")]}, []),
    ],
)
def test_what_must_not_be_committed_is_named(changes, words):
    found = execute.problems(built(**changes))
    assert len(found) == len(words)
    assert all(word in problem for word, problem in zip(words, found, strict=True))


def test_an_unknown_notebook_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["execute.py", "07_more"])
    with pytest.raises(SystemExit) as stopped:
        execute.main()
    assert stopped.value.code == 2
    assert "There is no notebook 07_more; name some of 01_routing, " in capsys.readouterr().err


@pytest.mark.matrix
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


@pytest.mark.matrix
def test_the_dispatch_notebook_finds_the_causal_priorities():
    """The notebook names the causal priorities; its dispatchers agree to rounding and to every drop."""
    printed = executed("02_dispatch.ipynb", pictures=12)
    causal = re.findall(r"^K=(\d) ([\w-]+) +causal: (\w+)$", printed, re.M)
    assert {(int(K), priority) for K, priority, holds in causal if holds == "True"} == {
        (1, "token-major"),
        (1, "choice-major"),
        (2, "token-major"),
    }
    kept = re.findall(r"^(.+?) +kept assignments (\d+) and (\d+)$", printed, re.M)
    assert len(kept) == 4
    assert all(one == other for _, one, other in kept)
    assert int(kept[0][1]) < int(kept[1][1])  # something is dropped where there is a limit
    (difference,) = re.findall(r"^largest difference (\S+)$", printed, re.M)
    assert float(difference) < 1e-6


@pytest.mark.matrix
def test_expert_parallelism():
    """Every mesh keeps the assignments of one device, and sends the predicted bytes."""
    printed = executed("03_expert_parallelism.ipynb", pictures=8)
    alone, every = re.findall(r"^one device keeps (\d+) of (\d+) assignments$", printed, re.M)[0]
    assert int(alone) < int(every)  # something is dropped
    assert re.findall(r"^data \d, expert \d +keeps (\d+)$", printed, re.M) == [alone] * 4
    found = dict(re.findall(r"^(\w.*?) +predicted to the byte, keeps (\d+) assignments$", printed, re.M))
    assert len(found) == 7
    assert found.pop("RaggedAllToAll") == every
    assert set(found.values()) == {alone}
    assert "WRONGLY" not in printed
