"""The list of mutations fits the code as it is: what each replaces is there once, and its flags make an experiment."""

import ast
import re

import pytest

from experiments import cli
from moe_jax.audit.laws import LAWS
from moe_jax.config import build
from tests.museum.catch import TINY, Audit
from tests.museum.forks import Done
from tests.museum.mutant import ROOT, Mutant
from tests.mutations import MUTATIONS

OVERRIDES = sorted({m.overrides for m in MUTATIONS})
ROW = f"{'one model, every mesh, data=2':<60} {{}} outputs 1e+00 in stack_0/moe_0/up_EDF"


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[m.name for m in MUTATIONS])
def test_a_mutation_changes_the_code(mutation):
    text = (ROOT / mutation.file).read_text(encoding="utf-8")
    assert ast.dump(ast.parse(mutation.mutant.text())) != ast.dump(ast.parse(text))
    assert LAWS[mutation.law - 1].audit, "the law is audited"
    if mutation.test:
        assert f"def {mutation.test.name}(" in (ROOT / mutation.test.file).read_text(encoding="utf-8")


def test_names_are_unique():
    assert len({m.name for m in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.parametrize("overrides", OVERRIDES, ids=" ".join)
def test_flags_make_an_experiment(overrides):
    config = cli.load(str(TINY))
    assert build(cli.overridden(config, [o for o in overrides if o.startswith("--config.")]))


@pytest.mark.parametrize("text", ["b = 1", "a = 1; a = 1"])
def test_what_is_not_there_once_is_refused(text, tmp_path):
    (tmp_path / "m.py").write_text(text)
    with pytest.raises(ValueError, match="must be there once"):
        Mutant("m", str(tmp_path / "m.py"), "a = 1", "a = 2").text()


@pytest.mark.parametrize(
    ("done", "verdict"),
    [
        (Done(0, ROW.format("yes "), "", 1), "holds"),
        (Done(1, ROW.format("NO  "), "", 1), "broken"),
        (Done(2, ROW.format("yes "), "error: out_specs ... or pass check_vma=False", 1), "refused"),
        (Done(1, ROW.format("yes "), "TypeError: carry ... so the manual axis types do not match.", 1), "refused"),
        (Done(2, "", "error: tokens vary ... whose shards must all have the same tokens; give", 1), "refused"),
        (Done(1, ROW.format("yes "), "Traceback\nTypeError: shapes differ", 1), "failed"),
        (Done(2, "", "error: B does not divide", 1), "failed"),
        (Done(-9, "", "", 240), "failed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_crash_is_not_a_broken_law(done, verdict):
    assert Audit(1).judge(done).verdict == verdict


def test_the_first_broken_law_is_named():
    found = Audit(1).judge(Done(1, ROW.format("yes ") + "\n" + ROW.format("NO  "), "", 1))
    assert "one model" in found.line
    assert "up_EDF" in found.line


def test_the_documented_list_is_complete():
    """docs/parallelism.md names every mutation: those that a law catches in its table, the refused ones above it."""
    page = (ROOT / "docs" / "parallelism.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| (\w+_\w+) \| [\w ,]+ \| ", page.partition("### Does it see")[2], re.MULTILINE)
    assert table == [m.name for m in MUTATIONS if not m.refused]
    assert all(f"`{m.name}`" in page for m in MUTATIONS if m.refused)
    assert f"{len(MUTATIONS)} deliberate bugs" in page
    assert f"**{len(table)} of {len(table)}**" in page
