"""The laws are stated once: markers, pages and config fields agree with moe_jax/audit/laws.py."""

import dataclasses
import pathlib
import re
from types import SimpleNamespace

import pytest

from experiments import cli, laws_page
from moe_jax.audit.laws import LAWS, law
from moe_jax.config import build
from tests import conftest, programs

ROOT = pathlib.Path(__file__).parents[2]
NUMBERS = set(range(1, 12))


def test_laws_are_numbered_in_order():
    assert [law.number for law in LAWS] == sorted(NUMBERS)
    assert law(6).name == "communication is accounted for"


def test_every_law_has_tests_and_no_test_another_law():
    proofs = laws_page.proofs()
    assert {number for proof in proofs for number in proof.laws} == NUMBERS
    usual = {number for proof in proofs if not proof.apart for number in proof.laws}
    assert usual == NUMBERS, "make test proves all of them"


def test_docstrings_name_the_laws_of_the_markers():
    """Docstrings that begin with "Law 4", or have "law 7" in brackets, name the laws of their markers."""
    tests = [test for file in sorted((ROOT / "tests").rglob("test_*.py")) for test in laws_page.of_file(file, ROOT)]
    pattern = r"^Laws? (\d+)(?: and (\d+))?|\(law (\d+)\)"
    stated = [({int(n) for m in re.findall(pattern, test.about) for n in m if n}, test) for test in tests]
    assert sum(bool(numbers) for numbers, _ in stated) > 30
    assert [test.name for numbers, test in stated if not numbers <= set(test.laws)] == []


def test_markers_are_read_as_pytest_reads_them(request, tmp_path):
    """Decorators, several numbers, names of markers, markers of a module; and all tests of this very session."""
    (tmp_path / "test_one.py").write_text(
        "import pytest\n"
        "pytestmark = [pytest.mark.law(3), pytest.mark.gpu]\n"
        "matrix = pytest.mark.matrix\n"
        "@matrix\n@pytest.mark.law(1, 5)\ndef test_a():\n    '''Law 1.'''\n"
        "@pytest.mark.parametrize('x', [1])\ndef test_b(x):\n    pass\n"
        "@pytest.mark.law(9)\ndef helper():\n    pass\n"
    )
    (tmp_path / "test_two.py").write_text("def test_c():\n    pass\n")
    found = laws_page.proofs(tmp_path)
    assert [(p.name, p.laws, p.about) for p in found] == [("test_a", (3, 1, 5), "Law 1."), ("test_b", (3,), "")]
    assert [p.apart for p in found] == ["`make matrix`", "`make gpu`"]
    read = {(p.file, p.name): set(p.laws) for p in laws_page.proofs()}
    for item in request.session.items:
        key = (item.path.relative_to(ROOT).as_posix(), item.originalname)
        assert read.get(key, set()) == {n for mark in item.iter_markers("law") for n in mark.args}, key


@pytest.mark.parametrize(
    ("asked", "kept"),
    [([], ["one", "both", "none"]), ([1], ["one", "both"]), ([5], ["both"]), ([1, 5], ["one", "both"])],
)
def test_the_option_selects_the_tests_of_a_law(asked, kept):
    mark = lambda *numbers: [SimpleNamespace(args=numbers)] if numbers else []  # noqa: E731
    numbers = {"one": (1,), "both": (1, 5), "none": ()}
    items = [SimpleNamespace(name=n, iter_markers=lambda _, v=v: mark(*v)) for n, v in numbers.items()]
    dropped = []
    hook = SimpleNamespace(pytest_deselected=lambda items: dropped.extend(items))
    config = SimpleNamespace(getoption={"law": asked}.get, hook=hook)
    conftest.pytest_collection_modifyitems(config, items)
    assert [item.name for item in items] == kept
    assert {item.name for item in dropped} == set(numbers) - set(kept)


@pytest.mark.parametrize("number", [0, 12])
def test_the_option_refuses_other_numbers(number):
    with pytest.raises(pytest.UsageError, match=f"--law {number} is no law; the laws are 1 to 11"):
        conftest.pytest_configure(SimpleNamespace(getoption={"law": [1, number]}.get))


def test_the_page_is_up_to_date(tmp_path):
    """docs/laws.md is what `python -m experiments.laws_page --out=docs/laws.md` writes."""
    outcome = programs.call(laws_page, f"--out={tmp_path / 'laws.md'}")
    assert (outcome.code, outcome.out) == (0, "")
    assert (tmp_path / "laws.md").read_text() == (ROOT / "docs/laws.md").read_text()


def test_without_a_checkout_it_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"no tests in .*none to read markers from; run this in a checkout"):
        laws_page.proofs(tmp_path / "none")


def test_the_page_links_to_its_sections():
    """Links of the table against the headings, by GitHub's rule for anchors."""
    text = laws_page.page()
    headings = re.findall(r"^## (.*)$", text, re.M)
    anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
    assert re.findall(r"\(#([\w-]+)\)", text) == anchors
    assert len(anchors) == 11


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_titles_are_the_same_everywhere(page):
    listed = re.findall(r"^(\d+)\. \*\*\[?([^*\]]+?)\.?(?:\]\([^)]*\))?\.?\*\*", (ROOT / page).read_text(), re.M)
    assert [(int(number), title) for number, title in listed] == [(law.number, law.title) for law in LAWS]


def test_config_fields_of_laws_exist():
    exp = build(cli.load("configs/glam_nano.py"))
    names = {".".join(path) for path in fields(exp)}
    assert {name for law in LAWS for name, _ in law.fields} <= names


def fields(value, *path):
    """Paths of all fields of nested dataclasses."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield (*path, field.name)
            yield from fields(getattr(value, field.name), *path, field.name)


def test_every_law_is_audited_or_says_why_not():
    for one in LAWS:
        assert bool(one.audit) != bool(one.unaudited), one.title
        assert all(check.__doc__ for check in one.audit)
