"""The museum fits the code as it is, and docs/museum.md is of it."""

import ast
import importlib.machinery
import sys

import pytest

from moe_jax.audit.laws import LAWS
from tests.museum import forks, page
from tests.museum.absent import ABSENT
from tests.museum.catch import Audit, Outcome, Pytest
from tests.museum.entries import MUSEUM
from tests.museum.mutant import ROOT, Mutant

NAMES = [entry.mutant.name for entry in MUSEUM]


@pytest.mark.parametrize("entry", MUSEUM, ids=NAMES)
def test_a_mutant_changes_the_code(entry):
    """The text that a mutant replaces is there once, and its check exists."""
    text = entry.mutant.path.read_text(encoding="utf-8")
    assert ast.dump(ast.parse(entry.mutant.text())) != ast.dump(ast.parse(text))
    if isinstance(entry.catch, Pytest):
        assert f"def {entry.catch.name}(" in (ROOT / entry.catch.file).read_text(encoding="utf-8")
    else:
        assert LAWS[entry.catch.law - 1].audit


def test_there_are_many_and_each_once():
    assert len(MUSEUM) >= 40
    assert len(set(NAMES)) == len(NAMES)
    threads = [thread for entry in (*MUSEUM, *ABSENT) for thread in entry.threads]
    assert all(" #" in thread or " log: " in thread for thread in threads)
    assert len({thread for entry in MUSEUM for thread in entry.threads}) >= 40


def test_the_page_is_of_this_museum():
    """docs/museum.md has every mutant with its thread, file and check, and everything that is absent."""
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.listed(text) == NAMES
    for entry in MUSEUM:
        cells = page.row(entry, Outcome("broken"), 0)[:5]
        assert str(page.Row(cells)).removesuffix(" |") in text, entry.mutant.name
    for absent in ABSENT:
        assert str(page.Row((", ".join(absent.threads), absent.essence, absent.reason))) in text
    assert text.startswith(page.INTRO.strip())


@pytest.mark.parametrize(
    ("done", "verdict"),
    [
        (forks.Done(0, "1 passed", "", 1), "holds"),
        (forks.Done(1, "\nE   AssertionError: \nE   Not equal to tolerance rtol=0.02\n1 failed", "", 1), "broken"),
        (forks.Done(1, "\nE   assert 3 == 4\n1 failed", "", 1), "broken"),
        (forks.Done(1, "\nE   NameError: no jnp\n1 failed", "", 1), "failed"),
        (forks.Done(2, "1 error during collection", "", 1), "failed"),
        (forks.Done(5, "no tests ran", "", 1), "failed"),
        (forks.Done(-24, "", "", 240), "failed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_crash_is_not_a_failed_test(done, verdict):
    assert Pytest("tests/test_a.py", "test_a").judge(done).verdict == verdict


def test_a_planted_edit_is_what_is_imported(monkeypatch, tmp_path):
    """And not what was compiled before; other files are as they are."""
    loader = importlib.machinery.SourceFileLoader
    monkeypatch.setattr(loader, "get_data", loader.get_data)
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    files = [tmp_path / "a.py", tmp_path / "b.py"]
    for file in files:
        file.write_text("N = 1\n")
        loader(file.stem, str(file)).get_code(file.stem)  # compiles, and keeps that
    forks.plant(Mutant("two", str(files[0]), "N = 1", "N = 2"))
    found: list[dict] = [{}, {}]
    for file, names in zip(files, found, strict=True):
        exec(loader(file.stem, str(file)).get_code(file.stem), names)
    assert [names["N"] for names in found] == [2, 1]
    assert files[0].read_text() == "N = 1\n"


def test_jobs_end_in_order_with_their_output():
    """A crash of one is its own; nothing of the code may be imported before the edit."""
    with pytest.raises(RuntimeError, match="imported before it could be mutated"):
        next(forks.run([Audit(1).job()]))
