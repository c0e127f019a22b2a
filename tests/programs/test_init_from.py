"""A run that begins with another's parameters takes those that fit, says which, and does not need the other again."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from experiments import train as program
from moe_jax import transfer
from moe_jax.checkpoint import Checkpoints
from moe_jax.config import build
from moe_jax.files import sha256
from moe_jax.reporting.metrics import read
from moe_jax.train import train
from moe_jax.transfer import RunCheckpoint
from tests import programs

CONFIG = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({config!r})
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A sparse model of two steps on a few texts, on eight shards; its router remembers biases."""
    texts = tmp_path_factory.mktemp("texts")
    for i in range(12):
        (texts / f"{i}.txt").write_text(f"text number {i}, " * 20)
    moe = {"E": 4, "router": "LossFree(K=2)", "experts": "MLP(F=8)", "dispatch": "Scatter(2.0)", "losses": ()}
    model = {
        "D": 8,
        "N": 1,
        "moe_layers": "all",
        "attention": "MHA(1, 4)",
        "ffn": "MLP(F=4)",
        "remat": "none",
        "moe": moe,
    }
    data = {"source": f"Folder(path={str(texts)!r})", "L": 8, "B": 8}
    run = {"steps": 2, "log_every": 1, "eval_every": 2, "save_every": 1, "eval_sequences": 8, "keep_last": 3}
    return {"model": model, "data": data, "optim": {"schedule": "Constant(0.01)"}, "run": run, "mesh": {"data": 8}}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def old(config, data_dir, tmp_path_factory) -> pathlib.Path:
    """The workdir of the run whose parameters are taken."""
    workdir = tmp_path_factory.mktemp("old") / "run"
    workdir.mkdir()
    exp = build(config)
    (workdir / "config.json").write_text(exp.to_json())
    assert [record["step"] for record in train(exp, workdir, data_dir) if record["kind"] == "train"] == [1, 2]
    return workdir


def state_of(workdir: pathlib.Path, step: int) -> dict[str, np.ndarray]:
    """All leaves of a checkpoint by their names."""
    state = Checkpoints(workdir / "checkpoints").restore(step=step)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in jax.tree.leaves_with_path(state)}


def changed(config, mesh=None, run=None, **moe):
    """The experiment with other fields of its MoE layers, on another mesh."""
    model = {**config["model"], "moe": {**config["model"]["moe"], **moe}}
    return build({**config, "model": model, "mesh": mesh or config["mesh"], "run": {**config["run"], **(run or {})}})


def flags(exp, tmp_path, data_dir) -> list[str]:
    (tmp_path / "config.py").write_text(CONFIG.format(config=json.loads(exp.to_json())))
    return [f"--config={tmp_path / 'config.py'}", f"--data_dir={data_dir}"]


def test_parameters_are_taken_and_nothing_else(config, old, data_dir, tmp_path):
    """On another mesh, bit by bit, from the step that is asked for; the new run goes on without the old one."""
    copy, workdir = pathlib.Path(shutil.copytree(old, tmp_path / "copy")), tmp_path / "new"
    exp = dataclasses.replace(changed(config, {"data": 2, "expert": 4}), seed=7)
    given = [*flags(exp, tmp_path, data_dir), f"--workdir={workdir}"]
    outcome = programs.call(program, *given, f"--init_from={copy}@1")
    assert outcome.code == 0, outcome
    there, before, after = state_of(old, 1), state_of(workdir, 0), state_of(workdir, 2)
    params = [name for name in there if name.startswith("params/")]
    assert f"{len(params)} of {len(params)} parameters taken from {copy} step 1\n" in outcome.err
    for name in there:
        if name in params:
            np.testing.assert_array_equal(before[name], there[name])
        else:
            assert not np.any(before[name]), f"{name} begins anew"
    assert any(np.any(there[name]) for name in there if name.startswith("router/")), "the other's routers remember"
    assert any(np.any(there[name] != after[name]) for name in params), "the run has trained"
    first = read(workdir)[0]
    manifest = old / "checkpoints" / "1" / "manifest.json"
    assert Checkpoints(workdir / "checkpoints").restore()[1]["origin"] == first["origin"], "in every checkpoint"
    assert first["origin"] == {
        "run": str(copy),
        "step": 1,
        "checksum": sha256(manifest),
        "taken": len(params),
        "not_taken": {},
        "unused": [],
    }

    shutil.rmtree(copy)
    shutil.rmtree(workdir / "checkpoints" / "2")  # interrupted
    for source in (None, RunCheckpoint(copy), RunCheckpoint(copy, 1)):
        start = next(train(exp, workdir, data_dir, source))
        assert {**start, "seconds": 0} == {**first, "step": 1, "seconds": 0}
    for source, words in (
        (f"{old}@1", f"began with the parameters of {copy} step 1"),
        (f"{copy}@2", "step 1, not with"),
    ):
        error = programs.call(program, *given, f"--init_from={source}").error
        assert words in error


def test_what_does_not_fit_is_said(config, old):
    """Absent, of another shape, unused; refused where nothing fits."""
    exp = changed(config, E=8, shared="MLP(F=8)", router="TopK(K=2)")
    program = transfer.Program(exp)
    state, origin = transfer.begin_from(program, RunCheckpoint(old))
    there, fresh = state_of(old, 2), program.init()
    assert origin["step"] == 2, "the newest"
    here = transfer._by_name(state.params)
    ours = transfer._by_name(fresh.params)
    for name, leaf in here.items():
        if name in origin["not_taken"]:
            np.testing.assert_array_equal(leaf, ours[name])
        else:
            np.testing.assert_array_equal(leaf, there[f"params/{name}"])
            assert leaf.sharding == ours[name].sharding
    why = origin["not_taken"]
    assert origin["taken"] + len(why) == len(here)
    assert {reason for name, reason in why.items() if "shared" in name} == {"absent there"}
    gate = next(name for name in why if name.endswith("gate_DE"))
    assert why[gate] == "shape [1, 8, 4] there, [1, 8, 8] here"
    words = transfer.describe_origin(origin)
    assert words.startswith(f"{origin['taken']} of {len(here)} parameters taken from {old} step 2; not taken: ")
    assert f"{gate} (shape [1, 8, 4] there, [1, 8, 8] here)" in words


def test_unused_parameters_are_said():
    many = {f"p{i}": "absent there" for i in range(9)}
    origin = {"run": "/x", "step": 3, "taken": 1, "not_taken": many, "unused": ["a", "b"]}
    words = transfer.describe_origin(origin)
    assert words.startswith("1 of 10 parameters taken from /x step 3; not taken: p0 (absent there), p1")
    assert words.endswith("p5 (absent there) and 3 more; unused there: a, b")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{old}@last", ["'last' is no step", "@600"]),
        ("{old}@3", ["there is no step 3", "[1, 2]"]),
        ("{tmp}/none", ["there is no checkpoint in"]),
        ("{broken}@2", ["checkpoint", "is damaged", "checksum"]),
        ("{narrow}", ["No parameter fits of", "step 2", "shape [", "give a run of a similar model"]),
        ("{own}", ["is the --workdir itself"]),
    ],
)
def test_refused_before_anything_is_deleted(source, words, config, old, data_dir, tmp_path):
    """With --overwrite, the older run in the workdir is still there."""
    broken, own = pathlib.Path(shutil.copytree(old, tmp_path / "broken")), tmp_path / "own"
    shutil.copytree(old, own)
    largest = max(
        (broken / "checkpoints" / "2").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0
    )
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 0x10
    largest.write_bytes(data)
    exp = build(config) if source != "{narrow}" else build({**config, "model": {**config["model"], "D": 16}})
    before = {path: path.read_bytes() for path in own.rglob("*") if path.is_file()}
    given = [*flags(exp, tmp_path, data_dir), f"--workdir={own}", "--overwrite"]
    where = source.format(old=old, tmp=tmp_path, broken=broken, own=own, narrow=old)
    error = programs.call(program, *given, f"--init_from={where}").error
    for word in words:
        assert word in error
    assert {path: path.read_bytes() for path in own.rglob("*") if path.is_file()} == before


def test_a_run_of_its_own_is_not_begun_again(config, old, data_dir, tmp_path):
    """With the flag given later, which would mean another run."""
    own = shutil.copytree(old, tmp_path / "own")
    given = [*flags(build(config), tmp_path, data_dir), f"--workdir={own}", f"--init_from={old}"]
    assert "began with parameters of its own" in programs.call(program, *given).error
