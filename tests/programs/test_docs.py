"""The pages are true: links lead somewhere, code runs, commands name programs, flags and fields that exist."""

import ast
import dataclasses
import importlib.util
import re
import shlex
import typing
from pathlib import Path

import pytest

from configs import glam_nano
from experiments import cli
from moe_jax.config import COMPONENTS, KINDS, SECTIONS, build
from moe_jax.core.shard import AXES
from moe_jax.models import Model

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").is_file())
PAGES = [ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("experiments/*/README.md"))]
QUESTIONS = [  # headings of pages that others link to
    *("routing.md#capacity", "routing.md#how-are-dropped-tokens-handled", "routing.md#what-is-s"),
    *("routing.md#how-do-i-add-a-router", "routing.md#how-do-i-add-a-loss", "routing.md#where-is-the-z-loss"),
    *("routing.md#how-do-i-read-aux", "attention.md#where-is-the-attention", "parallelism.md#where-is-the-all-to-all"),
    *("parallelism.md#which-axis-should-i-use", "parallelism.md#proving-it-for-your-own-config"),
    *("experiments.md#how-do-i-change-the-number-of-experts", "experiments.md#how-do-i-change-the-learning-rate"),
    *("experiments.md#how-do-i-train-in-bfloat16", "experiments.md#how-do-i-use-my-own-text"),
    *("experiments.md#how-do-i-run-on-a-gpu", "experiments.md#how-do-i-run-on-a-tpu"),
    *("experiments.md#how-do-i-evaluate", "experiments.md#how-do-i-resume", "experiments.md#what-is-in-a-workdir"),
]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(text: str) -> str:
    """The text of a page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken(page: Path, text: str) -> list[str]:
    """Relative links of a page to no file, or to no heading of one."""
    links = re.findall(r"\]\(([^)\s]+)\)", prose(text))
    wrong = []
    for link in (link for link in links if not re.match(r"\w+:", link)):
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        known = anchors(text if target == page else target.read_text()) if target.suffix == ".md" and anchor else set()
        if not target.exists() or (anchor and anchor not in known):
            wrong.append(link)
    return wrong


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=name)
def test_links_lead_somewhere(page):
    assert broken(page, page.read_text()) == []


@pytest.mark.parametrize("link", ["nothing.md", "routing.md#nothing", "#nothing", "../nowhere/routing.md"])
def test_a_broken_link_is_found(link):
    page = ROOT / "docs" / "speed.md"
    assert broken(page, f"[here]({link})") == [link]


def test_frequent_questions_have_their_headings():
    index = (ROOT / "docs" / "README.md").read_text()
    assert broken(ROOT / "docs" / "README.md", " ".join(f"[x]({link})" for link in QUESTIONS)) == []
    assert set(re.findall(r"\]\(([\w.]+#[\w-]+)\)", index)) <= set(QUESTIONS)


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=name)
def test_a_page_says_its_question_first(page):
    title, first = page.read_text().split("\n\n")[:2]
    assert title.startswith("# ")
    assert "?" in first


@pytest.mark.parametrize("page", ["routing", "experiments", "attention"])
def test_code_runs(page):
    """Blocks of Python, in a namespace that has a config to edit."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / f"{page}.md").read_text(), re.DOTALL)
    names = {"__name__": "docs", "config": glam_nano.get_config()}
    for block in blocks:
        exec(block, names)
    assert blocks
    build(names["config"])


def commands(text: str) -> list[list[str]]:
    """The words of every `python -m experiments...` or `moe_jax...` in a page's blocks, comments left out."""
    lines = re.findall(r"^(?: {4}|\s*)(?:\.venv/bin/)?(python -m .*)$", text.replace("\\\n", " "), re.MULTILINE)
    whole = (line.removesuffix('"') if line.count('"') % 2 else line for line in lines)  # the end of a longer command
    return [shlex.split(line, comments=True) for line in whole]


def options(program: str) -> set[str]:
    """Names of flags that a program's modules and what programs share define."""
    spec = importlib.util.find_spec(program)
    assert spec is not None, f"there is no program {program}"
    files = [Path(str(spec.origin))]
    files += [f.with_name("__main__.py") for f in files if f.name == "__init__.py"]
    files += [ROOT / "experiments" / "cli.py", ROOT / "experiments" / "bench" / "options.py"]
    return {found for f in files if f.is_file() for found in strings(f)} | {"help", "traceback"}


def strings(file: Path) -> set[str]:
    """All string literals of a module, among which its flags are."""
    return {node.value for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant)}


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=name)
def test_commands_are_real(page):
    for _, _, program, *words in commands(page.read_text()):
        if not program.startswith(("experiments", "moe_jax", "tests")):
            continue  # another library's
        if "FLAGS" in words or any("$" in word for word in words):
            continue  # a pattern, or a line of a script, which a test of its own runs
        known, words = options(program), words[: words.index("--")] if "--" in words else words
        given = [word for word in words if word.startswith("--") and not word.startswith("--config")]
        assert [w for w in given if not {(n := w[2:].partition("=")[0]), n.removeprefix("no")} & known] == []
        file = next((word.partition("=")[2] for word in words if word.startswith("--config=")), None)
        if file is not None and file != "FILE":
            config, fields = cli.load(file), [word for word in words if word.startswith("--config.")]
            build(cli.overridden(config, fields) if fields else config)


def test_an_unreal_command_is_found():
    (words,) = commands("    python -m experiments.train --nothing=1 \\\n        --config=x  # a comment")
    assert words[3:] == ["--nothing=1", "--config=x"]
    assert "nothing" not in options("experiments.train")
    assert {"workdir", "overwrite", "compare"} <= options("experiments.train")
    with pytest.raises(AssertionError, match="no program"):
        options("experiments.nothing")


def test_every_config_is_in_its_table():
    table = (ROOT / "docs" / "experiments.md").read_text().partition("## The configs")[2].partition("\n## ")[0]
    named = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    assert named == {p.stem for p in (ROOT / "configs").glob("*.py")} - {"__init__"}


def test_every_component_is_named():
    text = " ".join(page.read_text() for page in PAGES if page.parent.name == "docs")
    assert [name for name in COMPONENTS if not re.search(rf"\b{name}\b", text)] == []


def fields(text: str) -> set[str]:
    """Paths of config fields that a page names in code: `run.steps`, `config.model.moe.E=8`."""
    code = " ".join(re.findall(r"`([^`\n]+)`", prose(text)))
    sections = {path.partition(".")[0] for path in SECTIONS if path} | {"mesh"}
    named = re.findall(rf"(?<![\w./])(?:config\.)?((?:{'|'.join(sections)})\.[\w.]*\w)", code)
    return {
        path for path in named if not path.endswith((".py", ".md", ".sh")) and not re.search(r"\.(apply|init)\b", path)
    }


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_fields_of_a_config_exist(page):
    known = {f"{path}.{f.name}" for path, section in SECTIONS.items() if path for f in dataclasses.fields(section)}
    known |= {f"mesh.{axis}" for axis in AXES} | {"model.kind", "model.moe"}
    known |= {f"model.{f.name}" for kind in typing.get_args(Model) for f in dataclasses.fields(kind)}
    inside = tuple(f"{path}." for path in known if path.rpartition(".")[2] in KINDS)  # a path goes on into a component
    found = fields(page.read_text())
    assert sorted(path for path in found if path not in known and not path.startswith(inside)) == []


def test_a_field_that_does_not_exist_is_found():
    assert fields("`run.nothing=1`, `config.model.moe.E=8`, `moe.py`, run.prose") == {"run.nothing", "model.moe.E"}
