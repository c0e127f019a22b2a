"""Experts may have another output width than D: every dispatcher and exchange gives outputs of that width."""

import dataclasses
import functools
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax import (
    MLP,
    AllGather,
    AllToAll,
    Einsum,
    ExpertChoice,
    Gather,
    MoE,
    MoEConfig,
    RaggedAllToAll,
    Scatter,
    SoftMoE,
    Sort,
    TopK,
    TwoLevel,
)
from moe_jax.audit.communication import compare_collectives
from moe_jax.audit.hlo import collectives
from moe_jax.core import dims
from moe_jax.core.routing import TokenChoice
from moe_jax.core.shard import TOKEN_AXES, rules_for
from moe_jax.costs.communication import layer
from moe_jax.moe_config import output_width
from tests.cases import close, context, mesh_of, normal, sizes_of

B, L, D, E = 8, 6, 4, 8


@dataclasses.dataclass(frozen=True)
class Projector:
    """Two matrices and a bias, from D to O."""

    F: int
    O: int
    params: ClassVar = ("up_EDF", "down_EFO", "down_EO")

    def __call__(self, params, x, groups):
        return groups.bias(
            groups.matmul(jnp.tanh(groups.matmul(x, params["up_EDF"])), params["down_EFO"]), params["down_EO"]
        )


def config(dispatch, exchange=None, O=6, **fields):
    fields = {"router": TopK(K=2), "losses": (), **fields}
    return MoEConfig(E=E, experts=Projector(F=4, O=O), dispatch=dispatch, exchange=exchange or AllToAll(), **fields)


def parameters(cfg):
    x = jax.ShapeDtypeStruct((B, L, D), jnp.float32)
    shapes = jax.eval_shape(MoE(cfg).init, jax.random.key(0), x)["params"]
    return {n: normal(i, *s.shape) for i, (n, s) in enumerate(sorted(shapes.items()))}


@functools.cache
def run(cfg, mesh=None):
    """Output, recorded weights and choices, and gradients of parameters and input."""
    params, x, target = parameters(cfg), normal(50, B, L, D), normal(51, B, L, cfg.experts.O)

    def loss(params, x):
        y, aux = MoE(cfg).apply({"params": params}, x, record=("weight", "kept") * (cfg.traits.routing is TokenChoice))
        return ((y - target) ** 2).sum(), (y, aux.expert_BLK, aux.recorded)

    with context(mesh):
        (_, seen), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x)
    return jax.tree.map(np.asarray, (params, x, seen, grads))


DISPATCHERS = [Einsum(1.0), Einsum(None), Scatter(1.0), Scatter(None), Sort()]


@pytest.mark.parametrize("O", [3, 6])
@pytest.mark.parametrize("dispatch", DISPATCHERS, ids=str)
def test_output_is_a_sum_over_experts(dispatch, O):
    """Token by token, narrower and wider than D, with a shared expert; what was dropped adds nothing."""
    shared = Projector(F=3, O=O)
    params, x, (y, expert, recorded), grads = run(config(dispatch, O=O, shared=shared))
    assert params["down_EFO"].shape == (E, 4, O)
    assert params["shared_down_FO"].shape == (3, O)
    expected = np.zeros((B, L, O))
    for b, l in np.ndindex(B, L):
        hidden = np.tanh(x[b, l] @ params["shared_up_DF"])
        expected[b, l] = hidden @ params["shared_down_FO"] + params["shared_down_O"]
        for e, weight, kept in zip(expert[b, l], recorded.weight_BLK[b, l], recorded.kept_BLK[b, l], strict=True):
            made = np.tanh(x[b, l] @ params["up_EDF"][e]) @ params["down_EFO"][e] + params["down_EO"][e]
            expected[b, l] += weight * kept * made
    assert recorded.kept_BLK.all() == (dispatch.capacity_factor is None)
    close(y, expected)
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


@pytest.mark.law(2)
@pytest.mark.parametrize(
    ("dispatch", "router"), [(Gather(), ExpertChoice()), (Einsum(None), ExpertChoice()), (Einsum(None), SoftMoE(C=2))]
)
def test_slots_of_routers_are_as_wide(dispatch, router):
    """Where experts choose, or mix: Gather's values and gradients are Einsum's, on a mesh too."""
    cfg, definition = (config(d, router=router) for d in (dispatch, Einsum(None)))
    assert run(cfg)[2][0].shape == (B, L, 6)
    close(run(cfg)[2:], run(definition)[2:])
    close(run(cfg, "d2e4")[2:], run(definition)[2:])


EXCHANGED = [
    (Scatter(1.0), AllToAll(), "d2e4"),
    (Scatter(None), AllToAll(), "d2e4"),
    (Einsum(1.0), AllToAll(chunks=2), "d2e4"),
    (Scatter(1.0), TwoLevel(), "s2e4"),
    (Scatter(1.0), AllGather(), "d2e4"),
    (Sort(), AllGather(), "d2e4"),
    (Sort(), RaggedAllToAll(), "d2e4"),
    (Sort(), RaggedAllToAll(), "e4t2"),
    (Scatter(1.0), AllToAll(), "f2e2t2"),
]


@pytest.mark.law(1)
@pytest.mark.parametrize(("dispatch", "exchange", "mesh"), EXCHANGED, ids=str)
def test_every_exchange_carries_the_width(dispatch, exchange, mesh):
    """Law 1: outputs, drops and gradients on a mesh are those of one device."""
    cfg = config(dispatch, exchange, shared=Projector(F=4, O=6))
    many, one = run(cfg, mesh), run(config(dispatch, shared=Projector(F=4, O=6)))
    assert many[2][0].shape == (B, L, 6)
    close(many[2:], one[2:])


@pytest.mark.law(6)
@pytest.mark.parametrize(("dispatch", "exchange", "mesh"), EXCHANGED[2:], ids=str)
def test_what_travels_is_predicted(dispatch, exchange, mesh):
    """Law 6: rows go to experts D wide and come back O wide, and so do their gradients."""
    cfg = config(dispatch, exchange, shared=Projector(F=4, O=6))
    on = partial(NamedSharding, mesh_of(mesh))
    layout = jax.tree.map(on, dims.specs(parameters(cfg), rules_for(exchange)))
    tokens = on(P(TOKEN_AXES))

    def loss(params, x):
        y, aux = MoE(cfg).apply({"params": params}, x)
        return (y**2).sum(), aux.stats

    gradient, outputs = jax.grad(loss, (0, 1), has_aux=True), ((layout, tokens), None)
    step = jax.jit(gradient, in_shardings=(layout, tokens), out_shardings=outputs)
    with context(mesh):
        text = step.lower(parameters(cfg), normal(50, B, L, D)).compile().as_text()
    rows = compare_collectives(layer(cfg, sizes_of(mesh), B, L, D), collectives(text, mesh_of(mesh)))
    assert [row.detail for row in rows if not row.holds] == []


def test_a_shared_expert_has_the_same_width():
    """Refuses outputs of different widths where they are added."""
    assert (output_width(MLP(F=4), 8), output_width(Projector(F=4, O=6), 8)) == (8, 6)
    for shared in (Projector(F=4, O=5), MLP(F=4)):
        with pytest.raises(ValueError, match="has another output width than experts=Projector"):
            config(Scatter(), shared=shared)
