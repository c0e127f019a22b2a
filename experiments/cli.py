"""Command line of all programs: flags, the experiment they mean, and one line for a user's mistake."""

import ast
import contextlib
import contextvars
import difflib
import inspect
import json
import pathlib
import re
import runpy
import shlex
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TextIO

import jax
from absl import flags
from ml_collections import ConfigDict

from experiments.launch import join, pulse
from experiments.launch.interruption import Interrupted
from experiments.launch.supervisor import MISTAKE
from moe_jax.config import SECTIONS, Experiment, build, typed
from moe_jax.core.quoted import brief, quoted
from moe_jax.costs.fit import check_size
from moe_jax.files import is_disk_full, write_file
from moe_jax.overrides import known_fields, override
from moe_jax.reporting.metrics import to_json
from moe_jax.train import TrainingDiverged
from moe_jax.transfer import RunCheckpoint
from moe_jax.words import meant

FLAGS = flags.FLAGS
flags.DEFINE_bool("traceback", False, "Show the whole traceback of an error.")
flags.disclaim_key_flags()  # a flag that is defined by a function here is the calling program's

PROCESSES = ("coordinator", "processes", "process", "peer_timeout", "heartbeat")
PREFIX = "config."
OVERRIDE = re.compile(r"--?config\.")
MOST_DEVICES = 4096  # simulated by a process
HELP = {"--help", "-help", "-h", "--helpfull", "--helpshort"}
EXAMPLES = (
    "model.moe.router.K=4",
    "model.moe.losses.LoadBalance.weight=0.05",
    "model.attention.position.base=500000",
    "optim.schedule.peak=0.001",
    'model.moe.experts="GLU(F=256)"',
)
TRY_AGAIN = 75  # exit code of a disk without room, EX_TEMPFAIL of sysexits.h: the same command may succeed later
ROOT = pathlib.Path(__file__).parents[1]  # where the packages are: the repository, or site-packages
OWN = tuple(str(ROOT / package) for package in ("moe_jax", "experiments"))
TOO_MUCH = (RecursionError, MemoryError, OverflowError)  # what Python says to inputs that are too deep or too large
STDOUT: contextvars.ContextVar[TextIO] = contextvars.ContextVar("STDOUT")  # for JSON, where text goes to stderr


def run(main: Callable[..., None]) -> None:
    """Parses the command line, runs `main`, and exits; a main with parameters takes the words that are no flags."""
    parsed = False
    try:
        if HELP.intersection(sys.argv):
            print(help_text(main))
            return
        words = parse(sys.argv, main)
        if words and not inspect.signature(main).parameters:
            raise ValueError(f"{words[0]!r} is not a flag; write --name=value.")
        parsed = True
        if beat := given("heartbeat"):
            pulse.beat(pathlib.Path(beat))
        with stdout_for_json():
            main(*words)
    except KeyboardInterrupt as interrupt:
        print(f"\n{str(interrupt) or 'Interrupted.'}", file=sys.stderr)
        code = interrupt.code if isinstance(interrupt, Interrupted) else 130
        if join.connected() and not (isinstance(interrupt, Interrupted) and interrupt.together):
            join.abandon(code)
        sys.exit(code)
    except (*TOO_MUCH, ValueError, OSError, TrainingDiverged, flags.Error) as error:
        if "--traceback" in sys.argv and not join.connected():
            raise
        if "--traceback" in sys.argv:
            traceback.print_exc()
        line = f"error: {one_line(error)}{where(error)}"
        code = TRY_AGAIN if is_disk_full(error) else MISTAKE
        if join.connected():
            join.leave(line, code)
        if parsed or not (given("process") or join.tpu_place().process):  # the others have the same flags
            print(line, file=sys.stderr)
        sys.exit(code)
    except Exception:
        if join.connected():
            traceback.print_exc()
            join.abandon(1)
        raise


def own_flags(main: Callable[..., None]) -> list[flags.Flag]:
    """The flags that a program has defined or asked for here, in this order, and --traceback."""
    own = FLAGS.get_key_flags_for_module(sys.modules[main.__module__])
    return [*own, FLAGS["traceback"]]


def parse(argv: list[str], main: Callable[..., None]) -> list[str]:
    """Parses a program's own flags as absl does, but for --config.a.b=VALUE, which wait; returns the other words."""
    own = flags.FlagValues()
    for known in own_flags(main):
        own[known.name] = known
    own.set_gnu_getopt()  # flags may follow words
    try:
        words = own(split(argv)[0])[1:]
    except flags.UnrecognizedFlagError as error:
        target = meant(error.flagname) if "config" in own else ""
        if not target:
            raise
        value = str(error.flagvalue).partition("=")[2] or "VALUE"
        raise ValueError(f"There is no flag --{error.flagname}; {typed(target, value)}.") from None
    FLAGS.mark_as_parsed()
    return words


def given(name: str) -> Any:
    """The value of a flag; None where the program has no such flag."""
    return FLAGS[name].value if name in FLAGS else None


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
    address: dict[str, Any] = {name: given(name) for name in ("coordinator", "processes", "process")}
    missing = [f"--{name}" for name, value in address.items() if value is None]
    if len(missing) == len(address):
        return join.tpu_place()
    if missing:
        raise ValueError(
            f"Several processes need --coordinator=HOST:PORT, --processes=N and --process=I; {' and '.join(missing)} "
            "must be given too, or none of them."
        )
    if address["process"] >= address["processes"]:
        raise ValueError(f"--process={address['process']} of --processes={address['processes']}; number them from 0.")
    return join.Place(address["process"], address["processes"])


def connect() -> None:
    """Joins the other processes, before anything touches a device; does nothing where this one is alone."""
    here = place()
    if given("coordinator") or here.processes > 1:
        join.connect(given("coordinator"), here, given("peer_timeout"))


def supervised() -> bool:
    """Tells whether a supervisor watches this process."""
    return given("heartbeat") is not None


def simulate(exp: Experiment) -> None:
    """Simulates this process's devices of the experiment's mesh, where the platform is the CPU."""
    devices, processes = given("devices"), given("processes") or 1
    if devices is None and exp.devices:
        if exp.devices % processes:
            raise ValueError(
                f"The mesh takes {exp.devices} devices, which --processes={processes} cannot share evenly; "
                "change config.mesh, or the number of processes."
            )
        devices = exp.devices // processes
    if devices and devices > MOST_DEVICES:
        raise ValueError(f"{devices:,} simulated devices are too many for one process; take {MOST_DEVICES:,} at most.")
    if devices and devices != jax.config.jax_num_cpu_devices:  # type: ignore[attr-defined]
        jax.config.update("jax_num_cpu_devices", devices)


def folder(flag: str, value: str) -> pathlib.Path:
    """A folder that a flag names, there or not."""
    if "://" in value:
        raise ValueError(f"--{flag}={value} is a URL; mount the bucket and give the path of its folder.")
    if pathlib.Path(value).exists() and not pathlib.Path(value).is_dir():
        raise ValueError(f"--{flag}={value} is a file; give a folder.")
    return pathlib.Path(value)


def check_writable(folder: pathlib.Path, otherwise: str) -> None:
    """Makes a folder; ValueError where no file can be made in it, before anything is computed for one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"Nothing can be written to {folder} ({error.strerror}); {otherwise}.") from error


def checkpoint(flag: str, value: str) -> RunCheckpoint:
    """RUN or RUN@STEP that a flag names: a run's folder, and a step of its checkpoints (None: the newest)."""
    path, at, step = value.rpartition("@")
    if not at or pathlib.Path(value).is_dir():
        return RunCheckpoint(folder(flag, value))
    if not step.isdecimal():
        raise ValueError(f"--{flag}={value}: {step!r} is no step; write --{flag}={path}@600, say.")
    return RunCheckpoint(folder(flag, path), int(step))


def file(flag: str, value: str | None, kinds: tuple[str, ...] = ()) -> pathlib.Path | None:
    """A file to write, which a flag names, with one of these suffixes; None for none, ValueError where it cannot be."""
    if not value:
        return None
    path = pathlib.Path(value)
    if value == "-" and flag == "json":
        return path
    if value == "-":
        raise ValueError(f"--{flag}=- is no file; only --json goes to stdout.")
    if not path.parent.is_dir():
        raise ValueError(f"--{flag}={path}: there is no folder {path.parent}; make it, or give another file.")
    if path.is_dir():
        raise ValueError(f"--{flag}={path} is a folder; give a file.")
    if kinds and path.suffix not in kinds:
        raise ValueError(f"--{flag}={path} is of no kind that can be drawn; end it in {' or '.join(kinds)}.")
    return path


# ---------------------------------------------------------------- flags that several programs have


def flag(define: Callable, name: str, default: Any, text: str) -> flags.FlagHolder:
    """A flag of the calling program, as absl's `define` makes it; programs in one process share it."""
    if name not in FLAGS:
        return define(name, default, text)
    flags.declare_key_flag(name)
    return flags.FlagHolder(FLAGS, FLAGS[name])


def define_config() -> None:
    """Defines --config=FILE; `experiment` reads it, and --config.a.b=VALUE for every field."""
    flag(flags.DEFINE_string, "config", None, "A file with get_config(), or the name of one in configs/.")


def define_processes() -> None:
    """Defines the flags of a program that several processes run together, which calls `connect`; and --devices."""
    count, index = (partial(flags.DEFINE_integer, lower_bound=least) for least in (1, 0))
    flag(flags.DEFINE_string, "coordinator", None, "HOST:PORT of process 0, where several processes meet.")
    flag(count, "processes", None, "How many processes there are.")
    flag(index, "process", None, "Which of them this is, from 0.")
    flag(count, "peer_timeout", 100, "Seconds without a sign of a process that end the others.")
    flag(flags.DEFINE_string, "heartbeat", None, "A file to touch every second, for a supervisor.")
    devices()


def devices() -> flags.FlagHolder:
    """Defines --devices=N, to be simulated."""
    text = "Simulated devices of a process, where the platform is the CPU (default: as the mesh takes)."
    return flag(partial(flags.DEFINE_integer, lower_bound=1), "devices", None, text)


def workdir() -> flags.FlagHolder:
    """Defines --workdir=FOLDER, of a run."""
    return flag(flags.DEFINE_string, "workdir", None, "Where the run is kept; a new folder, or this run's own.")


def data_dir() -> flags.FlagHolder:
    """Defines --data_dir=FOLDER, of prepared data."""
    return flag(flags.DEFINE_string, "data_dir", None, "Where prepared data is kept (default: ~/.cache/moe_jax).")


def compare() -> flags.FlagHolder:
    """Defines --compare=FOLDER, once for each other run."""
    return flag(flags.DEFINE_multi_string, "compare", [], "Other runs to compare with in the report: their workdirs.")


def step() -> flags.FlagHolder:
    """Defines --step=N, of a checkpoint."""
    return flag(flags.DEFINE_integer, "step", None, "The step of the checkpoint (default: the newest).")


def windows() -> flags.FlagHolder:
    """Defines --windows=N, of held-out data."""
    return flag(flags.DEFINE_integer, "windows", 256, "How many sequences of held-out data.")


# ---- what a program makes: a page for people, a record for programs, and the product itself


def report() -> flags.FlagHolder:
    """Defines --report=FILE, for an HTML page; `file` checks it."""
    return flag(flags.DEFINE_string, "report", None, "A file for the result as an HTML page.")


def as_json() -> flags.FlagHolder:
    """Defines --json=FILE, for the result as JSON, which `write_json` writes."""
    text = "A file for the result as JSON; - is stdout, and text goes to stderr."
    return flag(flags.DEFINE_string, "json", None, text)


def out(text: str) -> flags.FlagHolder:
    """Defines --out=PATH, for the product of a program; the text says what it is."""
    return flag(flags.DEFINE_string, "out", None, text)


def write_json(path: pathlib.Path | None, found: Any) -> None:
    """Writes a result to the file of --json, numbers that are not finite as null; nothing where there is no file."""
    if path is None:
        return
    text = json.dumps(to_json(found), indent=1) + "\n"
    if str(path) == "-":
        STDOUT.get(sys.stdout).write(text)
    else:
        write_file(path, text)
        print(f"written: {path}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def stdout_for_json() -> Iterator[None]:
    """With --json=-, what is printed goes to stderr, and nothing but JSON to stdout."""
    if given("json") != "-":
        yield
        return
    token = STDOUT.set(sys.stdout)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        STDOUT.reset(token)


# ---------------------------------------------------------------- configs


def experiment(default: str | None = None, *more: str, any_size: bool = False) -> Experiment:
    """The experiment of --config, with every --config.a.b=VALUE set in it, in any order; built once, after all of them.

    default: the file without --config. more: overrides of the program's own, which win over those of the command line.
    any_size: whether it may be larger than all that could hold it; the program then looks at its size itself.
    """
    if not (file := FLAGS["config"].value or default):
        raise ValueError("No experiment was given; say --config=configs/glam_nano.py, for instance.")
    exp = build(overridden(load(file), [*split(sys.argv)[1], *more]))
    if not any_size:
        check_size(exp)
    return exp


def overridden(config: Mapping[str, Any], overrides: list[str]) -> dict[str, Any]:
    """A config's values after --config.a.b=VALUE flags."""
    pairs = [word.lstrip("-").removeprefix(PREFIX).partition("=") for word in overrides]
    return override(config, [(path, text) for path, _, text in pairs])


def config_file(name: str) -> pathlib.Path:
    """A config's file, by path or by name; one in the working directory before one of this package. Else ValueError."""
    if pathlib.Path(name).is_file():
        return pathlib.Path(name)
    places = [root / part for root in (pathlib.Path(), ROOT) for part in ("", "configs", "configs/papers")]
    candidates = (place / file for place in places for file in (name, f"{name}.py"))
    if found := next((path for path in candidates if name and path.is_file()), None):
        return found
    raise ValueError(f"There is no config file {name}; {known_configs(name)}")


def known_configs(name: str) -> str:
    """The config that was probably meant, or all there are."""
    files = {p.relative_to(root) for root in (pathlib.Path(), ROOT) for p in (root / "configs").rglob("*.py")}
    known = sorted(path for path in files if not path.name.startswith("_"))
    for names in (list(map(str, known)), [path.stem for path in known]):
        if close := difflib.get_close_matches(name, names, 1, 0.8):
            return f"did you mean {close[0]}?"
    own = [str(path) for path in known if path.parent.name == "configs"]
    return f"there are {', '.join(own)}, and {len(known) - len(own)} published models in configs/papers."


def load(file: str) -> dict[str, Any]:
    """The values of a config, FILE or FILE:ARGUMENT (of its get_config); a name of one in configs/ is a FILE too."""
    name, _, argument = file.partition(":")
    path = config_file(name)
    try:
        config = runpy.run_path(str(path))["get_config"](*([argument] if argument else []))
        config = config.to_dict() if isinstance(config, ConfigDict) else config
    except KeyError as error:
        missing = error.args == ("get_config",)
        reason = "it defines no get_config()" if missing else f"KeyError: {error}"
        raise ValueError(f"{name} is not a config file: {reason}.") from error
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ValueError(f"{name} is not a config file: {reason} (--traceback shows where).") from error
    if not isinstance(config, Mapping) or not all(isinstance(section, str) for section in config):
        raise ValueError(f"{name} is not a config file: get_config() gave {quoted(config)}, not a ConfigDict.")
    return dict(config)


def told() -> dict[str, str]:
    """The question of the config file and the command that runs, for the log; without what is not known."""
    file = FLAGS["config"].value if "config" in FLAGS else None
    name = getattr(getattr(sys.modules["__main__"], "__spec__", None), "name", "")
    known = {
        "question": question(config_file(file.partition(":")[0])) if file else "",
        "command": shlex.join(["python", "-m", name, *sys.argv[1:]]) if name.startswith("experiments.") else "",
    }
    return {key: words for key, words in known.items() if words}


def question(file: pathlib.Path) -> str:
    """The first line of a config file's docstring; "" where it has none, or cannot be read."""
    try:
        return (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").partition("\n")[0].strip()
    except (OSError, SyntaxError, ValueError):
        return ""


# ---------------------------------------------------------------- what is said


def one_line(error: BaseException) -> str:
    """An exception's message without its line breaks, and with at most a hundred characters of anything given."""
    words = [part for word in sys.argv[1:] for part in (word, word.partition("=")[2])]
    return brief(str(error), words) or type(error).__name__


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


def help_text(main: Callable[..., None]) -> str:
    """A program's docstring, its flags with their defaults, and the fields of a config if it takes one."""
    own = own_flags(main)
    lines = [(sys.modules[main.__module__].__doc__ or "").strip(), "", "Flags:"]
    lines += [line for flag in own if flag.name not in PROCESSES for line in described(flag)]
    if shared := [flag for flag in own if flag.name in PROCESSES]:
        lines += ["", "Flags of several processes:", *(line for flag in shared for line in described(flag))]
    if any(flag.name == "config" for flag in own):
        lines += ["", "Fields of a config:", *fields()]
    return "\n".join(lines)


def described(flag: flags.Flag) -> list[str]:
    """A flag's name, meaning and default, in lines that a terminal holds."""
    default = f" (default: {flag.default})" if flag.default not in (None, [], False) else ""
    if flag.default is True:
        default = f" (default: true; --no{flag.name} turns it off)"
    meaning = flag.help.replace("repeat this option to specify a list of values", "may be given again").rstrip(".")
    text = textwrap.wrap(f"{' '.join(meaning.replace('.;', ';').split())}{default}.", 92)
    return [f"  {'--' + flag.name:<16} {text[0]}", *(f"{'':19}{line}" for line in text[1:])]


def fields() -> list[str]:
    """A line for each section of a config, with the names of its fields."""
    lines = []
    for path in (*SECTIONS, "mesh"):
        start = "--" + PREFIX + (path + "." if path else "")
        names = [name for name in known_fields(start.strip("-.")) if name not in ("V", "mesh")]
        lines.append(f"  {start}{{{','.join(n for n in names if f'{path}.{n}'.strip('.') not in SECTIONS)}}}")
    lines += ["", "A path goes on into a component, or an entry of a tuple; docs/config.md lists all:"]
    return [*lines, *(f"  --{PREFIX}{example}" for example in EXAMPLES)]
