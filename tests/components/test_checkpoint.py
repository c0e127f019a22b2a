"""Checkpoints: any mesh to any mesh, no wrong byte read, and no kill that costs more than the last step."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.checkpoint import MANIFEST, Checkpoints

OPTIMIZER = optax.adamw(1e-3)
META = {"data": {"position": 48, "epoch": 0}, "config": "LM(D=8)", "seed": 0}


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any


def a_mesh(x: int, y: int) -> Mesh:
    return Mesh(np.array(jax.devices()[: x * y]).reshape(x, y), ("x", "y"))


def a_state(step: int, mesh: Mesh | None = None, dtype=jnp.float32) -> State:
    """A state whose every number depends on the step, sharded, replicated and scalar leaves in it."""
    mesh = mesh or a_mesh(2, 4)
    up = step + jnp.arange(8 * 16, dtype=dtype).reshape(8, 16) / 7
    params = {
        "moe": {"up_EDF": jax.device_put(up, NamedSharding(mesh, PartitionSpec("x", "y")))},
        "bias_D": jax.device_put(jnp.full(3, step, jnp.bfloat16), NamedSharding(mesh, PartitionSpec())),
    }
    opt_state = OPTIMIZER.update(params, OPTIMIZER.init(params), params)[1]
    return State(jnp.array(step, jnp.int32), params, opt_state)


def abstract(state: State) -> State:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same(found: State, wanted: State) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def save_steps(directory: Path, *steps: int, **options) -> None:
    with Checkpoints(directory, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, a_state(step), META)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


@pytest.fixture(scope="session")
def two_steps(tmp_path_factory) -> Path:
    """A directory with steps 10 and 20; tests that change it take a copy."""
    directory = tmp_path_factory.mktemp("two_steps")
    save_steps(directory, 10, 20)
    return directory


@pytest.fixture
def copied(two_steps, tmp_path) -> Path:
    return Path(shutil.copytree(two_steps, tmp_path / "copied"))


@pytest.mark.law(9)
@pytest.mark.parametrize("shape", [(2, 4), (4, 2), (8, 1), (1, 1)])
def test_a_state_saved_on_one_mesh_is_restored_on_another(two_steps, shape):
    wanted = abstract(a_state(0, a_mesh(*shape)))
    state, meta, step = Checkpoints(two_steps).restore(wanted)
    assert (step, meta) == (20, META)
    assert_same(state, a_state(20))
    assert isinstance(state.opt_state[0], optax.ScaleByAdamState)
    assert state.params["moe"]["up_EDF"].sharding == wanted.params["moe"]["up_EDF"].sharding


def test_without_a_model_the_state_comes_as_numpy(two_steps):
    state, _, step = Checkpoints(two_steps).restore(step=10)
    assert step == 10
    assert type(state["params"]["moe"]["up_EDF"]) is np.ndarray
    np.testing.assert_array_equal(state["params"]["moe"]["up_EDF"], a_state(10).params["moe"]["up_EDF"])
    assert state["params"]["bias_D"].dtype == jnp.bfloat16
    assert set(state["opt_state"]["0"]) == {"count", "mu", "nu"}


def test_a_save_is_a_snapshot(tmp_path):
    """The next step overwrites donated buffers while the save is still being written."""
    state, wanted = a_state(3), a_state(3)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state, META)
        zeros = jax.jit(lambda s: jax.tree.map(jnp.zeros_like, s), donate_argnums=0, keep_unused=True)(state)
        jax.block_until_ready(zeros)
        assert_same(checkpoints.restore(abstract(wanted))[0], wanted)


def test_closing_at_once_finishes_the_save(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, a_state(1), META)
    checkpoints.close()
    assert Checkpoints(tmp_path).steps() == [1]


# ---- damage


def test_a_flipped_byte_in_any_file_is_noticed(copied, caplog):
    files = [path for path in (copied / "20" / "state").rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in [copied / "20" / MANIFEST, *files]:
        original = path.read_bytes()
        flip(path)
        state, _, step = Checkpoints(copied).restore(abstract(a_state(0)))
        assert step == 10
        assert_same(state, a_state(10))
        assert str(copied / "20") in caplog.records[-1].getMessage()
        assert path.name in caplog.records[-1].getMessage()
        with pytest.raises(ValueError, match="damaged"):
            Checkpoints(copied).restore(abstract(a_state(0)), step=20)
        path.write_bytes(original)
    assert len(caplog.records) == len(files) + 1
    assert Checkpoints(copied).restore()[2] == 20


def test_files_without_a_checksum_hold_nothing_that_is_read(copied):
    """Orbax writes two files after the manifest; whatever they say, the numbers are right."""
    listed = json.loads((copied / "20" / MANIFEST).read_text())["files"]
    others = [p for p in (copied / "20").rglob("*") if p.is_file() and str(p.relative_to(copied / "20")) not in listed]
    assert {path.name for path in others} <= {MANIFEST, "_CHECKPOINT_METADATA", "commit_success.txt"}
    for path in others:
        if path.name != MANIFEST:
            path.write_text("garbage")
    state, _, step = Checkpoints(copied).restore(abstract(a_state(0)))
    assert step == 20
    assert_same(state, a_state(20))


@pytest.mark.parametrize("damage", ["no manifest", "no file", "shorter file"])
def test_a_step_that_is_not_whole_is_not_listed_and_skipped(copied, damage, caplog):
    path = copied / "20" / ("manifest.json" if damage == "no manifest" else "state/manifest.ocdbt")
    if damage == "shorter file":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    assert Checkpoints(copied).steps() == [10]
    assert Checkpoints(copied).restore()[2] == 10
    assert len(caplog.records) == 1


def test_when_nothing_valid_is_left_it_says_so(copied):
    for step in (10, 20):
        flip(copied / str(step) / "state" / "manifest.ocdbt")
    assert not Checkpoints(copied).empty()
    with pytest.raises(ValueError, match=r"no checkpoint in .* is valid .*manifest\.ocdbt"):
        Checkpoints(copied).restore()


def test_a_missing_checkpoint_is_refused(tmp_path, two_steps):
    assert Checkpoints(tmp_path / "none").empty()
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="there is no checkpoint in"):
        Checkpoints(tmp_path / "none").restore()
    with pytest.raises(ValueError, match=r"there is no step 15 .* one of \[10, 20\]"):
        Checkpoints(two_steps).restore(step=15)


# ---- a state that is not the one asked for


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s._replace(step=jax.ShapeDtypeStruct((), jnp.float32)),
            r"step as int32\[\] .* float32\[\]",
        ),
        (
            lambda s: s._replace(step=jax.ShapeDtypeStruct((2,), jnp.int32)),
            r"step as int32\[\] .* int32\[2\]",
        ),
        (lambda s: s._replace(params={**s.params, "new": s.step}), "params/new as nothing"),
        (lambda s: s._replace(params={"moe": s.params["moe"]}), r"params/bias_D as bfloat16\[3\] .* nothing"),
    ],
)
def test_a_leaf_that_differs_is_named(two_steps, change, message):
    with pytest.raises(ValueError, match=message):
        Checkpoints(two_steps).restore(change(abstract(a_state(0))))


# ---- what is kept


def test_the_last_and_the_best_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep_last=2, keep_best=1) as checkpoints:
        for step, loss in [(1, 3.0), (2, 1.0), (3, 2.0), (4, float("nan")), (5, None), (6, 1.5)]:
            checkpoints.save(step, a_state(step), META, loss)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps() == [2, 5, 6]
    assert checkpoints.best() == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "5", "6"]
    assert_same(checkpoints.restore(abstract(a_state(0)), step=2)[0], a_state(2))


def test_a_loss_that_is_not_a_number_is_not_the_best(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, a_state(1), META, float("nan"))
        checkpoints.wait()
        assert checkpoints.best() is None
        checkpoints.save(2, a_state(2), META, 9.0)
        checkpoints.wait()
        assert checkpoints.best() == 2


def test_the_remains_of_a_killed_save_go_with_the_next_one(copied):
    (copied / "30.orbax-checkpoint-tmp").mkdir()
    assert Checkpoints(copied).steps() == [10, 20]
    save_steps(copied, 40)
    assert not (copied / "30.orbax-checkpoint-tmp").exists()


def test_a_damaged_step_does_not_push_out_the_last_valid_one(copied):
    flip(copied / "20" / "state" / "manifest.ocdbt")
    with Checkpoints(copied, keep_last=2, keep_best=0) as checkpoints:
        assert checkpoints.restore()[2] == 10
        checkpoints.save(30, a_state(30), META)
        checkpoints.wait()
        assert checkpoints.steps() == [10, 30]


def test_a_kill_during_deletion_leaves_nothing_listed(copied, monkeypatch):
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # killed between rename and removal
    save_steps(copied, 30, keep_last=1, keep_best=0)
    assert Checkpoints(copied).steps() == [30]
    assert (copied / "deleted-10").exists()
    monkeypatch.undo()
    save_steps(copied, 40, keep_last=1, keep_best=0)
    assert [path.name for path in copied.iterdir()] == ["40"]


def test_a_valid_step_is_never_overwritten_and_a_damaged_one_is(copied):
    with Checkpoints(copied) as checkpoints:
        with pytest.raises(ValueError, match="step 20 is already saved"):
            checkpoints.save(20, a_state(21), META)
        assert_same(checkpoints.restore(abstract(a_state(0)))[0], a_state(20))
        flip(copied / "20" / "state" / "manifest.ocdbt")
        assert checkpoints.restore()[2] == 10
        checkpoints.save(20, a_state(21), META)
        state, _, step = checkpoints.restore(abstract(a_state(0)))
        assert step == 20
        assert_same(state, a_state(21))


def test_a_failed_save_is_not_silent(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)

    def disk_full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", disk_full)
    checkpoints.save(1, a_state(1), META)
    with pytest.raises(OSError, match="no space left"):
        checkpoints.wait()
    monkeypatch.undo()
    assert checkpoints.steps() == []
    checkpoints.save(1, a_state(1), META)
    checkpoints.close()
    assert checkpoints.steps() == [1]


@pytest.mark.parametrize("bad", [{"x": {1, 2}}, {"x": float("nan")}])
def test_meta_that_is_not_json_is_refused(tmp_path, bad):
    with pytest.raises(ValueError, match="meta of a checkpoint must be JSON"):
        Checkpoints(tmp_path).save(1, a_state(1), bad)
    assert Checkpoints(tmp_path).empty()


def test_wrong_arguments():
    with pytest.raises(ValueError, match="keep_last must be at least 1"):
        Checkpoints("x", keep_last=0)
    with pytest.raises(ValueError, match="mount the bucket"):
        Checkpoints("gs://bucket/run")


# ---- SIGKILL

SAVER = """
import sys, jax, jax.numpy as jnp
jax.config.update("jax_platforms", "cpu")
from moe_jax.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1], keep_last=2)
for step in range(1, 10_000):
    checkpoints.save(step, {"x": jnp.full((512, 1024), step, jnp.float32)}, {"step": step})
    print(step, flush=True)
"""


@pytest.mark.law(9)
def test_sigkill_during_a_save_leaves_a_whole_older_step(tmp_path):
    step = 4
    saver = subprocess.Popen([sys.executable, "-c", SAVER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert saver.stdout
        while int(saver.stdout.readline()) < step:
            pass
    finally:
        saver.send_signal(signal.SIGKILL)
        saver.wait()
    with Checkpoints(tmp_path) as checkpoints:
        state, meta, restored = checkpoints.restore()
        assert restored >= step - 1
        assert meta == {"step": restored}
        np.testing.assert_array_equal(state["x"], np.full((512, 1024), restored, np.float32))
        checkpoints.save(restored + 1, {"x": jnp.zeros(2)}, {})
    assert all(path.name.isdecimal() for path in tmp_path.iterdir())
