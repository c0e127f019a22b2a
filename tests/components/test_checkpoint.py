"""Checkpoints: any mesh to any mesh, no wrong byte read, and no kill that costs more than the last step."""

import json
import logging
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

from moe_jax import checkpoint as checkpointing
from moe_jax.checkpoint import MANIFEST, Checkpoints, NotFinite
from moe_jax.files import write_sealed
from moe_jax.room import DiskFull

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


def sealed(path: Path, **changes) -> None:
    """Writes a manifest anew, with a right checksum; None leaves a key out."""
    content = {**json.loads(path.read_text()), **changes}
    write_sealed(path, {k: v for k, v in content.items() if k != "sha256" and v is not None})


WRONG_KINDS = {  # of the folder of step 30: how it comes about, and what is said
    "a file": (lambda at: at.write_text("step"), "it is a file, not a folder"),
    "an empty folder": (lambda at: at.mkdir(), "manifest.json is missing"),
    "a link to nothing": (lambda at: at.symlink_to("nowhere"), "manifest.json is missing"),
    "a copy of another step": (lambda at: shutil.copytree(at.parent / "10", at), "manifest.json is that of step 10"),
    "a link to another step": (lambda at: at.symlink_to("10"), "manifest.json is that of step 10"),
}
WRONG_MANIFESTS = {
    "null": (lambda at: at.write_text("null"), "manifest.json is damaged"),
    "a list": (lambda at: at.write_text("[1]"), "manifest.json is damaged"),
    "deep": (lambda at: at.write_text("[" * 100_000), "manifest.json is damaged"),
    "deep and closed": (lambda at: at.write_text("[" * 100_000 + "]" * 100_000), "manifest.json is damaged"),
    "a folder": (lambda at: (at.unlink(), at.mkdir()), "manifest.json cannot be read (Is a directory)"),
    "no files": (lambda at: sealed(at, files=None), "manifest.json lacks what a manifest says"),
    "files are a list": (lambda at: sealed(at, files=[1]), "manifest.json lacks what a manifest says"),
    "a file without a size": (lambda at: sealed(at, files={"state/a": "x"}), "lacks what a manifest says"),
    "a file elsewhere": (lambda at: sealed(at, files={"../../a": [1, "x"]}), "lacks what a manifest says"),
    "no meta": (lambda at: sealed(at, meta=None), "manifest.json lacks what a manifest says"),
    "no leaves": (lambda at: sealed(at, leaves={"a": 3}), "manifest.json lacks what a manifest says"),
    "a loss in words": (lambda at: sealed(at, loss="low"), "manifest.json lacks what a manifest says"),
    "another step's": (lambda at: sealed(at, step=10), "manifest.json is that of step 10"),
}


@pytest.mark.parametrize("kind", [*WRONG_KINDS, *WRONG_MANIFESTS])
def test_what_is_no_step_among_the_steps_costs_only_itself(copied, kind, caplog):
    """The newest step is of a wrong kind: an older one is valid and is restored, and the next save goes on."""
    if kind in WRONG_KINDS:
        make, said = WRONG_KINDS[kind]
        make(copied / "30")
    else:
        shutil.copytree(copied / "20", copied / "30")
        sealed(copied / "30" / MANIFEST, step=30)
        make, said = WRONG_MANIFESTS[kind]
        make(copied / "30" / MANIFEST)
    with Checkpoints(copied, keep_last=2) as checkpoints:
        assert checkpoints.steps() == [10, 20]
        assert checkpoints.newest_meta() == (META, 20)
        assert checkpoints.best() is None
        assert checkpoints.restore()[2] == 20
        assert said in caplog.text
        with pytest.raises(ValueError, match=r"30 is damaged \("):
            checkpoints.restore(step=30)
        checkpoints.save(30, {"x": jnp.ones(2)}, {})
        checkpoints.wait()
        assert checkpoints.steps() == [20, 30]
    assert sorted(path.name for path in copied.iterdir()) == ["20", "30"]


@pytest.mark.parametrize("name", ["020", "٣٠", "99999999999", "30.orbax-checkpoint-tmp", "-30", "1e1"])
def test_a_name_that_no_step_has(copied, name):
    """Python reads "020" and "٣٠" as numbers, whose folders are not there; a step is counted in 32 bits."""
    shutil.copytree(copied / "20", copied / name)
    with Checkpoints(copied) as checkpoints:
        assert checkpoints.steps() == [10, 20]
        assert checkpoints.restore()[2] == 20
    assert (copied / name).exists()


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


def test_what_came_after_a_step_is_discarded(copied):
    """All of it, damaged or under way; steps of its numbers may be saved again."""
    shutil.copytree(copied / "20", copied / "25")
    with Checkpoints(copied) as checkpoints:
        assert checkpoints.discard_after(30) == 20
        checkpoints.save(30, a_state(30), META)
        assert checkpoints.discard_after(19) == 10
        assert [path.name for path in copied.iterdir()] == ["10"]
        checkpoints.save(20, a_state(21), META)
        assert_same(checkpoints.restore(abstract(a_state(0)))[0], a_state(21))
        assert checkpoints.discard_after(0) is None
        assert checkpoints.empty()


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


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device")],
)
def test_a_full_disk_says_what_is_whole_and_what_a_step_takes(copied, monkeypatch, error, capfd):
    takes = sum(path.stat().st_size for path in (copied / "20" / "state").rglob("*") if path.is_file())

    def disk_full(*_, **__):
        raise error

    with Checkpoints(copied) as checkpoints:
        checkpoints.save(30, a_state(30), META)
        checkpoints.wait()
        monkeypatch.setattr(checkpointing, "write_manifest", disk_full)
        checkpoints.save(40, a_state(40), META)
        with pytest.raises(DiskFull) as full:
            checkpoints.wait()
        assert checkpoints.steps() == [20, 30]
        assert [path.name for path in copied.glob("40*")] == [], "what was written of it takes no room any more"
        monkeypatch.undo()
        checkpoints.save(40, a_state(40), META)
    assert Checkpoints(copied).steps() == [30, 40]
    said = str(full.value)
    assert full.value.errno == 28
    assert said.startswith(f"no space left on device for step 40: a step takes {takes / 1e6:.1f} MB, and ")
    assert said.endswith("; step 30 is whole; make room, and the same command goes on from there")
    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_task_that_fails_in_orbax_is_not_told_by_asyncio(tmp_path, caplog):
    """Such an error is raised, once; tasks of others are told as ever."""
    save_steps(tmp_path, 1)
    asyncio = logging.getLogger("asyncio")
    asyncio.error("Task exception was never retrieved\nfuture: <coro=<serialize() at /orbax/serialization.py:126>>")
    assert caplog.records == []
    asyncio.error("Task exception was never retrieved\nfuture: <Task coro=<mine() at /mine.py:1>>")
    assert len(caplog.records) == 1


def test_a_full_disk_before_the_first_checkpoint(tmp_path, monkeypatch):
    """A step then takes what its arrays have: 200,000 float32 and 3 bfloat16."""
    state = {"x": jnp.zeros((2, 100, 1000)), "y": jnp.zeros(3, jnp.bfloat16)}

    def disk_full(*_, **__):
        raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr(checkpointing, "write_manifest", disk_full)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {})
    with pytest.raises(DiskFull, match=r"for step 1: a step takes 0\.8 MB, .*; no checkpoint is whole yet; make room"):
        checkpoints.close()


# ---- what is not saved


@pytest.mark.parametrize(
    ("leaf", "value"),
    [("params/moe/up_EDF", np.nan), ("params/bias_D", -np.inf), ("opt_state/0/nu/moe/up_EDF", np.inf), ("x", np.nan)],
)
def test_a_state_that_is_not_finite_is_refused(copied, leaf, value):
    """In one value of one leaf, sharded, replicated or of numpy, of parameters or of the optimizer."""

    def spoil(path, x):
        if jax.tree_util.keystr(path, simple=True, separator="/") != leaf:
            return x
        return np.array([1.0, value]) if leaf == "x" else x.at[(0,) * x.ndim].set(value)

    state = jax.tree_util.tree_map_with_path(spoil, {"x": np.array([1.0, 2.0])} | a_state(1)._asdict())
    with Checkpoints(copied) as checkpoints:
        with pytest.raises(NotFinite, match=rf"^step 30 is not saved: {leaf} has 1 of \d+ values that are not finite$"):
            checkpoints.save(30, state, META)
        assert checkpoints.steps() == [10, 20]


def test_all_that_is_not_finite_is_counted(tmp_path):
    state = {"b": jnp.full((2, 600), jnp.nan), "a": jnp.ones(3), "c": jnp.array([1, jnp.inf]), "n": jnp.arange(3)}
    with pytest.raises(NotFinite, match=r"b \(and 1 more\) has 1,200 of 1,200 values"):
        Checkpoints(tmp_path).save(1, state, {})
    assert list(tmp_path.iterdir()) == []


def test_two_leaves_of_one_name_are_refused(tmp_path):
    """Saved under one name, one of them would be lost."""
    with pytest.raises(ValueError, match="two leaves of the state have the same name"):
        Checkpoints(tmp_path).save(1, {"a/b": jnp.ones(2), "a": {"b": jnp.zeros(2)}}, {})


@pytest.mark.parametrize("name", ["lr[0.1]", "a\\b", "a*b", "why?", "x[y/z", "**", "surrogate\udcff"])
def test_a_path_that_orbax_takes_for_a_pattern_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"^checkpoints (cannot be kept in|need a path in UTF-8)"):
        Checkpoints(tmp_path / name / "checkpoints").save(1, {"x": jnp.arange(3.0)}, {})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_above_counts_too(tmp_path, monkeypatch):
    """The path is relative, and is refused before training all the same."""
    (tmp_path / "[project]").mkdir()
    monkeypatch.chdir(tmp_path / "[project]")
    with pytest.raises(ValueError, match="cannot be kept in"):
        checkpointing.check_path("runs/a")


def test_a_run_that_was_moved_to_such_a_path_is_read(two_steps, tmp_path):
    moved = shutil.copytree(two_steps, tmp_path / "run [1]*?" / "checkpoints")
    assert_same(Checkpoints(moved).restore(abstract(a_state(0)))[0], a_state(20))
    assert Checkpoints(moved).newest_meta() == (META, 20)


@pytest.mark.parametrize("name", ["lr 0.1", "lr{0.1,0.2}", "größe", "$HOME~#%20;'"])
def test_other_paths_work(tmp_path, name):
    with Checkpoints(tmp_path / name) as checkpoints:
        checkpoints.save(1, {"x": jnp.arange(3.0)}, {})
    np.testing.assert_array_equal(Checkpoints(tmp_path / name).restore()[0]["x"], [0, 1, 2])


@pytest.mark.parametrize("name", ["lr[0.1]", "a\\b"])
def test_what_was_saved_is_opened_before_it_is_certified(tmp_path, monkeypatch, name):
    """At these paths orbax says that it has saved, and there are no arrays."""
    monkeypatch.setattr(checkpointing, "check_path", lambda *_: None)
    checkpoints = Checkpoints(tmp_path / name / "checkpoints")
    checkpoints.save(1, {"x": jnp.arange(8.0)}, {})
    with pytest.raises(OSError, match=r"what was written to \S+ cannot be opened"):
        checkpoints.close()
    assert checkpoints.steps() == []


def test_an_array_of_another_shape_is_not_certified(tmp_path, monkeypatch):
    nest = checkpointing._nest
    monkeypatch.setattr(checkpointing, "_nest", lambda leaves: nest({name: x[:5] for name, x in leaves.items()}))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"x": jnp.arange(8.0)}, {})
    with pytest.raises(OSError, match=r"has float32\[5\] for x, not float32\[8\]"):
        checkpoints.close()
    assert checkpoints.steps() == []


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
