"""Trains with several processes on this machine, and goes on by itself when one of them dies or hangs.

    python -m experiments.launch --processes=2 -- --config=configs/glam_nano.py --workdir=runs/glam_nano
    python -m experiments.launch --processes=4 --devices=2 --shrink -- --config=... --workdir=... --config.mesh.data=-1

After -- stand the flags of experiments.train. What each process prints is in WORKDIR/processes, with events.jsonl.
"""

import argparse
import json
import pathlib
import shutil
import signal
import subprocess
import sys
from typing import NoReturn

from experiments.launch.pulse import EVERY
from experiments.launch.supervisor import MISTAKE, OVERWRITE, Plan, supervise

PROGRAM = "experiments.train"
OWN = ("coordinator", "processes", "process", "devices", "heartbeat")  # flags of a process that are given here


def main(argv: list[str]) -> int:
    """The exit code: 0 when the run has finished, 1 after too many restarts, 2 for a mistake, 130 for Ctrl-C."""
    try:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background would ignore it
        split = argv.index("--") if "--" in argv else len(argv)
        plan = planned(arguments(argv[:split]), argv[split + 1 :])
        return supervise(plan)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return MISTAKE


def arguments(argv: list[str]) -> argparse.Namespace:
    """The supervisor's own flags."""
    parser = argparse.ArgumentParser("experiments.launch", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.usage = "python -m experiments.launch --processes=N [...] -- --config=FILE --workdir=FOLDER [...]"
    parser.add_argument("--processes", type=positive, default=2, help="how many (default: 2)")
    parser.add_argument("--devices", type=positive, help="simulated CPU devices of each; else as the mesh takes")
    parser.add_argument("--restarts", type=int, default=3, help="how often at most (default: 3)")
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds without a sign of life (default: 10)")
    parser.add_argument("--patience", type=float, default=600.0, help="seconds without a new record (default: 600)")
    parser.add_argument("--shrink", action="store_true", help="restart on half as many processes")
    parser.add_argument("--program", default=PROGRAM, help=f"the module, or the .py file, to run (default: {PROGRAM})")
    parser.error = refuse
    return parser.parse_args(argv)


def refuse(mistake: str) -> NoReturn:
    """ValueError with argparse's words."""
    raise ValueError(f"{mistake}; flags of the program stand after --, as in: -- --config=FILE --workdir=FOLDER.")


def positive(text: str) -> int:
    """A whole number from 1."""
    if (n := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return n


def planned(given: argparse.Namespace, words: list[str]) -> Plan:
    """Plan of the launch; ValueError where it cannot be done, before anything is written."""
    workdir = flag(words, "workdir")
    if not workdir:
        raise ValueError("No place for the run was given; say -- --config=FILE --workdir=runs/my_run, for instance.")
    if "://" in workdir:
        raise ValueError(f"--workdir={workdir} is a URL; mount the bucket and give the path of its folder.")
    for name in OWN:
        if flag(words, name) is not None:
            raise ValueError(f"--{name} is given to each process by the supervisor; leave it out after --.")
    if given.timeout < 2 * EVERY:
        raise ValueError(f"--timeout={given.timeout:g} is too short: a process shows itself every {EVERY:g} s.")
    place = pathlib.Path(workdir)
    whose(place)
    program = [given.program] if given.program.endswith(".py") else ["-m", given.program]
    command = (sys.executable, *program, *words)
    if given.shrink:
        can_shrink(command)
    check_free(place)
    if set(words) & set(OVERWRITE) and (place / "config.json").is_file():
        shutil.rmtree(place / "processes", ignore_errors=True)
    names = ("processes", "devices", "restarts", "timeout", "patience", "shrink")
    return Plan(command, place, **{name: getattr(given, name) for name in names})


def flag(words: list[str], name: str) -> str | None:
    """The value of --name=VALUE or --name VALUE, the last one's."""
    found = None
    for i, word in enumerate(words):
        key, equals, value = word.partition("=")
        if key in (f"--{name}", f"-{name}"):
            found = value if equals else "".join(words[i + 1 : i + 2])
    return found


def whose(workdir: pathlib.Path) -> None:
    """ValueError where a folder holds somebody else's files."""
    if workdir.is_file():
        raise ValueError(f"--workdir={workdir} is a file; give a folder.")
    if workdir.is_dir() and not (workdir / "config.json").is_file():
        if others := sorted({path.name for path in workdir.iterdir()} - {"processes"}):
            raise ValueError(
                f"{workdir} holds files that are not a run's ({', '.join(others[:3])}); "
                "choose an empty or a new --workdir."
            )


def check_free(workdir: pathlib.Path) -> None:
    """ValueError where a process of this machine trains there, whose supervisor writes there too."""
    if (workdir / "workdir.lock").is_file():
        from moe_jax.lock import check_free  # here, since that imports jax

        check_free(workdir)


def can_shrink(command: tuple[str, ...]) -> None:
    """ValueError where the mesh of the config takes a fixed number of devices."""
    asked = subprocess.run([*command, "--print_config"], capture_output=True, text=True, check=False)
    if asked.returncode:
        lines = asked.stderr.strip().splitlines() or ["the config cannot be read"]
        raise ValueError(lines[-1].removeprefix("error: "))
    mesh = json.loads(asked.stdout)["mesh"]
    if -1 not in mesh.values():
        given = ", ".join(f"{axis}={n}" for axis, n in mesh.items())
        raise ValueError(
            f"--shrink needs a mesh that fits fewer devices, and config.mesh has {given}; "
            "set one of them to -1, the rest: -- --config.mesh.data=-1, for instance."
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
