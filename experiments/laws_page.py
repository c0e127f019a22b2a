"""Writes docs/laws.md: the tests that prove each law, and the functions that check it on a config of your own.

    python -m experiments.laws_page [--out=docs/laws.md]

The laws are those of moe_jax.audit.laws. Tests are found by their markers, without running them.
"""

import ast
import inspect
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from experiments import cli
from moe_jax.audit.laws import LAWS, Law
from moe_jax.files import write_file

OUT = cli.out("A file for the page; without it the page is printed.")

TESTS = pathlib.Path(__file__).parents[1] / "tests"
APART = {"matrix": "`make matrix`", "gpu": "`make gpu`", "tpu": "`make tpu`"}  # markers that make test leaves out


def main() -> None:
    path = cli.file("out", OUT.value)
    if path is None:
        print(page(), end="")
    else:
        write_file(path, page())


# ---------------------------------------------------------------- tests, by their markers


class Proof(NamedTuple):
    """A test function, the numbers of the laws it proves, and its other markers."""

    file: str
    name: str
    laws: tuple[int, ...]
    marks: frozenset[str]
    about: str

    @property
    def apart(self) -> str:
        """The command that runs it; "" if `make test` does."""
        return next((command for mark, command in APART.items() if mark in self.marks), "")


def proofs(folder: pathlib.Path = TESTS) -> list[Proof]:
    """All test functions under a folder with the marker `law`, in the order of files and lines.

    ValueError without the folder: an installed package has no tests.
    """
    if not folder.is_dir():
        raise ValueError(f"There are no tests in {folder} to read markers from; run this in a checkout.")
    found = [proof for file in sorted(folder.rglob("test_*.py")) for proof in of_file(file, folder)]
    return [proof for proof in found if proof.laws]


def of_file(file: pathlib.Path, folder: pathlib.Path) -> Iterator[Proof]:
    """Every test function of a file, with the markers of its module."""
    tree = ast.parse(file.read_text())
    assigned = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign) and named(node)}
    module = assigned.get("pytestmark")
    everywhere = module.elts if isinstance(module, ast.List | ast.Tuple) else [module] if module else []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            marks = [mark(d, assigned) for d in [*everywhere, *node.decorator_list]]
            laws = tuple(n for name, numbers in marks if name == "law" for n in numbers)
            others = frozenset(name for name, _ in marks) - {"law"}
            where = f"{folder.name}/{file.relative_to(folder).as_posix()}"
            yield Proof(where, node.name, laws, others, ast.get_docstring(node) or "")


def named(node: ast.Assign) -> bool:
    return len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)


def mark(node: ast.expr, assigned: dict[str, ast.expr]) -> tuple[str, tuple[int, ...]]:
    """Name and numbers of a decorator: of `pytest.mark.law(1, 5)`, "law" and (1, 5); a name stands for its value."""
    if isinstance(node, ast.Name):
        return mark(assigned[node.id], {}) if node.id in assigned else (node.id, ())
    numbers: tuple[Any, ...] = ()
    if isinstance(node, ast.Call):
        numbers = tuple(arg.value for arg in node.args if isinstance(arg, ast.Constant))
        node = node.func
    return (node.attr if isinstance(node, ast.Attribute) else "", numbers)


# ---------------------------------------------------------------- the page


def page() -> str:
    """Returns the page in Markdown."""
    tests = proofs()
    rows = [("", "law", "tests", "audit of a config"), ("---",) * 4]
    for law in LAWS:
        mine, link = [t for t in tests if law.number in t.laws], f"[{law.title}](#{anchor(law)})"
        audits = ", ".join(f"`{dotted(check)}`" for check in law.audit) or "-"
        rows.append((str(law.number), f"{link}: {law.sentence}", str(len(mine)), audits))
    head = [
        "# The laws",
        "What does this code guarantee, which tests prove it, and how do you check it on your own config?",
        "`make test` proves all of them on eight simulated devices. They apply to every registered component.",
        "\n".join(f"| {' | '.join(row)} |" for row in rows),
        "The table counts test functions; most run on many cases. `pytest --law N` runs the tests of law N; `--law`\n"
        "may be repeated. `-m matrix` selects the long cases (`make matrix`). The audit checks your own experiment:",
        "    .venv/bin/python -m pytest --law 6\n"
        "    .venv/bin/python -m pytest --law 1 --law 5 -m matrix\n"
        "    .venv/bin/python -m experiments.audit --config=configs/glam_nano.py",
        "This page is written by `python -m experiments.laws_page --out=docs/laws.md`.",
    ]
    return "\n\n".join([*head, *(section(law, tests) for law in LAWS)]) + "\n"


def section(law: Law, tests: list[Proof]) -> str:
    """Returns what the page says of one law."""
    mine = [t for t in tests if law.number in t.laws]
    audits = [f"- `{dotted(check)}`: {first_line(check)}" for check in law.audit]
    checked = "\n".join(["Checked on your config by", "", *audits]) if audits else f"Not in the audit. {law.unaudited}"
    listed = [f"- `{file}`: {', '.join(shown(t) for t in mine if t.file == file)}" for file in files(mine)]
    fields = [f"- `{name}`: {reason}" for name, reason in law.fields]
    return "\n\n".join(
        (
            f"## {law.number}. {law.title}",
            law.sentence[0].upper() + law.sentence[1:],
            "    .venv/bin/python -m pytest --law " + str(law.number),
            checked,
            "\n".join(["Config fields that matter:", "", *fields]),
            "\n".join(["Tests:", "", *listed]),
        )
    )


def files(tests: list[Proof]) -> list[str]:
    """Files of tests, those of tests/laws/ first."""
    return sorted({t.file for t in tests}, key=lambda file: (not file.startswith("tests/laws/"), file))


def shown(test: Proof) -> str:
    return f"`{test.name}` ({test.apart})" if test.apart else f"`{test.name}`"


def dotted(check: Callable[..., Any]) -> str:
    """The dotted name of a function."""
    return f"{check.__module__}.{check.__name__}"


def first_line(check: Callable[..., Any]) -> str:
    """First line of a function's docstring, without the law it names."""
    text = (inspect.getdoc(check) or "").partition("\n")[0].rstrip(".")
    text = text.partition(": ")[2] if text.startswith("Law ") else text
    return text[:1].upper() + text[1:]


def anchor(law: Law) -> str:
    """Link to a law's section, as GitHub forms it."""
    words = f"{law.number}. {law.title}".lower()
    return "".join(c for c in words if c.isalnum() or c in " -").replace(" ", "-")


if __name__ == "__main__":
    cli.run(main)
