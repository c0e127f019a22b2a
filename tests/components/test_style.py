"""The language of the code: docstrings can be read alone, and a public name has one meaning."""

import ast
import collections
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]
FOLDERS = ("moe_jax", "experiments", "configs", "tests", "notebooks")
FILES = sorted(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py"))
DANGLING = re.compile(r"(Of|That|Those|It|Its|What|Whether|Which|How)\b")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# One thing in two frameworks, on two platforms, or for two kinds of array.
SAME = {"Attention", "FeedForward", "MoE", "outer", "positions"}


def dangling(text: str) -> list[str]:
    """First sentences of docstrings that say nothing without the name above them; a whole question can stand."""
    found = []
    for node in ast.walk(ast.parse(text)):
        doc = ast.get_docstring(node) if isinstance(node, DOCUMENTED) else None
        sentence = re.split(r"(?<=[.?!:])\s|\n\n", doc)[0] if doc else ""
        if DANGLING.match(sentence) and not sentence.endswith("?"):
            found.append(sentence)
    return found


def test_docstrings_can_be_read_without_the_name():
    found = {str(p.relative_to(ROOT)): dangling(p.read_text(encoding="utf-8")) for p in FILES}
    assert {path: bad for path, bad in found.items() if bad} == {}


def test_dangling_docstrings_are_found():
    good = ['"""Returns it."""', 'def f():\n    """What does it cost?\n\n    Much.\n    """', "class A:\n    pass"]
    bad = [
        '"""What it costs."""',
        'class A:\n    """Of a layer."""',
        'def f():\n    """Which one.\n\n    Why?\n    """',
    ]
    assert [len(dangling(text)) for text in (*good, *bad)] == [0, 0, 0, 1, 1, 1]


def test_a_public_name_of_the_library_has_one_meaning():
    """No public function or class of moe_jax has the name of one in another file."""
    places = collections.defaultdict(list)
    for path in (ROOT / "moe_jax").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, DOCUMENTED[1:]) and not node.name.startswith("_"):
                places[node.name].append(str(path.relative_to(ROOT)))
    assert {name: files for name, files in places.items() if len(files) > 1 and name not in SAME} == {}
