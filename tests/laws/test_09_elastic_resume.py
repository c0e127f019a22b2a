"""Elastic resumption: a run saved on one mesh, by some processes, goes on elsewhere as if it had never moved."""

import dataclasses
import functools
import math
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from experiments.launch.supervisor import free_port
from moe_jax import MLP, Adaptive, LoadBalance, LossFree, MoEConfig, Scatter, Sinkhorn, Sort, Temperature
from moe_jax import checkpoint as checkpointing
from moe_jax.checkpoint import Checkpoints
from moe_jax.config import Experiment, OptimConfig
from moe_jax.core import dims
from moe_jax.data import Batch
from moe_jax.exchanges import AllGather, AllToAll, RaggedAllToAll, TwoLevel
from moe_jax.optim import Adafactor, AdamW, Constant
from moe_jax.reporting import metrics as log
from moe_jax.step import Program, State
from tests.cases import sizes_of
from tests.laws.test_training_step import EXP, MODEL, batch

ROOT = pathlib.Path(__file__).parents[2]
matrix = pytest.mark.matrix
compiled_once = pytest.mark.xdist_group("elastic")  # by one of several pytest processes


class Place(NamedTuple):
    """Settings that may change with the mesh when a run goes on elsewhere."""

    zero1: bool = False
    remat: str = "none"
    exchange: Any = AllToAll()
    dispatch: Any = Scatter(4.0)  # room for everything, as Sort() has


PLACES = {
    "d2e4": Place(zero1=True, remat="save_collectives", exchange=AllToAll(chunks=2)),
    "f2e2t2": Place(remat="full", exchange=AllGather()),
    "s2e2t2": Place(exchange=TwoLevel()),
    "f2e2": Place(zero1=True),
    "e2": Place(exchange=RaggedAllToAll(), dispatch=Sort()),
    "d1": Place(),
}
MOE = MoEConfig(E=8, experts=MLP(F=8), gating=(Temperature(2.0, 0.5, 6),), losses=())
MOES = {
    "adamw": dataclasses.replace(MOE, router=LossFree(K=2, rate=0.1), losses=(Adaptive(LoadBalance(0.01)),)),
    "adafactor": dataclasses.replace(MOE, router=Sinkhorn(K=2, iterations=1)),
}
OPTIMIZERS = {"adamw": AdamW(), "adafactor": Adafactor(smallest=4)}
MESHES = {"adamw": tuple(PLACES), "adafactor": ("d2e4", "f2e2t2", "d1")}
PAIRS = [(optimizer, old, new) for optimizer, meshes in MESHES.items() for old in meshes for new in meshes]
QUICK = ("adamw", "f2e2", "d1")
BEFORE, AFTER = 3, 3  # steps


def experiment(optimizer: str, mesh: str) -> Experiment:
    place = PLACES[mesh]
    moe = dataclasses.replace(MOES[optimizer], exchange=place.exchange, dispatch=place.dispatch)
    model = dataclasses.replace(MODEL, moe=moe, remat=place.remat, causal=moe.causal)
    optim = OptimConfig(OPTIMIZERS[optimizer], Constant(0.01), zero1=place.zero1)
    return dataclasses.replace(EXP, model=model, optim=optim, mesh=tuple(sizes_of(mesh).items()))


@functools.cache
def program(optimizer: str, mesh: str) -> Program:
    devices = jax.devices()[: math.prod(sizes_of(mesh).values())]
    return Program(experiment(optimizer, mesh), devices=devices)


@functools.cache
def beginning(optimizer: str) -> State:
    """On the host, the same for all meshes."""
    return jax.device_get(program(optimizer, "d1").init())


def rows(step: int) -> Batch:
    """Other ones at every step."""
    same = batch()
    tokens_BL, target_BL = ((x + 7 * step) % MODEL.V for x in (same.tokens_BL, same.target_BL))
    return same._replace(tokens_BL=tokens_BL, target_BL=target_BL)


def go_on(here: Program, state: State, steps: int) -> tuple[State, np.ndarray]:
    """The state after so many steps, and of each its loss, auxiliary loss and norm of the gradient."""
    seen = []
    for _ in range(steps):
        state, metrics = here.step(state, rows(int(state.step)))
        seen.append([metrics.loss, metrics.aux_loss, metrics.grad_norm])
    return state, np.array(jax.device_get(seen))


def named(tree: Any) -> dict[str, Any]:
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def same_bits(found: Any, wanted: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for (name, a), b in zip(named(jax.device_get(found)).items(), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name, strict=True)


class Run(NamedTuple):
    """An uninterrupted run, and what it left behind after `BEFORE` steps."""

    folder: pathlib.Path
    saved: State  # on the host, as `end`
    parts: dict[str, list[np.ndarray]]  # of each leaf, by device
    end: State
    seen: np.ndarray  # after that


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Callable[[str, str], Run]:
    @functools.cache
    def run(optimizer: str, mesh: str) -> Run:
        here, folder = program(optimizer, mesh), tmp_path_factory.mktemp(f"{optimizer}_{mesh}")
        state, _ = go_on(here, jax.device_put(beginning(optimizer), here.shardings), BEFORE)
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(BEFORE, state, {})
        parts = {name: [np.array(part.data) for part in x.addressable_shards] for name, x in named(state).items()}
        saved = jax.device_get(state)
        end, seen = go_on(here, state, AFTER)
        return Run(folder, saved, parts, jax.device_get(end), seen)

    return run


@pytest.mark.law(9)
@compiled_once
@pytest.mark.parametrize(
    ("optimizer", "old", "new"), [pytest.param(*pair, marks=() if pair == QUICK else matrix) for pair in PAIRS]
)
def test_a_run_goes_on_elsewhere(run, optimizer, old, new):
    """Every leaf is restored bit for bit; the steps after it are the uninterrupted run's, bit for bit on its mesh."""
    there, whole = program(optimizer, new), run(optimizer, old)
    with Checkpoints(whole.folder) as checkpoints:
        state, _, step = checkpoints.restore(there.abstract_state())
    assert step == BEFORE
    same_bits(state, whole.saved)
    assert jax.tree.map(lambda x: x.sharding, state) == there.shardings
    state, seen = go_on(there, state, AFTER)
    if old == new:
        np.testing.assert_array_equal(seen, whole.seen)
        same_bits(state, whole.end)
    else:
        np.testing.assert_allclose(seen, whole.seen, rtol=1e-5)
        for name, x in named(state.router).items():
            np.testing.assert_allclose(x, named(whole.end.router)[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.law(9)
@compiled_once
@matrix
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_nothing_that_is_saved_is_idle(run, optimizer):
    """Without any part of the state the run goes on otherwise, so that the pairs above would not pass."""
    here, whole, fresh = program(optimizer, "d1"), run(optimizer, "d1"), beginning(optimizer)
    lost = [{"params": fresh.params}, {"opt_state": fresh.opt_state}]
    lost += [{"router": whole.saved.router | {name: x}} for name, x in fresh.router.items()]
    assert len(lost) == {"adamw": 5, "adafactor": 4}[optimizer]
    for part in lost:
        _, seen = go_on(here, jax.device_put(whole.saved._replace(**part), here.shardings), AFTER)
        assert not np.allclose(seen, whole.seen, rtol=1e-4), part


# ---- what a device holds

MOMENTS, UP, OUT = "opt_state/1/0/", "stack_0/moe_1/up_EDF", "stack_0/attention_0/out_HAD"
HELD = {  # by a device: shapes, and bytes of all parameters and of the optimizer's state
    ("adamw", "f2e2t2"): {  # stage 3: parameters too
        "params/embed_VD": (257, 4),
        "params/" + UP: (1, 4, 4, 4),
        MOMENTS + "mu/embed_VD": (257, 4),
        MOMENTS + "mu/" + UP: (1, 4, 4, 4),
        MOMENTS + "nu/" + OUT: (1, 1, 4, 4),
        "params": 5_744,
        "opt_state": 11_496,
    },
    ("adamw", "d2e4"): {  # stage 1: only what the optimizer remembers
        "params/embed_VD": (257, 8),
        "params/" + UP: (1, 2, 8, 8),
        MOMENTS + "mu/embed_VD": (257, 1),
        MOMENTS + "mu/" + UP: (1, 2, 4, 8),
        MOMENTS + "nu/" + OUT: (1, 2, 4, 1),
        "params": 12_480,
        "opt_state": 4_624,
    },
    ("adafactor", "f2e2t2"): {
        MOMENTS + "v_row/embed_VD": (4,),  # its sums over V
        MOMENTS + "v_col/embed_VD": (257,),
        MOMENTS + "v_row/" + UP: (1, 4, 4),
        MOMENTS + "v_col/" + UP: (1, 4, 4),
        MOMENTS + "v_row/" + OUT: (1, 1, 4),
        MOMENTS + "v_col/" + OUT: (1, 1, 4),
        "params": 5_744,
        "opt_state": 1_984,
    },
    ("adafactor", "d2e4"): {
        MOMENTS + "v_row/embed_VD": (1,),
        MOMENTS + "v_col/embed_VD": (257,),
        MOMENTS + "v_row/" + UP: (1, 2, 4),
        MOMENTS + "v_col/" + UP: (1, 2, 8),
        MOMENTS + "v_row/" + OUT: (1, 2, 4),
        MOMENTS + "v_col/" + OUT: (1, 2, 1),
        "params": 12_480,
        "opt_state": 1_984,
    },
}
WHOLE = {"params": 15_552, "adamw": 31_112, "adafactor": 3_376}  # bytes


@compiled_once
@matrix
@pytest.mark.parametrize(("optimizer", "mesh"), HELD)
def test_what_a_device_holds(run, optimizer, mesh):
    """ZeRO: after steps, every device has the part of parameters and moments that the layouts say, and no more."""
    whole, here = run(optimizer, mesh), program(optimizer, mesh)
    for (name, x), layout in zip(named(whole.saved).items(), jax.tree.leaves(here.specs.state), strict=True):
        assert {part.shape for part in whole.parts[name]} == {dims.local_shape(x.shape, layout, here.mesh.shape)}, name
    for name, wanted in HELD[optimizer, mesh].items():
        if isinstance(wanted, tuple):
            assert [part.shape for part in whole.parts[name]] == [wanted] * 8, name
        else:
            of = [[part.nbytes for part in parts] for leaf, parts in whole.parts.items() if leaf.startswith(name)]
            assert np.sum(of, 0).tolist() == [wanted] * 8, name
    for name, key in (("params", "params"), ("opt_state", optimizer)):
        assert sum(x.nbytes for x in jax.tree.leaves(getattr(whole.saved, name))) == WHOLE[key]


# ---- processes

TINY = """
from ml_collections import ConfigDict

def get_config():
    config = ConfigDict()
    config.model = {{"D": 8, "N": 1, "moe_layers": "every 1", "attention": "MHA(2, 4)", "remat": "none"}}
    config.model["moe"] = {{"E": 8, "router": "LossFree(K=2, rate=0.1)", "experts": "MLP(F=8)"}}
    config.model.moe.dispatch, config.model.moe.losses = "Scatter(4.0)", ("Adaptive(LoadBalance(0.01))",)
    config.data = {{"source": "Folder(path={text!r})", "L": 8, "B": 16}}
    config.optim = {{"schedule": "Constant(peak=0.01)", "zero1": True}}
    config.run = {{"log_every": 1, "eval_every": 100, "save_every": 100, "eval_sequences": 16}}
    return config
"""
OTHERWISE = ("--config.optim.zero1=False", "--config.model.moe.exchange=AllGather()")
LEGS = (  # processes, devices of each, mesh, until which step
    (1, 4, "f2e2", 2, *OTHERWISE),
    (2, 4, "f2e2t2", 4),
    (1, 8, "d2e4", 6),
    (2, 4, "f2e2t2", 8),
    (1, 4, "f2e2", 10, *OTHERWISE),
)
CACHE = {  # what one leg has compiled, another need not
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., list[subprocess.Popen]]]:
    """Starts the processes that train a small experiment."""
    (tmp_path / "text").mkdir()
    for i in range(60):
        (tmp_path / "text" / f"{i}.txt").write_text(" ".join(str((i * 7 + j) % 50) for j in range(60)))
    (tmp_path / "tiny.py").write_text(TINY.format(text=str(tmp_path / "text")))
    cache = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), **CACHE}
    started: list[subprocess.Popen] = []

    def start(workdir: str, processes: int, devices: int, mesh: str, steps: int, *flags: str):
        command = [sys.executable, "-m", "experiments.train", f"--config={tmp_path / 'tiny.py'}", *flags]
        command += [f"--workdir={tmp_path / workdir}", f"--data_dir={tmp_path / 'data'}", f"--config.run.steps={steps}"]
        command += [f"--devices={devices}", *(f"--config.mesh.{axis}={n}" for axis, n in sizes_of(mesh).items())]
        each: list[list[str]] = [[]]
        if processes > 1:
            command += [f"--coordinator=127.0.0.1:{free_port()}", f"--processes={processes}"]
            each = [[f"--process={i}"] for i in range(processes)]
        how = {"cwd": ROOT, "env": {**os.environ, **cache}, "stderr": subprocess.PIPE, "text": True}
        new = [subprocess.Popen([*command, *own], **how) for own in each]
        started.extend(new)
        return new

    yield start
    for process in started:
        process.kill()
        process.communicate()


def finish(processes: list[subprocess.Popen]) -> None:
    said = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said


@pytest.mark.law(9)
@matrix
def test_a_run_goes_on_with_other_processes(start, tmp_path):
    """One with half of the devices, two, one, and back again: the log is that of one process that was left alone."""
    whole = start("whole", 1, 8, "d2e4", LEGS[-1][3])
    for leg in LEGS:
        finish(start("moved", *leg))
    finish(whole)
    expected, found = log.read(tmp_path / "whole"), log.read(tmp_path / "moved")
    assert [r["step"] for r in found if r["kind"] == "start"] == [0, *(leg[3] for leg in LEGS[:-1])]
    for key in ("loss", "aux_loss", "grad_norm", "drop_rate"):
        steps, values = log.curve(found, key)
        assert list(steps) == list(range(1, LEGS[-1][3] + 1))
        np.testing.assert_allclose(values, log.curve(expected, key)[1], rtol=1e-5, err_msg=key)
    ends = [log.curve(records, "loss", "eval")[1][-1] for records in (found, expected)]
    np.testing.assert_allclose(*ends, rtol=1e-5)


@pytest.mark.law(9)
@pytest.mark.parametrize("answer", [0, 1])
def test_process_0_says_whether_there_is_a_checkpoint(tmp_path, monkeypatch, answer):
    """A process that does not see it yet must not begin anew beside the others."""
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(checkpointing.multihost_utils, "broadcast_one_to_all", lambda _: answer)
    assert Checkpoints(tmp_path).empty() == (not answer)
