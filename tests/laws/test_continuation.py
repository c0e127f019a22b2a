"""A run goes on with its own config, its own data and its own tokenizer, or not at all; stopped, it has saved."""

import dataclasses
import json
import pathlib
from types import SimpleNamespace
from unittest import mock

import pytest
import tensorflow_datasets as tfds

from experiments import train as program
from experiments.inspect import same_tokens
from moe_jax.attention import MHA
from moe_jax.config import DataConfig, Experiment, OptimConfig, RunConfig
from moe_jax.continuation import ELSEWHERE, MAY_CHANGE, changes, check_config, check_data
from moe_jax.data import Folder, SentencePiece, Tfds, Translation
from moe_jax.data.identity import data_identity, keep_tokenizers, with_kept_tokenizers
from moe_jax.data.translation import ToyTranslation
from moe_jax.experts import MLP
from moe_jax.inspect.recorder import record_run
from moe_jax.inspect.run import TrainedRun, examples, open_run
from moe_jax.lock import WorkdirLock
from moe_jax.models import LMConfig
from moe_jax.optim import AdamW, Constant, Cosine
from moe_jax.train import train

MODEL = LMConfig(V=257, D=8, N=1, attention=MHA(1, 4), ffn=MLP(F=4), moe_layers="none", remat="none")
OPTIM = OptimConfig(schedule=Constant(0.01))
RUN = RunConfig(steps=9, log_every=5, eval_every=9, eval_sequences=8, save_every=9)


@pytest.fixture(scope="module")
def exp(tmp_path_factory) -> Experiment:
    """A small dense model on a folder of text."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(30):
        (folder / f"{i}.txt").write_text(" ".join(str((i * 7 + j) % 50) for j in range(60)))
    return Experiment(MODEL, DataConfig(source=Folder(str(folder)), L=8, B=8), OPTIM, RUN, (("data", 8),))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def records() -> list[dict]:
    """Records of the run below."""
    return []


@pytest.fixture(scope="module")
def begun(exp, data_dir, records, tmp_path_factory):
    """The workdir of a run that was asked to stop after its second step."""
    workdir = tmp_path_factory.mktemp("begun") / "run"
    records += train(exp, workdir, data_dir, None, lambda step: step == 2)
    (workdir / "config.json").write_text(exp.to_json())
    return workdir


def start(exp, workdir, data_dir) -> dict:
    """The first record of a continuation."""
    return next(train(exp, workdir, data_dir))


@pytest.mark.law(9)
def test_a_stopped_run_has_saved_its_last_step(exp, begun, data_dir, records):
    """Step 2 is on disk though nothing was due there, what it has trained is logged, and the run goes on from it."""
    assert [(record["kind"], record["step"]) for record in records] == [("start", 0), ("train", 2), ("interrupted", 2)]
    assert start(exp, begun, data_dir)["step"] == 2
    assert sorted(path.name for path in begun.iterdir()) == ["checkpoints", "config.json"], "no lock is left"


@pytest.mark.law(9)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 7}, "seed was 0, is 7"),
        ({"model": dataclasses.replace(MODEL, D=16)}, "model.D was 8, is 16"),
        ({"model": dataclasses.replace(MODEL, ffn=MLP(F=4, activation="relu"))}, "model.ffn was "),
        ({"optim": dataclasses.replace(OPTIM, optimizer=AdamW(b1=0.8))}, "optim.optimizer was "),
    ],
)
def test_another_config_is_refused(exp, begun, data_dir, change, words):
    """From Python too, where the shapes are the same and where they are not; nothing is touched."""
    before = sorted(begun.rglob("*"))
    with pytest.raises(ValueError, match=f"{begun} holds another run .*{words}"):
        start(dataclasses.replace(exp, **change), begun, data_dir)
    assert sorted(begun.rglob("*")) == before


@pytest.mark.law(9)
def test_a_lower_rate_is_possible_and_logged(exp, begun, data_dir):
    """Schedule and clip may change, to no clipping too, whose optimizer state is the same."""
    optim = OptimConfig(schedule=Cosine(0.001, warmup=3), clip=None)
    longer = dataclasses.replace(exp, optim=optim, run=dataclasses.replace(RUN, steps=20))
    first = start(longer, begun, data_dir)
    assert first["changed"] == {
        "optim.schedule": ["Constant(peak=0.01, warmup=0)", "Cosine(peak=0.001, warmup=3, floor=0.1)"],
        "optim.clip": [1.0, None],
        "run.steps": [9, 20],
    }
    assert "changed" not in start(exp, begun, data_dir)


def test_only_some_fields_may_change():
    old = {"seed": 0, "run": {"steps": 1}, "optim": {"zero1": False, "zero10": 1}, "model": {"remat": "full"}}
    new = {"seed": 1, "run": {"steps": 2}, "optim": {"zero1": True, "zero10": 2}, "model": {"remat": "none", "D": 8}}
    found = {change.path: change.within(MAY_CHANGE) for change in changes(old, new)}
    assert found == {
        "seed": False,
        "run.steps": True,
        "optim.zero1": True,
        "optim.zero10": False,
        "model.remat": True,
        "model.D": False,
    }
    assert {"optim.schedule", "optim.clip"} < set(MAY_CHANGE)
    (long,) = changes({"model": "x" * 1000}, {"model": "y" * 1000})
    assert len(str(long)) < 150


def test_a_point_of_a_sweep_keeps_its_rate(exp):
    """Led by hand it would not be what its folder says; it may move to another mesh."""
    saved = json.loads(exp.to_json())
    moved = dataclasses.replace(exp, mesh=(("data", 4), ("fsdp", 2)))
    assert {change.path for change in check_config(saved, moved, "sweep/a", ELSEWHERE)} == {"mesh.data", "mesh.fsdp"}
    other = dataclasses.replace(exp, optim=OptimConfig(schedule=Constant(0.02)))
    with pytest.raises(ValueError, match="sweep/a holds another run"):
        check_config(saved, other, "sweep/a", ELSEWHERE)


@pytest.mark.law(9)
def test_other_text_is_refused(exp, begun, data_dir):
    """A file more, and training, held-out examples of the run and recordings are refused until it is gone."""
    more = pathlib.Path(exp.data.source.path, "more.txt")
    more.write_text("one more text of the same kind, 1 2 3")
    try:
        for use in (
            lambda: start(exp, begun, data_dir),
            lambda: examples(open_run(begun), data_dir),
            lambda: record_run(begun, begun.parent / "recording", data_dir=data_dir),
            lambda: program.run(dataclasses.replace(exp, run=dataclasses.replace(RUN, steps=20)), begun, data_dir),
        ):
            with pytest.raises(ValueError, match=rf"data is not that of the run in {begun} \(train was '\w{{16}}', is"):
                use()
    finally:
        more.unlink()
    assert start(exp, begun, data_dir)["step"] == 2
    assert (begun / "config.json").read_text() == exp.to_json(), "the config of the run that is there"


@pytest.mark.law(9)
def test_one_run_at_a_time_trains_in_a_workdir(exp, begun, data_dir):
    with WorkdirLock(begun), pytest.raises(ValueError, match=f"{begun} is in use by process"):
        start(exp, begun, data_dir)


# ---- the identity of data


def test_what_differs_is_named():
    then = {"train": "a" * 64, "held_out": "b" * 64, "tokenizer": "c" * 64}
    check_data(then, dict(then), "run")
    check_data({}, then, "the run of an earlier version")
    with pytest.raises(ValueError, match=r"run in runs/a \(tokenizer was 'cccccccccccccccc', is 'dddddddddddddddd'\)"):
        check_data(then, {**then, "tokenizer": "d" * 64}, "runs/a")
    with pytest.raises(ValueError, match="tokenizer was 'cccccccccccccccc', is 'nothing'"):
        check_data(then, {"train": then["train"], "held_out": then["held_out"]}, "runs/a")


def test_another_version_of_a_data_set_is_other_data(monkeypatch):
    """By what TFDS says of it: the digests of a run's data follow its version, and are compared."""
    found = {"version": "1.0.0"}

    def builder(source):
        splits = {"train": SimpleNamespace(num_bytes=10, shard_lengths=[1])}
        name, features = f"lm/{found['version']}", {"text": tfds.features.Text()}
        made = mock.Mock(spec=tfds.core.DatasetBuilder)
        made.info = SimpleNamespace(full_name=name, features=features, splits=splits)
        return made

    monkeypatch.setattr("moe_jax.data.records.builder", builder)
    before = Tfds(name="lm").fingerprint(pathlib.Path())
    assert Tfds(name="lm").fingerprint(pathlib.Path()) == before
    found["version"] = "1.0.1"
    assert Tfds(name="lm").fingerprint(pathlib.Path()) != before


def test_a_tokenizer_belongs_to_its_run(tmp_path, monkeypatch):
    """Both tokenizers of a translation, kept, give the same ids where training them again would give others."""
    source = ToyTranslation(languages=2, words=12, sentences=200)
    data = DataConfig(source, SentencePiece(300), L=16, B=8, objective=Translation(source=SentencePiece(305)))
    first = data.prepare(tmp_path / "data")
    identity = data_identity(*first)
    assert set(identity) == {"train", "held_out", "tokenizer", "source_tokenizer"}
    workdir = tmp_path / "run"
    workdir.mkdir()
    assert with_kept_tokenizers(data, workdir) == data
    keep_tokenizers(first[0], workdir)
    assert sorted(path.name for path in workdir.iterdir()) == ["source_tokenizer.model", "tokenizer.model"]

    monkeypatch.setattr("moe_jax.data.tokenizers.TRAINED_ON", 2000)  # as another version of the library would
    again = data.prepare(tmp_path / "elsewhere")
    assert data_identity(*again)["tokenizer"] != identity["tokenizer"]
    own = with_kept_tokenizers(data, workdir)
    assert own.tokenizer.V == 300
    assert data_identity(*own.prepare(tmp_path / "elsewhere")) == identity

    (workdir / "tokenizer.model").write_bytes(b"nothing that can be read")
    with pytest.raises(ValueError, match=r"tokenizer.model is damaged"):
        with_kept_tokenizers(data, workdir).prepare(tmp_path / "elsewhere")
    keep_tokenizers(object(), workdir)
    assert list(workdir.iterdir()) == [], "another run's"


def test_runs_with_tokenizers_of_their_own_are_not_compared(exp):
    """The same config, trained on other text: the same ids mean other text."""
    one, other = (TrainedRun(exp, 1, {}, {}, None, {"train": i, "tokenizer": i}) for i in "ab")
    assert not same_tokens(one, other)
    assert same_tokens(one, other._replace(data={"train": "b", "tokenizer": "a"}))
    assert same_tokens(one, other._replace(data={})), "an earlier version did not say"
    assert not same_tokens(one, one._replace(exp=dataclasses.replace(exp, data=dataclasses.replace(exp.data, L=16))))
