"""Trials of the whole program under faults: trial i of a kind injects one, and says what does not hold.

What must hold after each: the same command goes on from the newest valid step, and ends with the records and the
parameters of a run that nothing has happened to; or it refuses in one line, and nothing is changed.
"""

import dataclasses
import json
import logging
import os
import pathlib
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_jax.checkpoint import Checkpoints
from moe_jax.inspect.run import examples, open_run
from moe_jax.lock import FILE as LOCK
from moe_jax.reporting.metrics import read
from moe_jax.workdir import confirmed_config, log_changes
from tests.faults.injection import Fault, moments
from tests.faults.server import Ended, Server
from tests.faults.tiny import STEPS, write_text

TIMES = ("seconds", "tokens_per_second", "flops_per_second")
REMAINS = re.compile(rf"\.part$|\.orbax-checkpoint-tmp|^deleted-|^{re.escape(LOCK)}")
SAVING = ", the next one was being saved"
UNREAD = "all that is read is the same"
WRITES_CONFIG = 5  # moment: folders and the lock are made, config.json is written under another name, and not moved
SILENCE = 1.0  # seconds, after which an owner that cannot be seen is taken for gone


class Trial(NamedTuple):
    """A fault that was injected, what came of it, and what is wrong with that; "" where nothing is."""

    injected: str
    came: str
    wrong: str


class Campaign:
    """The server, the run that nothing happens to, and a folder for the others."""

    def __init__(self, server: Server):
        self.server, self.folder = server, server.folder
        write_text(self.folder)
        self.undisturbed = self.folder / "undisturbed" / "run"
        ended = server.train(self.undisturbed)
        assert ended.code == 0, ended.said
        self.moments, self.records, self.state = ended.moments, course(self.undisturbed), state(self.undisturbed)
        assert newest(self.undisturbed) == STEPS

    @cached_property
    def sound(self) -> "Opened":
        """The undisturbed run, opened."""
        return opened(self.undisturbed, self.folder)

    def place(self, *names: Any) -> pathlib.Path:
        """The workdir of a trial, in a folder of its own."""
        return self.folder / "-".join(map(str, names)) / "run"

    def copy(self, run: pathlib.Path) -> pathlib.Path:
        """A copy of the undisturbed run."""
        return pathlib.Path(shutil.copytree(self.undisturbed, run))

    def wrong(self, run: pathlib.Path, ended: Ended) -> str:
        """Says how a run that has gone on differs from the undisturbed one; "" where it does not."""
        if ended.code:
            return f"exit code {ended.code}: {last_line(ended)}"
        if course(run) != self.records:
            return "its records differ"
        if newest(run) != STEPS or not equal(state(run), self.state):
            return "its parameters differ"
        left = sorted(str(path.relative_to(run)) for path in run.rglob("*") if REMAINS.search(path.name))
        return f"it leaves {left}" if left else ""

    def goes_on(self, run: pathlib.Path, **job: Any) -> str:
        """Runs the same command; says what is wrong with how it goes on, and from where."""
        step = newest(run)
        ended = self.server.train(run, **job)
        if not ended.code and f"beginning at step {step} of {STEPS}" not in ended.said:
            return f"it does not go on from step {step}"
        return self.wrong(run, ended)


def course(run: pathlib.Path) -> list[dict[str, Any]]:
    """All that was logged of training and evaluation, but for times."""
    records = [record for record in read(run) if record["kind"] in ("train", "eval")]
    return [{name: value for name, value in record.items() if name not in TIMES} for record in records]


def state(run: pathlib.Path, step: int | None = None) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, by default of the newest one, by its name."""
    arrays, _, _ = Checkpoints(run / "checkpoints").restore(step=step)
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(arrays)[0]}


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    """Tells whether two states are the same, bit for bit."""
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


def newest(run: pathlib.Path) -> int:
    """The newest valid step; 0 without one."""
    return max(Checkpoints(run / "checkpoints").steps(), default=0)


def last_line(ended: Ended) -> str:
    return (ended.said.strip().splitlines() or [""])[-1]


def refused(ended: Ended, codes: tuple[int, ...] = (2,)) -> str:
    """Says what is wrong with how a program has refused."""
    if ended.code not in codes or "Traceback" in ended.said or not last_line(ended).startswith("error: "):
        return f"exit code {ended.code}: {ended.said[-300:]}"
    return ""


# ---- the process ends


def kill(campaign: Campaign, i: int, count: int = 20) -> Trial:
    """SIGKILL; the first one before a run has anything."""
    drawn = [Fault("kill", WRITES_CONFIG), *moments("kill", count - 1, campaign.moments)]
    fault, run = drawn[i], campaign.place("kill", i)
    ended = campaign.server.train(run, fault=dataclasses.astuple(fault))
    came = f"step {newest(run)} is whole{SAVING if saving(run) else ''}"
    wrong = campaign.goes_on(run)
    return Trial(described(fault), came, wrong or ("" if ended.code == -signal.SIGKILL else "it was not killed"))


def saving(run: pathlib.Path) -> bool:
    """Tells whether a process was killed there during a save."""
    return any("orbax-checkpoint-tmp" in path.name for path in (run / "checkpoints").glob("*"))


def terminate(campaign: Campaign, i: int, count: int = 4) -> Trial:
    """SIGTERM once, or twice."""
    kind = ("term", "term twice")[i % 2]
    fault, run = moments(kind, count, campaign.moments)[i], campaign.place("term", i)
    ended = campaign.server.train(run, fault=dataclasses.astuple(fault))
    step = newest(run)
    words = f"goes on from step {step}" if step else "it begins anew"
    if ended.code == 128 + signal.SIGTERM:
        wrong = "" if words in last_line(ended) else f"it says {last_line(ended)!r}, and step {step} is whole"
    else:
        wrong = "" if ended.code == 0 and step == STEPS else f"exit code {ended.code}: {last_line(ended)}"
    return Trial(described(fault), last_line(ended), wrong or campaign.goes_on(run))


def described(fault: Fault) -> str:
    after = f", {fault.delay} ms later" if fault.delay else ""
    return f"{fault.kind} at moment {fault.moment}{after}"


# ---- the disk


def disk(campaign: Campaign, i: int, count: int = 5) -> Trial:
    """No room from a moment on, and then room again."""
    fault = dataclasses.replace(moments("full", count, campaign.moments)[i], delay=0)
    run = campaign.place("full", i)
    ended = campaign.server.train(run, fault=dataclasses.astuple(fault))
    step, wrong = newest(run), refused(ended, (2, 75))
    return Trial(described(fault), f"step {step} is whole: {last_line(ended)}", wrong or campaign.goes_on(run))


# ---- one byte


def flip(campaign: Campaign, i: int) -> Trial:
    """One bit of one byte of a file of a finished run, before everything that opens runs."""
    run = campaign.copy(campaign.place("flip", i))
    file = files(run)[i % len(files(run))]
    assert len(files(run)) <= KINDS["flip"].count, "every file"
    rng, data = random.Random(f"flip {i}"), bytearray(file.read_bytes())
    at, bit = rng.randrange(len(data)), rng.randrange(8)
    data[at] ^= 1 << bit
    file.write_bytes(data)
    injected = f"byte {at} of {file.relative_to(run)}"
    sound, found = campaign.sound, opened(run, campaign.folder)
    noticed = next((said for said in found.said if said not in sound.said), "")
    if noticed:
        return Trial(injected, noticed, "")
    same = found.values == sound.values
    return Trial(injected, UNREAD, "" if same else "another run is read, in silence")


def files(run: pathlib.Path) -> list[pathlib.Path]:
    """The files of a run that are not empty: first one of each kind, those that everything rests on, then the rest."""
    found = sorted(path for path in run.rglob("*") if path.is_file() and path.stat().st_size)
    newest = run / "checkpoints" / str(STEPS)
    data = max((newest / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    first = [run / name for name in ("metrics.jsonl", "config.json", "tokenizer.model")]
    first += [newest / "manifest.json", data, newest / "state" / "_METADATA"]
    return first + [path for path in found if path not in first]


class Opened(NamedTuple):
    """Values that were read of a run, and warnings and errors."""

    values: list[Any]
    said: list[str]


def opened(run: pathlib.Path, data_dir: pathlib.Path) -> Opened:
    """Opens a run by all means: its config, log, checkpoints, tokenizer and data."""
    readers: list[Callable[[], Any]] = [
        lambda: confirmed_config(run),
        lambda: [record for record in read(run) if record["kind"] != "end"],
        lambda: open_run(run).step,
        lambda: open_run(run).exp.to_json(),
        lambda: text_of(run, data_dir),
        *(partial(arrays, run, step) for step in (STEPS - 3, STEPS)),
    ]
    values, heard = [], Heard()
    logger = logging.getLogger("moe_jax")
    logger.addHandler(heard)
    here = pathlib.Path.cwd()
    os.chdir(data_dir)  # where the text is
    try:
        for reader in readers:
            try:
                values.append(reader())
            except ValueError as error:
                heard.said.append(str(error))
        if said := log_changes(run):
            heard.said.append(said)
    finally:
        os.chdir(here)
        logger.removeHandler(heard)
    return Opened(values, heard.said)


def text_of(run: pathlib.Path, data_dir: pathlib.Path) -> list[Any]:
    """Ids of the held-out text of a run, by its tokenizer."""
    return [batch.tokens_BL.tolist() for batch in examples(open_run(run), data_dir / "data")[1]]


def arrays(run: pathlib.Path, step: int) -> dict[str, bytes]:
    """The bytes of all arrays of a step."""
    return {name: leaf.tobytes() for name, leaf in state(run, step).items()}


class Heard(logging.Handler):
    """Keeps warnings."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


# ---- two in one workdir


def lock(campaign: Campaign, i: int) -> Trial:
    """A lock of a process that lives, is gone, or cannot be seen."""
    name, trial = list(LOCKS.items())[i]
    run = campaign.place("lock", i)
    came, wrong = trial(campaign, run)
    return Trial(name, came, wrong or (campaign.goes_on(run) if newest(run) < STEPS else ""))


def held(campaign: Campaign, run: pathlib.Path) -> pathlib.Path:
    """Starts a run that stands still in the middle; its job."""
    fault = Fault("hold", campaign.moments // 2)
    job = campaign.server.start(run, fault=dataclasses.astuple(fault))
    while not (run.parent / "held").exists():
        assert not (job / "end").exists(), campaign.server.end(job)
        time.sleep(0.01)
    return job


def second_is_refused(campaign: Campaign, run: pathlib.Path) -> tuple[str, str]:
    job = held(campaign, run)
    before = snapshot(run)
    second = campaign.server.train(run)
    wrong = refused(second) or ("" if snapshot(run) == before else "the second run has changed the first one's files")
    (run.parent / "go").touch()
    return last_line(second), wrong or campaign.wrong(run, campaign.server.end(job))


def owner_is_killed(campaign: Campaign, run: pathlib.Path) -> tuple[str, str]:
    job = held(campaign, run)
    os.kill(json.loads((run / LOCK).read_text())["pid"], signal.SIGKILL)
    return f"exit code {campaign.server.end(job).code}; the next run takes over", ""


def lock_is_lost(campaign: Campaign, run: pathlib.Path) -> tuple[str, str]:
    job = held(campaign, run)
    mine = (run / LOCK).read_text()
    (run / LOCK).write_text(json.dumps({**json.loads(mine), "host": "tpu-7", "token": "another"}))
    (run.parent / "go").touch()
    ended = campaign.server.end(job)
    wrong = refused(ended) or ("" if (run / LOCK).exists() else "it has removed the lock of its successor")
    (run / LOCK).unlink(missing_ok=True)
    return last_line(ended), wrong


def owner_is_elsewhere(campaign: Campaign, run: pathlib.Path) -> tuple[str, str]:
    run.mkdir(parents=True)
    owner = {"host": "tpu-7", "machine": "another", "pid": 7, "began": "1", "since": "2026-01-01", "token": "another"}
    (run / LOCK).write_text(json.dumps(owner))
    job = campaign.server.start(run, silence=60.0)
    end = time.monotonic() + 60
    while not (job / "end").exists() and time.monotonic() < end:
        os.utime(run / LOCK)
        time.sleep(0.05)
    ended = campaign.server.end(job)
    return last_line(ended), refused(ended) or taken_after_silence(campaign, run)


def lock_is_torn(campaign: Campaign, run: pathlib.Path) -> tuple[str, str]:
    run.mkdir(parents=True)
    (run / LOCK).write_text('{"host": "tpu')
    return f"taken over after {SILENCE:g} s of silence", taken_after_silence(campaign, run)


def taken_after_silence(campaign: Campaign, run: pathlib.Path) -> str:
    ended = campaign.server.train(run, silence=SILENCE)
    return "" if "waiting up to" in ended.said else campaign.wrong(run, ended) or "it has not waited"


LOCKS: dict[str, Callable[[Campaign, pathlib.Path], tuple[str, str]]] = {
    "a second run beside one that lives": second_is_refused,
    "the owner is killed (SIGKILL)": owner_is_killed,
    "the owner has lost its lock while it stood still": lock_is_lost,
    "an owner on another machine, touching its lock, then silent": owner_is_elsewhere,
    "a lock that is cut": lock_is_torn,
}


# ---- folders


def folder(campaign: Campaign, i: int) -> Trial:
    """A workdir with a hostile name, in a hostile place, or with hostile content: it works, or is refused."""
    name, make = list(FOLDERS.items())[i]
    place = campaign.place("folder", i).parent
    place.mkdir()
    run = make(campaign, place)
    before = snapshot(place)
    ended = campaign.server.train(run)
    if name in WORK:
        return Trial(name, f"works, from step {begun(ended)}", campaign.wrong(run, ended))
    wrong = refused(ended) or ("" if snapshot(place) == before else "refused, and something was changed")
    return Trial(name, last_line(ended), wrong)


def begun(ended: Ended) -> str:
    return (re.findall(r"beginning at step (\d+)", ended.said) or ["?"])[0]


def named(name: str) -> Callable[[Campaign, pathlib.Path], pathlib.Path]:
    """A new run in a folder of this name."""
    return lambda campaign, place: place / name


def among_steps(make: Callable[[pathlib.Path], Any]) -> Callable[[Campaign, pathlib.Path], pathlib.Path]:
    """A run that is to go on from step 9, with something that is no step in place of step 12."""

    def prepared(campaign: Campaign, place: pathlib.Path) -> pathlib.Path:
        run = campaign.copy(place / "run")
        shutil.rmtree(run / "checkpoints" / str(STEPS))
        make(run / "checkpoints" / str(STEPS))
        return run

    return prepared


def instead(name: str, make: Callable[[pathlib.Path], Any]) -> Callable[[Campaign, pathlib.Path], pathlib.Path]:
    """A finished run with something else in place of this file or folder."""

    def prepared(campaign: Campaign, place: pathlib.Path) -> pathlib.Path:
        run = campaign.copy(place / "run")
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink(missing_ok=True)
        make(run / name)
        return run

    return prepared


def link_to_folder(campaign: Campaign, place: pathlib.Path) -> pathlib.Path:
    (place / "elsewhere").mkdir()
    (place / "run").symlink_to("elsewhere")
    return place / "run"


def links_inside(campaign: Campaign, place: pathlib.Path) -> pathlib.Path:
    """A run that is to go on from step 9, with its log and its checkpoints on another disk."""
    run = among_steps(lambda path: None)(campaign, place)
    for name in ("metrics.jsonl", "checkpoints"):
        (run / name).rename(place / name)
        (run / name).symlink_to(place / name)
    return run


def link_to_nothing(campaign: Campaign, place: pathlib.Path) -> pathlib.Path:
    (place / "run").symlink_to(place / "nowhere")
    return place / "run"


def on_a_file(campaign: Campaign, place: pathlib.Path) -> pathlib.Path:
    (place / "file").write_text("mine")
    return place / "file"


def below_a_file(campaign: Campaign, place: pathlib.Path) -> pathlib.Path:
    return on_a_file(campaign, place) / "run"


def of_somebody(campaign: Campaign, place: pathlib.Path) -> pathlib.Path:
    (place / "run").mkdir()
    (place / "run" / "thesis.tex").write_text("mine")
    return place / "run"


REFUSED: dict[str, Callable[[Campaign, pathlib.Path], pathlib.Path]] = {
    "the name lr[0.1]": named("lr[0.1]"),
    "a name with a backslash": named("a\\b"),
    "a name that is not UTF-8": named(os.fsdecode(b"run\xff")),
    "a link to nothing": link_to_nothing,
    "a file": on_a_file,
    "below a file": below_a_file,
    "where nobody can write (/proc)": lambda campaign, place: pathlib.Path("/proc/run"),
    "a folder of somebody else's": of_somebody,
    "config.json is a folder": instead("config.json", lambda path: path.mkdir()),
    "config.json is null": instead("config.json", lambda path: path.write_text("null")),
    "metrics.jsonl is a folder": instead("metrics.jsonl", lambda path: path.mkdir()),
    "checkpoints is a file": instead("checkpoints", lambda path: path.write_text("mine")),
    "tensorboard is a file": instead("tensorboard", lambda path: path.write_text("mine")),
    "report.html is a folder": instead("report.html", lambda path: path.mkdir()),
    "the lock is a folder": instead(LOCK, lambda path: path.mkdir()),
}
WORK: dict[str, Callable[[Campaign, pathlib.Path], pathlib.Path]] = {
    "a file named as the next step": among_steps(lambda path: path.write_text("12")),
    "a name with a newline": named("a\nb"),
    "a name with spaces, umlauts and $": named("größe 0.1 $x^{$"),
    "a name of 250 characters": named("x" * 250),
    "a link to a folder": link_to_folder,
    "log and checkpoints are links": links_inside,
    "an empty folder named as the next step": among_steps(lambda path: path.mkdir()),
    "a link to itself named as the next step": among_steps(lambda path: path.symlink_to(path.name)),
    "a copy of another step named as the next step": among_steps(
        lambda path: shutil.copytree(path.parent / str(STEPS - 3), path)
    ),
}
FOLDERS = REFUSED | WORK


def snapshot(place: pathlib.Path) -> dict[str, bytes]:
    """Every file and link below a folder, with what it holds; a lock, which comes and goes, left out."""
    return dict(seen(place))


def seen(place: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(place.rglob("*")):
        name = str(path.relative_to(place))
        if path.is_symlink():
            yield name, os.fsencode(os.readlink(path))
        elif path.is_file() and path.name != LOCK:
            yield name, path.read_bytes()
        elif path.is_dir():
            yield name, b"a folder"


class Kind(NamedTuple):
    """A kind of fault: its trial, how many there are, and which of them are in the short form."""

    trial: Callable[[Campaign, int], Trial]
    count: int
    short: tuple[int, ...]
    injected: str
    holds: str


KINDS = {
    "kill": Kind(
        *(kill, 20, (0,), "SIGKILL, at moments all over the run, saves included"),
        "goes on from the newest whole step to the same records and parameters, bit for bit; no record is lost",
    ),
    "terminate": Kind(
        *(terminate, 4, (), "SIGTERM, once and twice"),
        "the step that the last line names is whole; goes on from there, bit for bit",
    ),
    "flip": Kind(
        *(flip, 48, tuple(range(6)), "one bit flipped, in every file of a workdir"),
        "noticed by what opens the run, or all that is read is the same",
    ),
    "disk": Kind(
        *(disk, 5, (0,), "a full disk, from a moment on"),
        "one line says what is whole; goes on where there is room, bit for bit",
    ),
    "lock": Kind(
        *(lock, len(LOCKS), (0,), "two runs in one workdir; locks whose owner is killed, elsewhere, or unknown"),
        "one writes, the other is refused in one line; a lock outlives no owner",
    ),
    "folder": Kind(
        *(folder, len(FOLDERS), tuple(range(len(REFUSED))), "hostile workdirs: names, links, files of the wrong kind"),
        "works, bit for bit, or is refused in one line and nothing is changed",
    ),
}
