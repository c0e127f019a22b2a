"""docs/config.md is what the code says: every field, every component, flags that can be typed."""

import dataclasses
import re
import runpy
import shlex

import pytest

from experiments import cli, reference
from moe_jax.config import COMPONENTS, SECTIONS, build, parse
from moe_jax.core.ranges import in_words, ranged_fields
from moe_jax.models import MODELS
from moe_jax.overrides import override

PAGE = reference.PAGE.read_text()
WRITTEN = re.findall(r"^    --config\.(.*)$", PAGE.partition("## Components")[2], re.MULTILINE)
FLAGS = [tuple(shlex.split(flag)[0].split("=", 1)) for flag in WRITTEN]


def test_the_page_is_up_to_date():
    """Write it by python -m experiments.reference --out=docs/config.md."""
    assert reference.page() == PAGE


def test_every_field_is_on_the_page_with_a_meaning():
    rows = dict(re.findall(r"^\| `(config[\w.]*)` \|.*\| (.*) \|$", PAGE, re.MULTILINE))
    sections = {**{path: [cls] for path, cls in SECTIONS.items()}, "model": MODELS.values()}
    fields = {
        f"config.{path}.{f.name}".replace("..", ".")
        for path, of in sections.items()
        for cls in of
        for f in dataclasses.fields(cls)
    }
    missing = fields - set(rows) - {f"config.{path}" for path in (*SECTIONS, "mesh", "model.V")}
    assert not missing
    assert rows["config.optim.clip"] == "largest norm of all gradients together, None for no limit"
    assert [path for path, text in rows.items() if not text.strip()] == []


@pytest.mark.parametrize("cls", COMPONENTS.values(), ids=lambda cls: cls.__name__)
def test_every_component_is_on_the_page_with_its_fields(cls):
    """In a section of its own, with its first line, a row for each field, and a flag that makes one."""
    (text,) = re.findall(rf"^#### {cls.__name__}\n(.*?)(?=^###|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert (cls.__doc__ or "").splitlines()[0] in re.sub(r"\[(arXiv:.*?)\]\(.*?\)", r"\1", text)
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| (.+) \| (.+) \|$", text, re.MULTILINE)
    assert [name for name, *_ in rows] == [f.name for f in dataclasses.fields(cls)]
    ((path, call),) = [(path, call) for path, call in FLAGS if call.startswith(f"{cls.__name__}(")]
    assert type(parse(call)) is cls
    values = {"model": {"attention": "MHA(H=2, A=4)"}}
    assert override(values, [(path, call)]) != values


def test_every_range_is_on_the_page():
    """In the row of its field: the interval that a component is checked against."""
    sections = {cls: f"config.{path}".rstrip(".") for path, cls in SECTIONS.items()} | dict.fromkeys(
        MODELS.values(), "config.model"
    )
    for cls in (*COMPONENTS.values(), *sections):
        text = PAGE if cls in sections else PAGE.partition(f"#### {cls.__name__}\n")[2].partition("\n###")[0]
        for name, hint in ranged_fields(cls).items():
            path = f"{sections[cls]}.{name}" if cls in sections else name
            if path not in ("config.mesh", "config.model.V"):
                assert f"| `{path}` | {in_words(hint)} |" in text
    assert "| `config.mesh.expert` | a whole number in [1, 2**31), or -1 for the rest |" in PAGE
    assert "| `b1` | a number in [0, 1) | `0.9` |" in PAGE


def test_the_first_flags_can_be_typed():
    """Five of them, all at once."""
    values = runpy.run_path(reference.CONFIG)["get_config"]().to_dict()
    given = [tuple(shlex.split(example)[0].split("=", 1)) for example in cli.EXAMPLES]
    assert len(given) == 5
    assert all(f"--config.{example}" in PAGE for example in cli.EXAMPLES)
    exp = build(override(values, given))
    assert (exp.model.moe.router.K, exp.model.moe.experts.F, exp.optim.schedule.peak) == (4, 256, 0.001)
    assert [build(override(values, [one])) == build(values) for one in given] == [False] * 5


def test_links_lead_somewhere():
    titles = {reference.anchor(title) for title in re.findall(r"^#+ (.*)$", PAGE, re.MULTILINE)}
    assert set(re.findall(r"\]\(#(.*?)\)", PAGE)) <= titles
    for name in re.findall(r"\]\((\w+\.md)\)", PAGE):
        assert (reference.PAGE.parent / name).is_file(), name


@dataclasses.dataclass(frozen=True)
class Written:
    """A first line that names c.

    a, b: both of them. See more. K: of an array, as sec. 3.1 says; None is
        all. And more.
    """

    a: int
    b: int = 2
    K: int = 3
    c: int = 4
    d: int = 5  # a comment
    e: int = 6


def test_meanings_are_read_where_fields_are():
    """From the docstring, or the comment after a field."""
    found = [reference.meaning(Written, name) for name in "abKcde"]
    assert found == [
        "both of them",
        "both of them",
        "of an array, as sec. 3.1 says; None is all",
        "see above",
        "a comment",
        "",
    ]
