"""Data prepared by several processes is that of one, byte for byte; an interruption leaves nothing half made."""

import dataclasses
import functools
import itertools
import multiprocessing
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import pytest
import tensorflow_datasets as tfds

from experiments import prepare
from moe_jax.config import DataConfig
from moe_jax.data import (
    Bytes,
    Classification,
    Digits,
    Folder,
    NextToken,
    Preparation,
    Progress,
    SentencePiece,
    SpanCorruption,
    Tfds,
    ToyTranslation,
    Translation,
    packing,
    preparation,
    windows,
)
from moe_jax.data.documents import Snapshot
from moe_jax.data.preparation import Limited
from tests.programs import call

ROOT = pathlib.Path(__file__).parents[2]
LONG = 300  # seconds that nothing here takes, however slow the machine
CONFIG = """
def get_config():
    return {{
        "model": {{"D": 16, "N": 1, "attention": "MHA(2, 8)", "ffn": "MLP(F=16)", "moe_layers": "none", "moe": None}},
        "data": {{"source": "Folder(path={text!r})", "L": 16, "B": 8}},
    }}
"""
with tfds.core.registered.skip_registration():

    class Numbered(tfds.core.GeneratorBasedBuilder):
        """Three hundred lines in several files, some of them empty, and no split that is held out."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict({"text": tfds.features.Text()}))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(300):
                yield i, {"text": random.Random(i).randbytes(i % 7 * 10).hex()}


@dataclasses.dataclass(frozen=True)
class Watching:
    """Bytes, encoded in a process that another one has started, where jax has no device."""

    V: int = Bytes.V
    bod: int = Bytes.bod
    fingerprint: str = Bytes.fingerprint

    def fit(self, texts, folder):
        return self

    def encode(self, text):
        assert multiprocessing.parent_process() is not None
        assert not jax._src.xla_bridge.backends_are_initialized()
        return Bytes().encode(text)

    def decode(self, ids):
        raise NotImplementedError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """Two domains of documents of different lengths."""
    root = tmp_path_factory.mktemp("text")
    for domain, i in itertools.product(("cooking", "sailing"), range(40)):
        (root / domain).mkdir(exist_ok=True)
        (root / domain / f"{i}.txt").write_text(f"{domain} {i}: " + "a ship or a soup " * (i % 5 + 1))
    return root


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> str:
    data_dir = tmp_path_factory.mktemp("tfds")
    Numbered(data_dir=data_dir).download_and_prepare(file_format="array_record")
    return str(data_dir)


@pytest.fixture
def small_parts(monkeypatch):
    """Many parts of little text, and windows cut often: where a document goes depends on those before it."""
    monkeypatch.setattr(preparation, "chunks", functools.partial(preparation.chunks, size=50))
    monkeypatch.setattr("moe_jax.data.records.SIZE", 200)
    monkeypatch.setattr(packing, "FLUSH", 64)


def files(directory: pathlib.Path) -> dict[str, bytes]:
    """All that was prepared, by its path; nothing is hidden there."""
    paths = [path for path in directory.rglob("*") if path.is_file()]
    assert not any(part.startswith(".") for path in paths for part in path.relative_to(directory).parts)
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


# ---- the same bytes


def test_three_processes_without_devices_make_the_bytes_of_one(folder, small_parts, tmp_path):
    source, heard = Folder(str(folder)), []
    one = NextToken().prepare(source, Bytes(), 16, tmp_path / "one")
    three = NextToken().prepare(source, Watching(), 16, tmp_path / "three", Preparation(3, heard.append))
    assert len(heard) > 12
    assert [split.fingerprint for split in three] == [split.fingerprint for split in one]
    assert files(tmp_path / "three") == files(tmp_path / "one")


def test_two_processes_read_a_tfds_data_set_as_one_does(lines, small_parts, tmp_path):
    source = Limited(Tfds("numbered", data_dir=lines), 200)
    one = NextToken().prepare(source, SentencePiece(300), 16, tmp_path / "one")
    two = NextToken().prepare(source, SentencePiece(300), 16, tmp_path / "two", Preparation(2))
    assert [split.fingerprint for split in two] == [split.fingerprint for split in one]
    assert files(tmp_path / "two") == files(tmp_path / "one")


@pytest.mark.parametrize(
    ("objective", "source"),
    [
        (NextToken(), "folder"),
        (SpanCorruption(), "folder"),
        (Translation(), ToyTranslation(sentences=50)),
        (Translation(source=SentencePiece(300)), ToyTranslation(sentences=300)),
    ],
    ids=repr,
)
def test_every_objective_in_parts(objective, source, folder, small_parts, tmp_path, monkeypatch):
    """The text in small parts, as other processes get it, makes the files of the text as a whole."""
    source = Folder(str(folder)) if source == "folder" else source
    several = objective.prepare(source, Bytes(), 40, tmp_path / "several", Preparation())
    monkeypatch.setattr(preparation, "chunks", lambda documents: [list(documents)])
    whole = objective.prepare(source, Bytes(), 40, tmp_path / "whole", Preparation())
    assert [split.fingerprint for split in several] == [split.fingerprint for split in whole]
    assert files(tmp_path / "several") == files(tmp_path / "whole")


def test_small_parts_lose_no_record(lines, small_parts, tmp_path):
    source = Tfds("numbered", data_dir=lines)
    found = [document.text for split in ("train", "held_out") for document in source.documents(split, tmp_path)]
    assert sorted(found) == sorted(random.Random(i).randbytes(i % 7 * 10).hex().encode() for i in range(300) if i % 7)


def test_a_host_needs_the_description_of_a_tfds_data_set_only(tmp_path):
    """Prepared data is found without the records."""
    Numbered(data_dir=tmp_path).download_and_prepare(file_format="array_record")
    source = Tfds("numbered", data_dir=str(tmp_path))
    made = NextToken().prepare(source, Bytes(), 16, tmp_path / "data")
    for path in list(tmp_path.rglob("*.array_record*")):
        path.unlink()
    found = NextToken().prepare(source, Bytes(), 16, tmp_path / "data")
    assert [split.fingerprint for split in found] == [split.fingerprint for split in made]


# ---- the limit


def texts(split: windows.Windows, domain: int) -> list[bytes]:
    """A domain's documents in windows of one token, whose first tokens are their stream."""
    tokens_WM = split.tokens_WM[split.domain_W == domain]
    stream = [*tokens_WM[:, 0], tokens_WM[-1, 1], split.tokenizer.bod]
    ends = [i for i, token in enumerate(stream) if token == split.tokenizer.bod]
    return [split.tokenizer.decode(stream[a + 1 : b]) for a, b in itertools.pairwise(ends)]


@pytest.mark.parametrize("kind", ["folder", "tfds"])
def test_a_limit_takes_the_first_documents(kind, folder, lines, small_parts, tmp_path, monkeypatch):
    monkeypatch.setattr("moe_jax.data.records.SIZE", 2000)  # the last document is in the middle of a part
    source = Folder(str(folder)) if kind == "folder" else Tfds("numbered", data_dir=lines)
    few = DataConfig(source=source, tokenizer=Bytes(), L=1, documents=30).prepare(tmp_path)
    for split, n in (("train", 30), ("held_out", 2)):
        expected = list(itertools.islice(source.documents(split, tmp_path), n))
        for domain in {document.domain for document in expected}:
            found = texts(few[split == "held_out"], domain)
            assert found == [document.text for document in expected if document.domain == domain]


def test_data_of_a_limit_is_not_taken_for_other_data(folder, tmp_path, monkeypatch):
    data = DataConfig(source=Folder(str(folder)), tokenizer=Bytes(), L=16)
    found = [dataclasses.replace(data, documents=n).prepare(tmp_path)[0].fingerprint for n in (None, 30, 1000)]
    assert len(set(found)) == 3
    monkeypatch.setattr(windows, "write_windows", lambda *_: pytest.fail("made again"))
    assert dataclasses.replace(data, documents=30).prepare(tmp_path)[0].fingerprint == found[1]
    with pytest.raises(pytest.fail.Exception, match="made again"):
        dataclasses.replace(data, documents=31).prepare(tmp_path)


def test_images_have_no_documents():
    with pytest.raises(ValueError, match=r"documents=5 limits text, and Digits\(\) has none; set it to None"):
        DataConfig(source=Digits(), objective=Classification(), L=1, documents=5)


# ---- the program


@pytest.fixture
def config(folder, tmp_path) -> str:
    (tmp_path / "tiny.py").write_text(CONFIG.format(text=str(folder)))
    return f"--config={tmp_path / 'tiny.py'}"


def test_training_finds_what_the_program_made(config, folder, tmp_path, monkeypatch):
    data_dir = tmp_path / "data"
    flags = (config, "--config.data.documents=50", f"--data_dir={data_dir}", "--workers=1")
    made = call(prepare, *flags)
    assert made.code == 0, made
    monkeypatch.setattr(windows, "write_windows", lambda *_: pytest.fail("made again"))
    data = DataConfig(source=Folder(str(folder)), tokenizer=Bytes(), L=16, documents=50)
    for name, split in zip(("train", "held_out"), data.prepare(data_dir), strict=True):
        assert any(line.startswith(name) and split.fingerprint[:16] in line for line in made.out.splitlines())
    assert "there was nothing to make" in call(prepare, *flags).out
    assert call(prepare, config, "--workers=0").error == "--workers=0 must be at least 1."
    below = call(prepare, config, f"--data_dir={tmp_path / 'tiny.py' / 'data'}", "--workers=1").error
    assert "Prepared data cannot be kept in" in below
    assert "tiny.py/data (a file is in its place); choose another place, by --data_dir" in below


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_an_interruption_keeps_what_is_finished(config, split, small_parts, tmp_path, monkeypatch):
    data_dir, undisturbed = tmp_path / "data", Snapshot.documents
    flags = (config, f"--data_dir={data_dir}", "--workers=1")

    def interrupted(self, which, directory):
        yield from itertools.islice(undisturbed(self, which, directory), 3)
        if which == split:
            raise KeyboardInterrupt
        yield from itertools.islice(undisturbed(self, which, directory), 3, None)

    with monkeypatch.context() as patch:
        patch.setattr(Snapshot, "documents", interrupted)
        stopped = call(prepare, *flags)
    assert stopped.code == 130
    assert f"Interrupted ({split}: " in stopped.err
    assert {path.split("/")[2] for path in files(data_dir)} == ({"train"} if split == "held_out" else set())
    assert not list(data_dir.glob("windows/*/.*"))
    kept = {path: (data_dir / path).stat().st_mtime_ns for path in files(data_dir)}
    assert call(prepare, *flags).code == 0
    assert {path: (data_dir / path).stat().st_mtime_ns for path in kept} == kept
    assert call(prepare, config, f"--data_dir={tmp_path / 'other'}", "--workers=1").code == 0
    assert files(data_dir) == files(tmp_path / "other")


def test_progress_says_the_rate_and_the_time_left(capsys):
    now = iter([0, 100, 105, 120])
    told = prepare.Told(every=10, clock=lambda: next(now))
    for documents, share in ((100, 0.1), (150, 0.15), (300, 0.3)):
        told(Progress("train", documents, documents * 7, share))
    (said,) = capsys.readouterr().err.splitlines()
    assert said == "train: 300 documents, 2,100 tokens, 10 documents/s, 70 tokens/s, 30%, 0:01:10 left"
    assert prepare.line(Progress("train", 20, 200, None), Progress("train", 10, 100, None), 5).endswith("20 tokens/s")


# ---- processes

SCRIPT = """
import os, signal, time
from moe_jax.data.preparation import ordered
job = "open({file!r}, 'w').write(str(__import__('os').getpid())), __import__('time').sleep({seconds})"
if __name__ == "__main__":
    with ordered(eval, 2) as mapped:
        try:
            os.write(1, b"ready\\n")
            next(mapped([job.format(file=f"{folder}/first", seconds=3)]))
        except KeyboardInterrupt:
            os.write(1, b"interrupted\\n")
        next(mapped([job.format(file=f"{folder}/second", seconds=0)]))
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_ignore_the_keyboard_and_end_with_their_parent(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT.replace("{folder}", str(tmp_path)))
    program = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    wait(lambda: (tmp_path / "first").is_file() and (tmp_path / "first").read_text())
    os.killpg(program.pid, signal.SIGINT)
    out, err = program.communicate(timeout=LONG)
    assert (out, program.returncode) == (b"ready\ninterrupted\n", -signal.SIGKILL)
    assert b"Traceback" not in err
    wait(lambda: not pathlib.Path("/proc", (tmp_path / "second").read_text()).exists())


DYING = """
import functools, os
from moe_jax.data.preparation import ordered
if __name__ == "__mp_main__":
    os._exit(9)
with ordered(functools.partial(max, "x" * 2**20), 2) as mapped:
    list(mapped(["y"]))
"""


def test_workers_that_die_as_they_start_are_one_line(tmp_path):
    """Even with more to say to them than a pipe holds."""
    (tmp_path / "script.py").write_text(DYING)
    command = [sys.executable, str(tmp_path / "script.py")]
    outcome = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=LONG,
    )
    assert outcome.stderr.splitlines()[-1].startswith("ValueError: One of 2 workers has died")


def test_no_more_is_read_ahead_than_the_workers_need(monkeypatch):
    read, pool = [], preparation.concurrent.futures.ThreadPoolExecutor(2)
    jobs = (read.append(i) or i for i in range(100))
    monkeypatch.setattr(preparation, "_function", lambda job: job, raising=False)
    results = preparation._mapped(pool, 4, jobs)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    assert len(read) == 6
    assert list(results) == list(range(3, 100))


def wait(condition) -> None:
    end = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
