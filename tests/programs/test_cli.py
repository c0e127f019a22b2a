"""A user's mistake is one line that says what to do, exit code 2, and nothing is lost."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from functools import partial

import pytest

from experiments import cli, train
from experiments.launch.supervisor import MISTAKE
from tests import programs

GLAM = "--config=configs/glam_nano.py"
TINY = """
from ml_collections import ConfigDict

def get_config(source="{texts}"):
    config = ConfigDict()
    config.mesh = {{"data": 8}}
    config.model = {{"D": 8, "N": 1, "attention": "MHA(1, 4)", "ffn": "MLP(F=4)", "moe_layers": "none"}}
    config.model.remat = "none"
    config.data = {{"source": f"Folder(path={{source!r}})", "L": 8, "B": 8}}
    config.run = {{"steps": 2, "eval_every": 2, "save_every": 1, "eval_sequences": 8}}
    return config
"""


call = partial(programs.call, train)


def snapshot(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def flip(path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> list[str]:
    """The flags of an experiment of two steps on a few texts."""
    root = tmp_path_factory.mktemp("tiny")
    (root / "texts").mkdir()
    for i in range(12):
        (root / "texts" / f"{i}.txt").write_text(f"text number {i}, " * 20)
    (root / "tiny.py").write_text(TINY.format(texts=root / "texts"))
    return [f"--config={root / 'tiny.py'}", f"--data_dir={root / 'data'}"]


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory) -> pathlib.Path:
    """The workdir of that experiment, trained; tests that change it take a copy."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    outcome = call(*tiny, f"--workdir={workdir}")
    assert outcome.code == 0, outcome
    return workdir


@pytest.fixture
def copied(finished, tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(finished, tmp_path / "copied"))


# ---- the command line


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["No experiment", "--config="]),
        (["--config="], ["No experiment"]),
        ([GLAM], ["No place for the run", "--workdir="]),
        ([GLAM, "--workdir="], ["No place for the run"]),
        (["--config=configs/glam_nanoo.py"], ["configs/glam_nanoo.py", "did you mean configs/glam_nano.py?"]),
        (["--config=configs/papers/mixtral_8x7.py"], ["did you mean configs/papers/mixtral_8x7b.py?"]),
        (["--config=nowhere"], ["configs/glam_nano.py", "configs/glam_pod.py", "published models in configs/papers"]),
        (["--config=configs"], ["no config file configs", "configs/glam_nano.py"]),
        (["--config=README.md"], ["README.md is not a config file", "SyntaxError"]),
        (["--config=experiments/cli.py"], ["experiments/cli.py is not a config file"]),
        (["--config=configs/glam_nano.py:big"], ["configs/glam_nano.py is not a config file", "argument"]),
        (["--config"], ["Missing value", "--config"]),
        ([GLAM, "--workdir"], ["Missing value", "--workdir"]),
        ([GLAM, "--config.run.steps"], ["Missing value", "--config.run.steps"]),
        ([GLAM, "--workdr=x"], ["workdr", "Did you mean: workdir"]),
        ([GLAM, "--overwrite=maybe"], ["--overwrite=maybe"]),
        ([GLAM, "config.run.steps=3"], ["'config.run.steps=3' is not a flag", "--name=value"]),
        ([GLAM, "--workdir", "x", "y"], ["'y' is not a flag"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_wrong_command_line(argv, words, tmp_path):
    error = call(*argv).error
    for word in words:
        assert word in error


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.moe.ruoter=Switch()", "config.model.moe has no field 'ruoter'; did you mean 'router'?"),
        ("modle.moe.E=8", "config has no field 'modle'; did you mean 'model'?"),
        ("run.stesp=8", "config.run has no field 'stesp'; did you mean 'steps'?"),
        ("run.=8", "config.run has no field ''; there are steps, log_every, eval_every"),
        ("run.steps.K=1", "config.run.steps=1200 has no fields; set it as a whole"),
        (
            "model.moe.router=TopKK()",
            "config.model.moe.router: Component 'TopKK' is unknown; did you mean 'TopK'?",
        ),
        ("model.moe.router=Sort()", "config.model.moe.router: Component 'Sort' cannot stand here"),
        ("model.moe.router=None", "must be one of 'Switch(...)'"),
        ("model.moe.router=TopK(k=2)", "TopK has no argument 'k'; did you mean 'K'?"),
        ("model.moe.router=TopK(K='2')", "TopK(K='2') must be a whole number"),
        ("model.moe.router=TopK(K=2", "is not a component; write its constructor call"),
        ("model.moe.router=__import__('os')", "Component '__import__' is unknown"),
        ("run.steps=abc", "config.run.steps='abc' must be a whole number"),
        ("run.steps=", "config.run.steps='' must be a whole number"),
        ("run.steps=1e3", "config.run.steps=1000.0 must be a whole number"),
        ("run.steps=0", "config.run.steps=0 must be a whole number in [1, 2**31)."),
        ("optim.clip=abc", "config.optim.clip='abc' must be a number in (0, inf) or None"),
        ("model.attention=None", "config.model.attention=None must be one of 'MHA(...)'"),
        ("model.moe_layers=None", "moe_layers='None' is not a choice of layers"),
        ("model.tied=no", "config.model.tied='no' must be True or False"),
        ("mesh.zz=2", "config.mesh has no field 'zz'; there are slice, data, fsdp, expert, tensor"),
        ("mesh.data=0", "config.mesh.data=0"),
        ("mesh.data=128", "config.data.B=64 sequences do not spread evenly over 512 devices"),
        ("mesh.data=64", "make B a multiple of 256"),
        ("data.B=12", "config.data.B=12 sequences do not spread evenly over 8 devices"),
        ("model.moe.E=18", "E=18 does not spread evenly over config.mesh.expert=4"),
        ("model.moe.S=100", "config.model.moe.S=100 does not divide the 512 tokens"),
        ("model.moe.router=TopK(K=33)", "K=33 of E=32 experts; K must lie between 1 and E"),
        ("model.moe.router=TopK(K=1)", "never trains its router; set normalize=False"),
        ("model.moe.dispatch=Scatter(priority='choice-major')", "use 'token-major', or say causal=False"),
        (
            "model.moe.dispatch=Sort()",
            "does not carry the rows of Sort() between shards, but config.mesh.expert=4; use",
        ),
        ("data.tokenizer=SentencePiece(V=5)", "SentencePiece(V=5) must be a whole number in [300, 2**31)"),
        ("model.moe.exchange=RaggedAllToAll(buffer=2.0)", "shares its room with later tokens; in a language"),
        ("model.moe.exchange=AllToAll(over=('tensor',))", "experts are sharded over the mesh axes ('expert',)"),
        # routing: conventions, shares, groups, and who may not stand in a causal model
        ("model.moe.losses=LoadBalance(0.01, 'swich')", "LoadBalance(convention='swich') is unknown; use one"),
        ("model.moe.losses=('Load(0.1)',)", "Load() needs the load that a noisy router estimates"),
        (
            "model.moe.dispatch=Scatter(1.25, convention='vmo')",
            "Scatter(convention='vmo') is unknown; use one of exact",
        ),
        ("model.moe.router=TopP(p=1.5)", "TopP(p=1.5) must be a number in (0, 1]"),
        ("model.moe.router=LossFree(groups=5, limit=2)", "needs E=32 experts in equal groups"),
        ("model.moe.router=Hierarchical(M=5)", "Hierarchical(M=5, inner=2) needs E=32 experts in equal groups"),
        (
            "model.moe.router=ExpertChoice()",
            "does not take what ExpertChoice() decides; use Einsum",
        ),
        ("model.moe.router=Sinkhorn()", "Sinkhorn() decides about a token by later ones; in a language model use"),
        ("model.moe.gating=(\"Temperature(shape='log')\",)", "Temperature(shape='log') is unknown; use one of linear"),
        ("model.moe.gating=Jitter(1.5)", "Jitter(size=1.5) must be a number in (0, 1)"),
        # numbers that no optimizer, schedule or loss means, as a whole and by their paths
        ("optim.optimizer=AdamW(b1=1.0)", "AdamW(b1=1.0) must be a number in [0, 1)"),
        ("optim.optimizer=AdamW(b2=-0.1)", "AdamW(b2=-0.1) must be a number in [0, 1)"),
        ("optim.optimizer.b2=1.5", "config.optim.optimizer: AdamW(b2=1.5) must be a number in [0, 1)"),
        ("optim.optimizer.eps=-1e-8", "config.optim.optimizer: AdamW(eps=-1e-08) must be a number in (0, inf)"),
        ("optim.optimizer.weight_decay=-0.1", "AdamW(weight_decay=-0.1) must be a number in [0, inf)"),
        ("optim.schedule.floor=1.5", "config.optim.schedule: Cosine(floor=1.5) must be a number in [0, 1]"),
        ("optim.schedule=WSD(0.01, floor=-0.5)", "WSD(floor=-0.5) must be a number in [0, 1]"),
        ("optim.optimizer=Adafactor(decay=-0.8)", "Adafactor(decay=-0.8) must be a number in (0, 1]"),
        ("model.moe.losses=Adaptive(Adaptive(LoadBalance()))", "wraps another loss, like Adaptive(LoadBalance(0.01))"),
        ("data.objective=Translation(source=TopK())", "is no tokenizer; use SentencePiece()"),
        ("mesh.data=2_147_483_648", "config.mesh.data=2147483648 must be a number of devices, or -1"),
        ("model.aux_over_layers=total", "aux_over_layers='total' is unknown; use one of 'mean', 'sum'"),
    ],
)
def test_a_wrong_value(override, words, tmp_path):
    """Refused before anything is written, wherever on the command line it stands."""
    workdir = tmp_path / "run"
    error = call(f"--config.{override}", GLAM, f"--workdir={workdir}").error
    assert words in error
    assert not workdir.exists()
    assert "--traceback" not in error, "our own error needs none"


@pytest.mark.parametrize(
    ("path", "text", "words"),
    [
        ("run.steps", "9" * 309, "config.run.steps=99999"),
        ("run.steps", "9" * 5000, "must be a whole number in [1, 2**31)"),
        ("run.steps", "-" * 5000 + "1", "must be a whole number in [1, 2**31)"),
        ("optim.clip", "9" * 309, "must be a number in (0, inf) or None"),
        (
            "optim.optimizer.b1",
            "0x" + "f" * 9000,
            "config.optim.optimizer.b1='0xffff",
        ),
        ("model.moe.router", "TopK(K=" + "-" * 5000 + "1)", "is not a component"),
        ("model.moe.router", "TopK(" * 99 + ")" * 99, "is not a component"),
        ("model.moe.losses", "Adaptive(" * 20 + "RouterZ()" + ")" * 20, "wraps another loss"),
        ("model.moe.losses", "[" * 190 + "]" * 190, "is not a component"),
        ("model.moe_layers", "{1:" * 150 + "2" + "}" * 150, "is not a choice of layers"),
        ("model.attention.position", "Rotary(scaling=" * 90 + "1" + ")" * 90, "config.model.attention.position"),
        ("x" * 5000, "1", "config has no field 'xxxxx"),
        (".".join("x" * 2000), "1", "config has no field 'x'"),
        ("run.steps.K", "word " * 2000, "config.run.steps=1200 has no fields"),
        ("data.source", "Folder(path='" + "a/" * 3000 + "')", "a/a/a/"),
    ],
    ids=map(str, range(15)),
)
def test_an_endless_value(path, text, words, tmp_path):
    """Numbers of any length, any nesting: the same sentences, which repeat at most a hundred characters of it."""
    error = call(f"--config.{path}={text}", GLAM, f"--workdir={tmp_path / 'run'}").error
    assert words in error
    assert not any(error[i : i + 101] in f"{path}={text}" for i in range(len(error) - 100))


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("run.steps", "1_000", 1000),
        ("optim.clip", "None", None),
        ("optim.clip", "2", 2.0),
        ("model.tied", "false", False),
        ("model.moe_layers", "0,1", "0,1"),
        ("model.moe.S", "None", None),
        ("model.moe.losses", "('RouterZ(1e-4)',)", ["RouterZ(weight=0.0001)"]),
        ("optim.no_decay", "('D',)", ["D"]),
        ("mesh.data", "2", 2),
        ("run.keep_best", "0", 0),  # not in the file
        ("model.moe.shared", "MLP(F=3)", "MLP(F=3, activation='gelu', bias=False)"),  # None in the file
    ],
)
def test_an_override_is_read_by_the_type_of_its_field(path, text, expected):
    outcome = call(GLAM, f"--config.{path}={text}", "--print_config")
    found = json.loads(outcome.out)
    for part in path.split("."):
        found = found[part]
    assert found == expected
    assert type(found) is type(expected)


def test_two_wrong_axes(tmp_path):
    free = ["--config.mesh.data=-1", "--config.mesh.expert=-1"]
    assert "only one axis can be -1" in call(GLAM, *free, f"--workdir={tmp_path / 'run'}").error


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        ({"data": -1, "expert": 16}, "mesh data=-1 x expert=16 does not multiply to the 8 devices"),
        ({"data": 2, "expert": 2}, "mesh data=2 x expert=2 does not multiply to the 8 devices"),
        ({"data": -1, "expert": 1}, "do not spread evenly over 8 devices"),
    ],
)
def test_a_mesh_that_the_devices_do_not_make(mesh, words, tmp_path, monkeypatch):
    """As on a pod, where devices cannot be simulated."""
    monkeypatch.setattr(train.jax.config, "update", lambda *_: None)
    argv = [f"--config.mesh.{axis}={n}" for axis, n in mesh.items()]
    argv += ["--config.model.moe.S=64", *(["--config.data.B=36"] if mesh["expert"] == 1 else [])]
    assert words in call(GLAM, *argv, f"--workdir={tmp_path / 'run'}").error
    assert not (tmp_path / "run").exists()


def test_overrides_are_in_what_is_printed_in_any_order():
    overrides = [
        "--config.model.moe.S=None",
        "--config.run.keep_best=0",
        "--config.model.moe.router",
        "Switch()",
    ]
    first, second = call(GLAM, *overrides, "--print_config"), call("--print_config", *overrides, GLAM)
    assert first.code == second.code == 0
    assert first.out == second.out
    printed = json.loads(first.out)
    assert printed["model"]["moe"]["S"] is None
    assert printed["model"]["moe"]["router"] == "Switch()"
    assert printed["run"]["keep_best"] == 0
    assert json.loads(call(GLAM, "--print_config").out)["model"]["moe"]["S"] == 512, "nothing stays behind"


def test_help_names_the_flags_and_the_fields():
    outcome = call("--help")
    assert outcome.code == 0
    for word in (
        "--workdir",
        "--overwrite",
        "--config.model.moe.{E,router,",
        "--config.run.{steps,",
        "python -m",
    ):
        assert word in outcome.out


def test_a_bug_keeps_its_traceback_and_a_library_error_says_how_to_see_it(tmp_path, monkeypatch):
    def bug(*_):
        raise TypeError("a bug")

    monkeypatch.setattr(train, "run", bug)
    with pytest.raises(TypeError, match="a bug"):
        call(GLAM, f"--workdir={tmp_path / 'run'}")
    monkeypatch.setattr(train, "run", lambda *_: json.loads("not JSON"))
    assert "(JSONDecodeError; --traceback shows where)" in call(GLAM, f"--workdir={tmp_path / 'run'}").error
    with pytest.raises(json.JSONDecodeError):
        call(GLAM, f"--workdir={tmp_path / 'run'}", "--traceback")


# ---- the folders


def test_a_finished_run_is_whole(finished):
    assert {"config.json", "metrics.jsonl", "report.html", "checkpoints"} <= {p.name for p in finished.iterdir()}
    assert {p.name for p in (finished / "checkpoints").iterdir() if p.name.isdecimal()} == {"1", "2"}


def test_another_run_is_left_alone(tiny, copied):
    before = snapshot(copied)
    error = call(*tiny, f"--workdir={copied}", "--config.model.D=16", "--config.seed=1").error
    assert str(copied) in error
    assert "model.D was 8, is 16; seed was 0, is 1" in error
    assert "--overwrite" in error
    assert snapshot(copied) == before


@pytest.mark.law(9)
def test_a_run_goes_on_for_longer_and_on_another_mesh(tiny, copied):
    longer = ["--config.run.log_every=7", "--config.mesh.expert=2", "--config.mesh.data=4"]
    outcome = call(*tiny, f"--workdir={copied}", *longer)
    assert outcome.code == 0, outcome
    assert "beginning at step 2 of 2" in outcome.err
    assert json.loads((copied / "config.json").read_text())["mesh"].items() >= {"data": 4, "expert": 2}.items()
    kinds = [json.loads(line)["kind"] for line in (copied / "metrics.jsonl").read_text().splitlines()]
    assert kinds[-2:] == ["start", "end"]
    assert "eval" in kinds, "the records of the first part are still there"


def test_a_run_that_never_began_may_be_another(tiny, tmp_path):
    """A first try that failed on its data does not claim the folder."""
    workdir, empty = tmp_path / "run", tmp_path / "empty"
    empty.mkdir()
    source = f"--config.data.source=Folder(path={str(empty)!r})"
    for _ in range(2):
        assert "holds no UTF-8 text file" in call(*tiny, source, f"--workdir={workdir}").error
    assert "there is no such folder" in call(*tiny, source.replace("empty", "emtpy"), f"--workdir={workdir}").error


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_files_of_somebody_else_are_left_alone(tiny, tmp_path, overwrite):
    (tmp_path / "thesis.tex").write_text("years of work")
    before = snapshot(tmp_path)
    error = call(*tiny, f"--workdir={tmp_path}", *overwrite).error
    assert "holds files that are not a run's (thesis.tex)" in error
    assert snapshot(tmp_path) == before


def test_overwriting_deletes_the_run_and_nothing_else(copied, tiny, monkeypatch):
    (copied / "notes.txt").write_text("mine")

    def stop(*_):
        raise OSError("no further")

    monkeypatch.setattr(train, "train", stop)
    assert "no further" in call(*tiny, f"--workdir={copied}", "--overwrite", "--config.model.D=16").error
    assert {p.name for p in copied.iterdir()} == {"config.json", "notes.txt"}
    assert json.loads((copied / "config.json").read_text())["model"]["D"] == 16


def test_places_that_cannot_be_written(tiny, tmp_path):
    file = tmp_path / "file"
    file.write_text("text")
    assert f"--workdir={file} is a file; give a folder" in call(*tiny, f"--workdir={file}").error
    below = call(*tiny, f"--workdir={file}/run").error
    assert f"Nothing can be written to {file}/run" in below
    assert "choose another --workdir" in below
    assert "is a URL" in call(*tiny, "--workdir=gs://bucket/run").error
    run = tmp_path / "run"
    assert (
        f"--data_dir={file} is a file; give a folder" in call(tiny[0], f"--data_dir={file}", f"--workdir={run}").error
    )
    assert not run.exists()
    assert snapshot(tmp_path) == {"file": b"text"}


@pytest.mark.parametrize("content", [b"{", b"[]", b"", b"\xff\x00"])
def test_a_damaged_config_is_not_written_over(tiny, copied, content):
    (copied / "config.json").write_bytes(content)
    before = snapshot(copied)
    error = call(*tiny, f"--workdir={copied}").error
    assert "config.json is damaged" in error
    assert "--overwrite" in error
    assert snapshot(copied) == before


def test_a_damaged_log_is_not_written_over(tiny, copied):
    log = copied / "metrics.jsonl"
    log.write_bytes(b"\xff not JSON\n" + log.read_bytes())
    before = snapshot(copied)
    error = call(*tiny, f"--workdir={copied}").error
    assert f"line 1 of {log} is not a record: remove that line" in error
    assert snapshot(copied) == before


def test_a_full_disk_is_no_mistake(tiny, copied, monkeypatch):
    """The error says which step is whole and how much one takes; the exit code lets a supervisor try again."""

    def full(self, record):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train.Logger, "write", full)
    outcome = call(*tiny, f"--workdir={copied}", "--config.run.steps=3")
    assert outcome.code == cli.TRY_AGAIN
    assert outcome.code != MISTAKE
    line = outcome.err.splitlines()[-1]
    assert re.match(r"error: no space left on device: a step takes 0\.\d MB, and [\d,.]+ MB are free in ", line), line
    assert line.endswith("; step 2 is whole; make room, and the same command goes on from there")


@pytest.mark.parametrize("name", ["lr[0.1]", "a\\b", "a*"])
def test_a_path_where_checkpoints_would_be_lost(tiny, tmp_path, name):
    error = call(*tiny, f"--workdir={tmp_path / name}").error
    assert "as a pattern or a separator; choose a path without" in error
    assert list(tmp_path.iterdir()) == []


def test_links_stay(tiny, copied, tmp_path):
    """A log and checkpoints that are kept on another disk, when the run goes on and when it is overwritten."""
    disk = tmp_path / "disk"
    disk.mkdir()
    for name in ("metrics.jsonl", "checkpoints"):
        shutil.move(copied / name, disk / name)
        (copied / name).symlink_to(disk / name)
    for flags in (["--config.run.steps=3"], ["--overwrite"]):
        assert call(*tiny, f"--workdir={copied}", *flags).code == 0
        assert all((copied / name).is_symlink() for name in ("metrics.jsonl", "checkpoints"))
        steps = "3" if flags[0] != "--overwrite" else "2"
        assert (disk / "checkpoints" / steps / "manifest.json").is_file()
        assert json.loads((disk / "metrics.jsonl").read_text().splitlines()[-1])["step"] == int(steps)
    assert not (disk / "checkpoints" / "3").exists()


def test_a_config_that_is_not_the_checkpoints_is_said(tiny, copied):
    saved = copied / "config.json"
    saved.write_text(saved.read_text().replace('"D": 8', '"D": 9'))
    before = snapshot(copied)
    for flags in ([], ["--config.model.D=9"]):
        error = call(*tiny, f"--workdir={copied}", *flags).error
        assert f"{saved} is not the config of the checkpoint of step 2 (model.D was 8, is 9); restore it" in error
    assert snapshot(copied) == before


# ---- checkpoints


def largest(step: pathlib.Path) -> pathlib.Path:
    return max((p for p in (step / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_a_flipped_byte_in_the_only_checkpoint(tiny, copied):
    shutil.rmtree(copied / "checkpoints" / "1")
    flip(largest(copied / "checkpoints" / "2"))
    before = snapshot(copied)
    error = call(*tiny, f"--workdir={copied}").error
    assert f"no checkpoint in {copied / 'checkpoints'} is valid" in error
    assert "do not match its checksum" in error
    assert snapshot(copied) == before


def test_a_flipped_byte_in_the_newest_checkpoint(tiny, copied, caplog):
    flip(largest(copied / "checkpoints" / "2"))
    outcome = call(*tiny, f"--workdir={copied}", "--config.run.steps=1")  # which the older one has done
    assert outcome.code == 0, outcome
    assert "beginning at step 1 of 1" in outcome.err
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert f"skipping checkpoint {copied / 'checkpoints' / '2'}" in warnings[0]


# ---- the data


def test_a_folder_without_text(tiny, tmp_path):
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "a.bin").write_bytes(bytes(range(256)))
    workdir = f"--workdir={tmp_path / 'run'}"
    error = call(*tiny, f"--config.data.source=Folder(path={str(tmp_path / 'binary')!r})", workdir).error
    assert "holds no UTF-8 text file" in error
    (tmp_path / "binary" / "b.txt").write_text("one text")
    error = call(*tiny, f"--config.data.source=Folder(path={str(tmp_path / 'binary')!r})", workdir).error
    assert "has no text in its held_out split" in error


def test_a_data_set_that_is_not_there(tiny, tmp_path):
    source = f"--config.data.source=Tfds(name='no_such_set', data_dir={str(tmp_path)!r})"
    error = call(*tiny, source, f"--workdir={tmp_path / 'run'}").error
    assert "TFDS knows no such data set" in error


# ---- as a user sees it


def test_the_program_itself(tmp_path):
    """Two mistakes in two processes: the exit code, one line, no traceback."""
    command = [sys.executable, "-m", "experiments.train", GLAM, f"--workdir={tmp_path / 'run'}"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    programs = [
        subprocess.Popen([*command, override], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
        for override in ("--config.model.moe.ruoter=Switch()", "--config.mesh.data=-1")
    ]
    outputs = [program.communicate(timeout=120) for program in programs]
    lines = [[line for line in err.decode().splitlines() if line] for _, err in outputs]
    assert [program.returncode for program in programs] == [2, 2]
    assert lines[0] == ["error: config.model.moe has no field 'ruoter'; did you mean 'router'?"]
    assert lines[1][-1].startswith("error: mesh data=-1 x expert=4 does not multiply to the 1 devices")
    assert len(lines[1]) == 1
    assert [out for out, _ in outputs] == [b"", b""]
    assert not (tmp_path / "run").exists()
