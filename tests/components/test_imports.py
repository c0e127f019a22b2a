"""The order of the package: who may import whom, and that collectives live in one file."""

import ast
from pathlib import Path

import pytest

from moe_jax.core.traits import Traits

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "moe_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
ORDER = (
    ("core", "files", "lock", "names", "words", "xla"),
    ("attention", "routers", "gating", "experts", "losses", "dispatch", "exchanges", "manifest"),
    ("moe_config", "room"),
    ("moe",),
    ("models", "nnx"),
    ("data", "optim", "reporting", "checkpoint"),
    ("config",),
    ("overrides", "continuation"),
    ("costs", "workdir"),
    ("evaluate", "health"),
    ("step",),
    ("transfer",),
    ("train",),
    ("audit",),
    ("plan", "inspect"),
    ("export",),
)
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
COLLECTIVES = {
    *("psum", "pmean", "pmax", "pmin", "psum_scatter", "all_gather", "all_to_all", "ragged_all_to_all"),
    *("ppermute", "pshuffle", "pbroadcast", "pcast", "pvary", "axis_index", "axis_size", "shard_map"),
}
JAX = ("jax", "lax", "jax.lax")  # no other name is given to them


def unit(file: Path) -> str:
    """The top-level module or package a file belongs to; "" for moe_jax itself."""
    name = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if name == "__init__" else name


def imported(tree: ast.AST) -> set[str]:
    """Dotted names of everything a file imports, in functions too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{a.name}" for a in node.names}
    return names


def wrong(unit: str, tree: ast.AST) -> list[str]:
    """Imports of this unit that go upwards or sideways, or out of the package."""
    bad = []
    for name in imported(tree):
        package, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if package in ("configs", "experiments", "tests"):
            bad.append(name)
        if package == "moe_jax" and target != unit and not LEVEL[target] < LEVEL.get(unit, len(ORDER)):
            bad.append(name)
    return bad


def uses_collectives(tree: ast.AST) -> set[str]:
    """Collectives of JAX that a file calls or imports; methods of `Shard` have some of their names."""
    attributes = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) in JAX}
    return COLLECTIVES & (attributes | {name.rpartition(".")[2] for name in imported(tree)})


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_go_down(file):
    """core -> routers | gating | experts | losses | dispatch -> moe -> models -> ... -> audit | plan | inspect."""
    assert unit(file) == "" or unit(file) in LEVEL, f"{unit(file)} has no place in ORDER"
    assert wrong(unit(file), ast.parse(file.read_text())) == []


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_collectives_are_in_one_file(file):
    """Only core/shard.py talks to other devices."""
    used = uses_collectives(ast.parse(file.read_text()))
    assert bool(used) == (file == PACKAGE / "core" / "shard.py"), used


def test_no_grab_bags():
    """Every file is named after what it holds."""
    assert not {f.stem for f in FILES} & {"utils", "util", "common", "helpers", "misc"}


def test_the_alphabet_stands_alone():
    """core/dims.py imports nothing of the package."""
    assert not [n for n in imported(ast.parse((PACKAGE / "core/dims.py").read_text())) if n.startswith("moe_jax")]


def test_the_oracle_stands_alone():
    """The oracle shares no code with the library."""
    for file in ("oracle.py", "oracle_routing.py", "oracle_attention.py"):
        names = imported(ast.parse((ROOT / "tests" / file).read_text()))
        outside = {n.split(".")[0] for n in names if not n.startswith("tests.oracle")}
        assert outside <= {"math", "fractions", "typing", "numpy", "scipy", "tests"}, outside


def guessed(tree: ast.AST) -> list[str]:
    """Traits of components that are asked for with a default of the file's own."""
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and len(n.args) == 3]
    asked = [c.args[1] for c in calls if isinstance(c.func, ast.Name) and c.func.id == "getattr"]
    return [a.value for a in asked if isinstance(a, ast.Constant) and a.value in {*Traits._fields, "M"}]


def test_traits_have_one_default():
    """Only core/traits.py knows the defaults of what a router declares."""
    files = [f for folder in ("moe_jax", "experiments", "tests") for f in (ROOT / folder).rglob("*.py")]
    found = {str(f.relative_to(ROOT)): guessed(ast.parse(f.read_text())) for f in files}
    assert {name: asked for name, asked in found.items() if asked} == {}
    assert guessed(ast.parse('getattr(cfg.router, "causal", True)')) == ["causal"]


@pytest.mark.parametrize(
    ("unit", "line", "allowed"),
    [
        ("moe", "from moe_jax.routers import TopK", True),
        ("routers", "import moe_jax.experts.mlp", False),
        ("routers", "from moe_jax.routers.switch import Switch", True),
        ("core", "def f():\n    from moe_jax import moe", False),
        ("train", "from configs import nano", False),
        ("reporting", "from moe_jax.config import Experiment", False),
    ],
)
def test_the_order_bites(unit, line, allowed):
    """The rule itself: down is allowed, up and sideways are not, wherever the import is written."""
    assert (wrong(unit, ast.parse(line)) == []) == allowed


def test_collectives_are_seen():
    """Under any spelling."""
    for line in (
        "lax.psum(x, 'data')",
        "jax.lax.all_to_all(x)",
        "from jax.lax import ppermute",
        "jax.shard_map(f)",
    ):
        assert uses_collectives(ast.parse(line)), line
