"""The list of mutations fits the code as it is: what each replaces is there once, and its flags make an experiment."""

import ast
import re
import subprocess

import pytest

from experiments import cli
from moe_jax.config import build
from tests.mutations import CONFIG, MUTATIONS, ROOT, Mutation, judged, mutated

OVERRIDES = sorted({m.overrides for m in MUTATIONS})
ROW = f"{'one model, every mesh, data=2':<60} {{}} outputs 1e+00 in stack_0/moe_0/up_EDF"


def done(code: int, out: str = "", err: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess([], code, out, err)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[m.name for m in MUTATIONS])
def test_a_mutation_changes_the_code(mutation):
    text = (ROOT / mutation.file).read_text(encoding="utf-8")
    changed = mutated(mutation, text)
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(text))


def test_names_are_unique():
    assert len({m.name for m in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.parametrize("overrides", OVERRIDES, ids=" ".join)
def test_flags_make_an_experiment(overrides):
    given: dict = {}
    exec(CONFIG, given)
    assert build(cli.overridden(given["get_config"](), [o for o in overrides if o.startswith("--config.")]))


@pytest.mark.parametrize("text", ["b = 1", "a = 1; a = 1"])
def test_what_is_not_there_once_is_refused(text):
    with pytest.raises(ValueError, match="must be there once"):
        mutated(Mutation("m", "m.py", "a = 1", "a = 2"), text)


@pytest.mark.parametrize(
    ("audit", "verdict"),
    [
        (done(0, ROW.format("yes ")), "holds"),
        (done(1, ROW.format("NO  ")), "broken"),
        (done(2, ROW.format("yes "), "error: out_specs ... or pass check_vma=False"), "refused"),
        (done(1, ROW.format("yes "), "TypeError: carry ... so the manual axis types do not match."), "refused"),
        (done(1, ROW.format("yes "), "Traceback\nTypeError: shapes differ"), "failed"),
        (done(2, "", "error: B does not divide"), "failed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_crash_is_not_a_broken_law(audit, verdict):
    assert judged(audit).verdict == verdict


def test_the_first_broken_law_is_named():
    found = judged(done(1, ROW.format("yes ") + "\n" + ROW.format("NO  ")))
    assert found.law == "one model"
    assert "up_EDF" in found.line


def test_the_documented_list_is_complete():
    """docs/parallelism.md names every mutation: those that a law catches in its table, the refused ones above it."""
    page = (ROOT / "docs" / "parallelism.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| (\w+_\w+) \| [\w ,]+ \| ", page.partition("### Does it see")[2], re.MULTILINE)
    assert table == [m.name for m in MUTATIONS if not m.refused]
    assert all(f"`{m.name}`" in page for m in MUTATIONS if m.refused)
    assert f"{len(MUTATIONS)} deliberate bugs" in page
    assert f"**{len(table)} of {len(table)}**" in page
