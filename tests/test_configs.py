"""Every config file takes a step: shrunken, with its own components, on its own kind of mesh."""

import dataclasses
import functools
import math
import pathlib
import re
import runpy

import jax
import numpy as np
import pytest

from moe_jax.config import DataConfig, Experiment, build
from moe_jax.data import Batch, Bytes, Corpus
from moe_jax.moe import MoEConfig
from moe_jax.train import Metrics, Program, State

CONFIGS = {p.stem: p for p in sorted(pathlib.Path("configs").rglob("*.py")) if p.name != "__init__.py"}
DEVICES = 8
B, L, SMALL = 16, 8, 8


def read(name: str) -> Experiment:
    return build(runpy.run_path(str(CONFIGS[name]))["get_config"]())


def shrink(exp: Experiment) -> Experiment:
    """The same components, layout and kind of mesh, as small as can be, for one step on 8 devices."""
    mesh = dict(exp.mesh)
    spread = mesh.get("expert", 1) != 1
    X = math.gcd(mesh["expert"], DEVICES if mesh.get("data", 1) == 1 else DEVICES // 2) if spread else 1
    model, moe = exp.model, exp.model.moe
    narrow = lambda part: part and dataclasses.replace(part, F=SMALL)  # noqa: E731
    if isinstance(moe, MoEConfig):
        E = max(X, moe.router.K + 2, min(moe.E, SMALL))
        experts, shared = narrow(moe.experts), narrow(moe.shared)
        moe = dataclasses.replace(moe, E=E, experts=experts, shared=shared, S=moe.S and L)
    else:
        moe = narrow(moe)
    model = dataclasses.replace(model, V=Bytes.V, D=SMALL, H=2, A=4, N=2, ffn=narrow(model.ffn), moe=moe)
    data = DataConfig(Corpus(), Bytes(), L=L, B=B * exp.data.accumulate, accumulate=exp.data.accumulate)
    run = dataclasses.replace(exp.run, steps=1)
    return dataclasses.replace(exp, model=model, data=data, run=run, mesh=(("data", DEVICES // X), ("expert", X)))


def random_batch(B: int) -> Batch:
    """Noise in two documents a window, the last token padding."""
    rng = np.random.default_rng(0)
    tokens_BM = rng.integers(0, Bytes.V, (B, L + 1)).astype(np.int32)
    segment_L = np.array([1] * (L // 2) + [2] * (L // 2 - 1) + [0], np.int32)
    position_L = np.array([*range(L // 2), *range(L // 2 - 1), 0], np.int32)
    mask_L = np.append((segment_L[1:] == segment_L[:-1]) & (segment_L[1:] > 0), False)
    everywhere = functools.partial(np.broadcast_to, shape=(B, L))
    return Batch(
        tokens_BM[:, :-1],
        tokens_BM[:, 1:],
        np.array(everywhere(segment_L)),
        np.array(everywhere(position_L)),
        np.array(everywhere(mask_L)),
        np.zeros(B, np.int32),
    )


def test_shrinking_keeps_the_kind_of_everything():
    for name in CONFIGS:
        exp, small = read(name), shrink(read(name))
        assert small.model.sparse[:2] == exp.model.sparse[:2]
        assert small.devices == DEVICES
        for axis, n in exp.mesh:
            assert (dict(small.mesh)[axis] > 1) == (n != 1)
        for field in ("position", "tied", "remat", "dtype", "layout"):
            assert getattr(small.model, field) == getattr(exp.model, field)
        if isinstance(exp.model.moe, MoEConfig):
            assert small.model.moe.router == exp.model.moe.router
            assert small.model.moe.dispatch == exp.model.moe.dispatch
            assert type(small.model.moe.experts) is type(exp.model.moe.experts)
            assert small.model.moe.losses == exp.model.moe.losses


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_takes_a_step(name):
    exp = shrink(read(name))
    program = Program(exp)
    before = program.init()
    embed = np.asarray(before.params["embed_VD"])
    state, metrics = program.step(before, random_batch(exp.data.B))
    assert isinstance(state, State)
    assert isinstance(metrics, Metrics)
    loss = float(metrics.loss)
    assert abs(loss - math.log(Bytes.V)) < 1, "as good as chance, before anything is learnt"
    assert float(metrics.targets) == exp.data.B * (L - 3)
    assert int(metrics.skipped) == 0
    assert float(metrics.grad_norm) > 0
    assert int(state.step) == 1
    assert (metrics.stats is None) == (not isinstance(exp.model.moe, MoEConfig))
    assert np.isfinite(np.asarray(state.params["embed_VD"])).all()
    assert (np.asarray(state.params["embed_VD"]) != embed).any()
    if isinstance(exp.model.moe, MoEConfig):
        up = next(x for path, x in jax.tree.leaves_with_path(state.params) if path[-1].key == "up_EDF")
        assert len({str(shard.index) for shard in up.addressable_shards}) == dict(exp.mesh)["expert"]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_says_what_it_is_for(name):
    """A question, the command, the hardware, the time, and what to expect."""
    text = runpy.run_path(str(CONFIGS[name]))["__doc__"]
    question, command, *rest = text.strip().split("\n\n")
    assert re.search(r"[?.]$", question)
    assert len(question) <= 200
    assert re.match(rf"    python -m experiments\.\w+ --config={CONFIGS[name]} --workdir=", command)
    rest = " ".join(rest)
    for word in ("Hardware", "time", "expect"):
        assert re.search(rf"\b{word}", rest, re.IGNORECASE), f"the docstring does not tell the {word}"
