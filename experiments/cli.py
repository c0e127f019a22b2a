"""Command line of all programs: flags, the experiment they mean, and one line for a user's mistake."""

import ast
import dataclasses
import difflib
import pathlib
import re
import runpy
import shlex
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from experiments.launch import join, pulse
from moe_jax.config import SECTIONS, Experiment, build, editable, suggestion
from moe_jax.train import TrainingDiverged

FLAGS = flags.FLAGS
flags.DEFINE_bool("traceback", False, "Show the whole traceback of an error.")
flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where several processes meet.")
flags.DEFINE_integer("processes", None, "How many processes there are.", lower_bound=1)
flags.DEFINE_integer("process", None, "Which of them this is, from 0.", lower_bound=0)
flags.DEFINE_integer("peer_timeout", 100, "Seconds without a sign of a process that end the others.", lower_bound=1)
flags.DEFINE_integer("devices", None, "Simulated devices of each process (default: as the mesh takes).", lower_bound=1)
flags.DEFINE_string("heartbeat", None, "A file to touch every second, for a supervisor.")

PREFIX = "config."
OVERRIDE = re.compile(r"--?config\.")
HELP = {"--help", "-help", "-h", "--helpfull", "--helpshort"}
OWN = tuple(str(pathlib.Path(__file__).parents[1] / package) for package in ("moe_jax", "experiments"))


def run(main: Callable[[], None]) -> None:
    """Parses the command line, runs `main`, and exits."""
    parsed = False
    try:
        if HELP.intersection(sys.argv):
            print(help_text(main))
            return
        parse(sys.argv)
        parsed = True
        if FLAGS["heartbeat"].value:
            pulse.beat(pathlib.Path(FLAGS["heartbeat"].value))
        main()
    except KeyboardInterrupt:
        print("\nInterrupted; without --overwrite, the same command goes on from here.", file=sys.stderr)
        if join.connected():
            join.abandon(130)
        sys.exit(130)
    except (ValueError, OSError, TrainingDiverged, flags.Error) as error:
        if "--traceback" in sys.argv and not join.connected():
            raise
        if "--traceback" in sys.argv:
            traceback.print_exc()
        line = f"error: {one_line(error)}{where(error)}"
        if join.connected():
            join.leave(line)
        if parsed or not (FLAGS["process"].value or join.tpu_place().process):  # the others have the same flags
            print(line, file=sys.stderr)
        sys.exit(2)
    except Exception:
        if join.connected():
            traceback.print_exc()
            join.abandon(1)
        raise


def parse(argv: list[str]) -> None:
    """absl's own parsing of all but --config.a.b=VALUE, which wait for `experiment`; ValueError in its words."""
    rest = FLAGS(split(argv)[0])
    if len(rest) > 1:
        raise ValueError(f"{rest[1]!r} is not a flag; write --name=value.")


def split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Splits arguments into those for absl and the overrides of the config, each as one --config.a.b=VALUE."""
    program, overrides, words = [], [], iter(argv)
    for word in words:
        if not OVERRIDE.match(word):
            program.append(word)
        elif "=" in word:
            overrides.append(word)
        elif (value := next(words, None)) is not None:
            overrides.append(f"{word}={value}")
        else:
            raise ValueError(f"Missing value for flag {word}; write {word}=VALUE.")
    return program, overrides


# ---------------------------------------------------------------- what the flags mean


def place() -> join.Place:
    """Number of this process, and of all: by its flags, or else by the Cloud TPU slice it is on."""
    given: dict[str, Any] = {name: FLAGS[name].value for name in ("coordinator", "processes", "process")}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return join.tpu_place()
    if missing:
        raise ValueError(
            f"Several processes need --coordinator=HOST:PORT, --processes=N and --process=I; {' and '.join(missing)} "
            "must be given too, or none of them."
        )
    if given["process"] >= given["processes"]:
        raise ValueError(f"--process={given['process']} of --processes={given['processes']}; number them from 0.")
    return join.Place(given["process"], given["processes"])


def connect() -> None:
    """Joins the other processes, before anything touches a device; does nothing where this one is alone."""
    here = place()
    if FLAGS["coordinator"].value or here.processes > 1:
        join.connect(FLAGS["coordinator"].value, here, FLAGS["peer_timeout"].value)


def flag(define: Callable, name: str, default: Any, text: str) -> flags.FlagHolder:
    """A flag, as absl's `define` makes it; of programs that are imported together, one is everybody's."""
    if name in flags.FLAGS:
        return flags.FlagHolder(flags.FLAGS, flags.FLAGS[name])
    return define(name, default, text)


def workdir() -> flags.FlagHolder:
    """--workdir=FOLDER, of a run."""
    return flag(flags.DEFINE_string, "workdir", None, "Where the run is kept; a new folder, or this run's own.")


def data_dir() -> flags.FlagHolder:
    """--data_dir=FOLDER, of prepared data."""
    return flag(flags.DEFINE_string, "data_dir", None, "Where prepared data is kept (default: ~/.cache/moe_jax).")


def compare() -> flags.FlagHolder:
    """--compare=FOLDER, once for each other run."""
    return flag(flags.DEFINE_multi_string, "compare", [], "Other runs to compare with in the report: their workdirs.")


def define_config() -> None:
    """--config=FILE; `experiment` reads it, and --config.a.b=VALUE for every field. Programs may share a process."""
    if "config" not in FLAGS:
        flags.DEFINE_string("config", None, "A file with get_config(); --config.a.b=VALUE sets a field.")


def experiment() -> Experiment:
    """The experiment of --config, with every --config.a.b=VALUE set in it, in any order."""
    if not FLAGS["config"].value:
        raise ValueError("No experiment was given; say --config=configs/glam_nano.py, for instance.")
    config, overrides = load(FLAGS["config"].value), split(sys.argv)[1]
    return build(overridden(config, overrides) if overrides else config)


def overridden(config: Mapping[str, Any], overrides: list[str]) -> dict[str, Any]:
    """A config's values after --config.a.b=VALUE flags, by ml_collections' `config_flags`."""
    whole = editable(config)
    for word in overrides:
        check_field(whole, word.lstrip("-").removeprefix(PREFIX).partition("=")[0])
    values, argv = flags.FlagValues(), ["", *overrides]
    config_flags.DEFINE_config_dict("config", whole, flag_values=values, sys_argv=argv)
    values(argv)
    return values["config"].value.to_dict()


def check_field(config: ConfigDict, path: str) -> None:
    """ValueError where a config has no such field, with the one that was probably meant."""
    node, names = config, path.split(".")
    for i, name in enumerate(names):
        at = ".".join(["config", *names[:i]])
        if not isinstance(node, ConfigDict):
            raise ValueError(f"{at}={node!r} has no fields; set it as a whole.")
        if name not in node:
            raise ValueError(f"{at} has no field {name!r}{suggestion(name, list(node))}")
        node = node[name]
    if isinstance(node, ConfigDict):
        raise ValueError(f"config.{path} has the fields {', '.join(node)}; set them one by one.")


def load(file: str) -> dict[str, Any]:
    """The values of a config file, FILE or FILE:ARGUMENT (of its get_config)."""
    name, _, argument = file.partition(":")
    path = pathlib.Path(name)
    if not path.is_file():
        found = [str(p) for p in sorted(pathlib.Path("configs").rglob("*.py")) if not p.name.startswith("_")]
        own = [p for p in found if pathlib.Path(p).parent.name == "configs"] or found
        if close := difflib.get_close_matches(name, found, 1, 0.8):
            raise ValueError(f"There is no config file {name}; did you mean {close[0]}?")
        more = f", and {len(found) - len(own)} published models in configs/papers" if len(found) > len(own) else ""
        raise ValueError(f"There is no config file {name}; there are {', '.join(own) or 'none here'}{more}.")
    try:
        config = runpy.run_path(str(path))["get_config"](*([argument] if argument else []))
    except KeyError as error:
        missing = error.args == ("get_config",)
        reason = "it defines no get_config()" if missing else f"KeyError: {error}"
        raise ValueError(f"{name} is not a config file: {reason}.") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ValueError(f"{name} is not a config file: {reason} (--traceback shows where).") from error
    if isinstance(config, ConfigDict):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        raise ValueError(f"{name} is not a config file: get_config() gave {config!r}, not a ConfigDict.")
    return dict(config)


def told() -> dict[str, str]:
    """The question of the config file and the command that runs, for the log; without what is not known."""
    file = FLAGS["config"].value if "config" in FLAGS else None
    name = getattr(getattr(sys.modules["__main__"], "__spec__", None), "name", "")
    known = {
        "question": question(pathlib.Path(file.partition(":")[0])) if file else "",
        "command": shlex.join(["python", "-m", name, *sys.argv[1:]]) if name.startswith("experiments.") else "",
    }
    return {key: words for key, words in known.items() if words}


def question(file: pathlib.Path) -> str:
    """The first line of a config file's docstring; "" where it has none, or cannot be read."""
    try:
        return (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").partition("\n")[0].strip()
    except (OSError, SyntaxError, ValueError):
        return ""


def supervised() -> bool:
    """Tells whether a supervisor watches this process."""
    return FLAGS["heartbeat"].value is not None


def simulate(exp: Experiment) -> None:
    """Simulates this process's devices of the experiment's mesh, where the platform is the CPU."""
    devices, processes = FLAGS["devices"].value, FLAGS["processes"].value or 1
    if devices is None and exp.devices:
        if exp.devices % processes:
            raise ValueError(
                f"The mesh takes {exp.devices} devices, which --processes={processes} cannot share evenly; "
                "change config.mesh, or the number of processes."
            )
        devices = exp.devices // processes
    if devices and devices != jax.config.jax_num_cpu_devices:  # type: ignore[attr-defined]
        jax.config.update("jax_num_cpu_devices", devices)


def folder(flag: str, value: str) -> pathlib.Path:
    """A folder that a flag names, there or not."""
    if "://" in value:
        raise ValueError(f"--{flag}={value} is a URL; mount the bucket and give the path of its folder.")
    if pathlib.Path(value).exists() and not pathlib.Path(value).is_dir():
        raise ValueError(f"--{flag}={value} is a file; give a folder.")
    return pathlib.Path(value)


# ---------------------------------------------------------------- what is said


def one_line(error: BaseException) -> str:
    """An exception's message without its line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def where(error: BaseException) -> str:
    """Nothing for an error that this code has raised; a hint for one from a library below it."""
    if isinstance(error, flags.Error):
        return ""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    file = trace.tb_frame.f_code.co_filename if trace is not None else ""
    own = file.startswith(OWN) and not getattr(error, "__notes__", None)  # JAX leaves notes on what it raises
    return "" if own else f" ({type(error).__name__}; --traceback shows where)"


def help_text(main: Callable[[], None]) -> str:
    """A program's docstring, its flags, and the fields of a config."""
    program = sys.modules[main.__module__]
    own = [*FLAGS.get_key_flags_for_module(program), *FLAGS.get_key_flags_for_module(sys.modules[__name__])]
    lines = [(program.__doc__ or "").strip(), "", "Flags:"]
    lines += sorted({f"  --{flag.name:<14}{' '.join(flag.help.split())}" for flag in own})
    lines += ["", "Fields of a config:"]
    for path, section in SECTIONS.items():
        start = "--" + PREFIX + (path + "." if path else "")
        names = [f.name for f in dataclasses.fields(section) if f.name != "V"]
        lines.append(f"  {start}{{{','.join(n for n in names if f'{path}.{n}'.strip('.') not in SECTIONS)}}}")
    return "\n".join(lines)
