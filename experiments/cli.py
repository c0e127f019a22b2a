"""What the programs share: the experiment that a command line means, and one line for a user's mistake."""

import dataclasses
import pathlib
import re
import runpy
import sys
from collections.abc import Callable, Mapping
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from moe_jax.config import SECTIONS, Experiment, build, override
from moe_jax.train import TrainingDiverged

FLAGS = flags.FLAGS
flags.DEFINE_bool("traceback", False, "Show the whole traceback of an error.")

PREFIX = "config."
OVERRIDE = re.compile(r"--?(config\.[^=]*)")
HELP = {"--help", "-help", "-h", "--helpfull", "--helpshort"}
OWN = tuple(str(pathlib.Path(__file__).parents[1] / package) for package in ("moe_jax", "experiments"))


def run(main: Callable[[], None]) -> None:
    """Parses the command line, runs `main`, and exits."""
    try:
        if HELP.intersection(sys.argv):
            print(help_text(main))
            return
        parse(sys.argv)
        main()
    except KeyboardInterrupt:
        print("\nInterrupted; without --overwrite, the same command goes on from here.", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, TrainingDiverged) as error:
        if "--traceback" in sys.argv:
            raise
        print(f"error: {one_line(error)}{where(error)}", file=sys.stderr)
        sys.exit(2)


def parse(argv: list[str]) -> None:
    """absl's own parsing, after making a flag of every --config.a.b there is; ValueError in its words."""
    try:
        for name in {match[1] for arg in argv if (match := OVERRIDE.match(arg))}:
            if name not in FLAGS:
                flags.DEFINE_string(name, None, "A field of the experiment.")
        rest = FLAGS(argv)
    except flags.Error as error:
        raise ValueError(one_line(error)) from None
    if len(rest) > 1:
        raise ValueError(f"{rest[1]!r} is not a flag; write --name=value.")


# ---------------------------------------------------------------- what the flags mean


def define_config() -> None:
    """--config=FILE; `experiment` reads it, and --config.a.b=VALUE for every field."""
    flags.DEFINE_string("config", None, "A file with get_config(); --config.a.b=VALUE sets a field.")


def experiment() -> Experiment:
    """The experiment of --config, with every --config.a.b=VALUE set in it, in any order."""
    if not FLAGS["config"].value:
        raise ValueError("No experiment was given; say --config=configs/glam_nano.py, for instance.")
    config = load(FLAGS["config"].value)
    for name in sorted(name for name in FLAGS if name.startswith(PREFIX)):
        if FLAGS[name].present:
            override(config, name.removeprefix(PREFIX), str(FLAGS[name].value))
    return build(config)


def load(file: str) -> dict[str, Any]:
    """The values of a config file, FILE or FILE:ARGUMENT (of its get_config)."""
    name, _, argument = file.partition(":")
    path = pathlib.Path(name)
    if not path.is_file():
        found = sorted(str(p) for p in pathlib.Path("configs").rglob("*.py") if p.name != "__init__.py")
        raise ValueError(f"There is no config file {name}; there are {', '.join(found) or 'none here'}.")
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
    lines += sorted(
        {
            f"  --{flag.name:<14}{' '.join(flag.help.split())}"
            for flag in own
            if not flag.name.startswith(PREFIX)
        }
    )
    lines += ["", "Fields of a config:"]
    for path, section in SECTIONS.items():
        start = "--" + PREFIX + (path + "." if path else "")
        names = [f.name for f in dataclasses.fields(section) if f.name != "V"]
        lines.append(f"  {start}{{{','.join(n for n in names if f'{path}.{n}'.strip('.') not in SECTIONS)}}}")
    return "\n".join(lines)
