"""Every config file takes a step: shrunken, with its own components, on its own kind of mesh."""

import functools
import math
import pathlib
import re
import runpy

import jax
import numpy as np
import pytest

from moe_jax.audit.samples import sample
from moe_jax.audit.shrink import shrink
from moe_jax.config import Experiment, build
from moe_jax.step import Metrics, Program, State

CONFIGS = {p.stem: p for p in sorted(pathlib.Path("configs").glob("*.py")) if p.name != "__init__.py"}
PAPERS = {p.stem: p for p in sorted(pathlib.Path("configs/papers").glob("[!_]*.py"))}
# At their nano shapes, those that have what no config above has.
FAMILIES = ("olmoe_1b_7b", "deepseekmoe_16b", "st_moe_32b", "gshard_128e_12l")
DEVICES = 8


@functools.cache
def read(name: str) -> Experiment:
    """A config file's experiment, or a published model's at its nano shape."""
    if name in CONFIGS:
        return build(runpy.run_path(str(CONFIGS[name]))["get_config"]())
    return build(runpy.run_path(str(PAPERS[name]))["get_config"]("nano"))


def names(model) -> set[tuple[str, ...]]:
    """The kinds of layers of a model, by the names of their parts."""
    return {tuple(sub.name for sub in model.sublayers(stack, i)) for stack in model.stacks() for i in range(model.N)}


def test_shrinking_keeps_the_kind_of_everything():
    for name in (*CONFIGS, *FAMILIES):
        exp, small = read(name), shrink(read(name), DEVICES)[0]
        assert names(small.model) == names(exp.model)
        assert small.devices == DEVICES
        for axis, n in exp.mesh:
            assert (dict(small.mesh)[axis] > 1) == (n != 1) or n == -1
        for field in ("tied", "remat", "moe_layers"):
            assert getattr(small.model, field) == getattr(exp.model, field)
        for mine, theirs in zip(small.model.attention, exp.model.attention, strict=True):
            assert (mine.position, mine.qk_norm) == (theirs.position, theirs.qk_norm)
        if exp.model.routed is not None:
            assert small.model.moe.router == exp.model.moe.router
            assert small.model.moe.dispatch == exp.model.moe.dispatch
            assert type(small.model.moe.experts) is type(exp.model.moe.experts)
            assert small.model.moe.losses == exp.model.moe.losses


@pytest.mark.parametrize("name", [*CONFIGS, *(pytest.param(n, marks=pytest.mark.matrix) for n in FAMILIES)])
def test_a_config_takes_a_step(name):
    exp, _ = shrink(read(name), DEVICES)
    program, batch = Program(exp), sample(exp)
    before = program.init()
    first = jax.device_get(before.params)
    state, metrics = program.step(before, batch)
    assert isinstance(state, State)
    assert isinstance(metrics, Metrics)
    assert abs(float(metrics.loss) - math.log(exp.model.V)) < 1, "as good as chance, before anything is learnt"
    assert float(metrics.targets) == batch.loss_mask_BL.sum()
    assert int(metrics.skipped) == 0
    assert float(metrics.grad_norm) > 0
    assert int(state.step) == 1
    assert (metrics.stats is None) == (exp.model.routed is None)
    after = jax.device_get(state.params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after))
    moved = [(a != b).any() for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(after), strict=True)]
    assert np.mean(moved) > 0.9
    if exp.model.routed is not None:
        up = next(x for path, x in jax.tree.leaves_with_path(state.params) if path[-1].key == "up_EDF")
        assert len({str(shard.index) for shard in up.addressable_shards}) == dict(exp.mesh)["expert"]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_says_what_it_is_for(name):
    """A question, the command, the hardware, the time, and what to expect."""
    text = runpy.run_path(str(CONFIGS[name]))["__doc__"]
    question, command, *rest = text.strip().split("\n\n")
    assert re.search(r"[?.]$", question)
    assert len(question) <= 200
    assert re.search(rf"^    python -m experiments\.\w+ --config={CONFIGS[name]} .*--workdir=", command, re.MULTILINE)
    rest = " ".join(rest)
    for word in ("Hardware", "time", "expect"):
        assert re.search(rf"\b{word}", rest, re.IGNORECASE), f"the docstring does not tell the {word}"


@pytest.mark.parametrize("name", PAPERS)
def test_a_published_model_says_where_it_is_from(name):
    """A published model's docstring tells how to plan it, how to train its nano shape, and its table."""
    text, path = runpy.run_path(str(PAPERS[name]))["__doc__"], PAPERS[name]
    question, commands, rest = text.strip().split("\n\n")
    assert question.endswith("?")
    assert len(question) <= 120
    plan, train = commands.split("\n")
    assert re.fullmatch(rf"    python -m experiments\.plan --config={path} --topology=v\w+:[\dx]+", plan)
    assert train == f"    python -m experiments.train --config={path}:nano --workdir=runs/{name}"
    assert re.search(r"arXiv:\d{4}\.\d{5}|release", rest)
    assert "Nano: " in rest
