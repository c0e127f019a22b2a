"""Every program is listed, says what it takes, shares its flags with the others, and is in the wheel."""

import ast
import fnmatch
import importlib
import json
import os
import pathlib
import subprocess
import sys
import tomllib

import pytest
from absl import flags

from experiments import __main__ as listing
from experiments import cli
from experiments.launch import __main__ as launch
from tests import programs

ROOT = pathlib.Path(__file__).parents[2]
PACKAGES = ("moe_jax", "configs", "experiments")
RUN = '\nif __name__ == "__main__":'
FILES = [path for path in sorted((ROOT / "experiments").rglob("*.py")) if RUN in path.read_text()]
NAMES = [".".join(path.relative_to(ROOT / "experiments").with_suffix("").parts) for path in FILES]
MODULES = [name for name in NAMES if name not in ("__main__", "launch.__main__")]  # launch parses without jax
SHARED = {"report", "json", "out", "workdir", "data_dir", "config", "compare", "step", "windows", "devices"}
PROCESSES = {"coordinator", "processes", "process", "peer_timeout", "heartbeat"}
# Other words for --report, --json, --out and --devices.
FORBIDDEN = {"html", "page", "table", "record", "write", "output", "save", "to", "plot", "figure", "figures", "csv"}
FORBIDDEN |= {"svg", "simulated", "output_dir", "outdir", "output_file", "results", "json_file", "dest"}
OWN = """
import mine
from configs import switch_nano

def get_config():
    config = switch_nano.get_config()
    config.seed = mine.SEED
    return config
"""


def module(name: str):
    return importlib.import_module(f"experiments.{name}")


def takes(name: str) -> set[str]:
    """The flags that a program's help shows."""
    shown = programs.call(module(name), "--help").out.partition("\nFlags:\n")[2].partition("\nFields of a config")[0]
    return {line.split()[0].removeprefix("--") for line in shown.splitlines() if line.startswith("  --")}


# ---- the list


def test_every_program_is_listed():
    names = {name.removesuffix(".__main__") for name in NAMES} - {"__main__"}
    assert set(listing.programs()) == names
    assert {"train", "bench", "bench.steps", "routing_zoo.cost", "launch"} <= names


@pytest.mark.parametrize(("name", "line"), listing.programs().items())
def test_a_first_line_is_a_sentence(name, line):
    """A first line says what the program does, and fits beside its name."""
    assert line.endswith((".", "?"))
    assert line.split()[0].endswith("s"), "a verb"
    assert line[0].isupper()
    assert len(line) <= 112
    assert f"experiments.{name}" in ast.get_docstring(ast.parse(source(name))), "and its docstring has an example"


def source(name: str) -> str:
    path = ROOT / "experiments" / pathlib.Path(*name.split("."))
    return (path / "__main__.py" if path.is_dir() else path.with_suffix(".py")).read_text()


def listed(*argv: str, cwd: pathlib.Path = ROOT) -> subprocess.CompletedProcess:
    """`python -m experiments`, in a process of its own."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "experiments", *argv]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, check=False)


def test_the_list_and_a_wrong_name():
    shown = listed()
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout == listed("--help").stdout
    for name, line in listing.programs().items():
        assert f"  {name} " in shown.stdout
        assert f" {line}\n" in shown.stdout
    assert f"For example: {listing.EXAMPLE}" in shown.stdout
    for wrong, words in {"trian": "did you mean train?", "zzzz": "there are audit, bench, bench.peers"}.items():
        refused = listed(wrong, "--config=glam_nano")
        assert (refused.returncode, refused.stdout) == (2, "")
        assert refused.stderr.startswith(f"error: There is no program {wrong!r}; {words}")
        assert refused.stderr.count("\n") == 1


def test_a_program_by_its_name_in_another_folder(tmp_path):
    """With a packaged config by its name, and one of the working directory that imports its neighbour."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "mine.py").write_text("SEED = 7\n")
    (tmp_path / "configs" / "own.py").write_text(OWN)
    ran = listed("train", "--config=own", "--print_config", "--config.run.steps=3", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["seed"] == 7
    assert json.loads(ran.stdout)["run"]["steps"] == 3


@pytest.mark.parametrize("name", ["glam_nano", "glam_nano.py", "configs/glam_nano.py", "configs/glam_nano"])
def test_a_config_is_found_by_its_name(name, tmp_path, monkeypatch):
    """A file of the working directory wins."""
    monkeypatch.chdir(tmp_path)
    assert cli.config_file(name) == ROOT / "configs" / "glam_nano.py"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "glam_nano.py").write_text("")
    assert cli.config_file(name).resolve() == tmp_path / "configs" / "glam_nano.py"


def test_published_configs_and_wrong_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mixtral_8x7b", "papers/mixtral_8x7b", "configs/papers/mixtral_8x7b.py"):
        assert cli.config_file(name) == ROOT / "configs" / "papers" / "mixtral_8x7b.py"
    for name, meant in {"glam_nanoo": "glam_nano", "configs/glam_nanoo.py": "configs/glam_nano.py"}.items():
        with pytest.raises(ValueError, match=f"no config file {name}; did you mean {meant}"):
            cli.config_file(name)


# ---- what they take


@pytest.mark.parametrize("name", MODULES)
def test_help(name):
    """The docstring, every flag with its default, and the fields of a config where one is taken."""
    program = module(name)
    shown = programs.call(program, "--help")
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.startswith(program.__doc__)
    text = {part.split()[0]: " ".join(part.split()) for part in shown.out.split("\n  --")[1:]}
    own = [holder for holder in vars(program).values() if isinstance(holder, flags.FlagHolder)]
    assert {holder.name for holder in own} <= takes(name)
    for holder in own:
        if isinstance(holder.default, bool):
            assert (f"(default: true; --no{holder.name} turns it off)" in text[holder.name]) == holder.default
        elif isinstance(holder.default, int | float | str):
            assert f"(default: {holder.default})" in text[holder.name]
    assert ("Fields of a config:" in shown.out) == ("config" in takes(name))
    assert max(map(len, shown.out.splitlines())) <= 125


def test_help_of_the_supervisor(capsys):
    with pytest.raises(SystemExit, match="0"):
        launch.main(["--help"])
    shown = capsys.readouterr().out
    assert "(default: 600)" in shown
    assert launch.main(["--processs=2"]) == 2
    assert capsys.readouterr().err.startswith("error: unrecognized arguments: --processs=2; ")


@pytest.mark.parametrize("name", MODULES)
def test_shared_flags_are_defined_once(name):
    """No program defines one itself, and none has another word for it."""
    assert not takes(name) & FORBIDDEN
    calls = [node for node in ast.walk(ast.parse(source(name))) if isinstance(node, ast.Call)]
    defined = {word.value for call in calls if "DEFINE" in ast.unparse(call) for word in call.args if is_name(word)}
    assert not defined & (SHARED | PROCESSES)


def is_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def test_shared_flags_are_the_shared_ones():
    """Flags that this file calls shared are those that cli.py defines, --traceback apart."""
    calls = [node for node in ast.walk(ast.parse(source("cli"))) if isinstance(node, ast.Call)]
    calls = [call for call in calls if ast.unparse(call.func) in ("flag", "flags.DEFINE_bool")]
    defined = {word.value for call in calls for word in call.args if is_name(word) and word.value.isidentifier()}
    assert defined == SHARED | PROCESSES | {"traceback"}


@pytest.mark.parametrize("name", MODULES)
def test_flags_of_several_processes(name):
    """Shown and taken by programs that join others, and by no other."""
    program, joins = module(name), "cli.connect()" in source(name)
    assert takes(name) & PROCESSES == (PROCESSES if joins else set())
    for flag in PROCESSES:
        refused = flag if not joins else "no_such_flag"
        value = 0 if flag == "process" else 1
        error = programs.call(program, f"--{flag}={value}", "--no_such_flag").error
        assert error.partition(".")[0] == f"Unknown command line flag '{refused}'"


def test_train_joins_others():
    assert takes("train") >= PROCESSES | {"devices"}
    assert "devices" not in takes("plan")


# ---- what they make


def test_json_is_all_there_is_on_stdout():
    """Text for people goes to stderr then; and - is no file of any other flag."""
    plan = module("plan")
    asked = ["--config=glam_pod", "--topology=v5e:4x4", "--analytic"]
    text, record = programs.call(plan, *asked), programs.call(plan, *asked, "--json=-")
    assert text.code == record.code == 0
    assert json.loads(record.out)["on"]["chip"]["name"] == "v5e"
    assert text.out in record.err
    assert not pathlib.Path("-").exists()
    assert "only --json goes to stdout" in programs.call(plan, *asked, "--report=-").error


def test_a_number_that_is_not_finite_is_null(tmp_path):
    cli.write_json(tmp_path / "a.json", {"a": float("nan"), "b": [float("inf"), 1.5]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": None, "b": [None, 1.5]}


# ---- the wheel


def test_the_wheel_has_everything():
    """Every file of the three packages, by the rules of setuptools: packages found by name, data by suffix."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    rules = project["tool"]["setuptools"]
    suffixes = rules["package-data"]["*"]
    every = [path for name in PACKAGES for path in (ROOT / name).rglob("*") if path.is_file()]
    left_out = []
    for path in every:
        folder = path.relative_to(ROOT).parent
        parents = [folder, *folder.parents[:-1]]
        package = ".".join(folder.parts)
        found = any(fnmatch.fnmatchcase(package, pattern) for pattern in rules["packages"]["find"]["include"])
        found &= all((ROOT / parent / "__init__.py").is_file() for parent in parents)
        if not (found and (path.suffix == ".py" or any(fnmatch.fnmatchcase(path.name, s) for s in suffixes))):
            left_out.append(path)
    assert [path for path in left_out if "__pycache__" not in path.parts] == []
    assert len(every) - len(left_out) > 200
    assert {ROOT / "configs" / "glam_nano.py", ROOT / "experiments" / "launch" / "README.md"} <= set(every)
    target, _, function = project["project"]["scripts"]["moe-jax"].partition(":")
    assert getattr(importlib.import_module(target), function) is listing.main
