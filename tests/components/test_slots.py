"""Slots and routing groups are said once: what configs say of them is what layers do."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from moe_jax import (
    BASELayer,
    Einsum,
    ExpertChoice,
    Gather,
    MixtureOfDepths,
    MoEConfig,
    NoisyTopK,
    RoundRobin,
    Scatter,
    SoftMoE,
    Sort,
    TopK,
)
from moe_jax.core.capacity import CAPACITY_CONVENTIONS
from moe_jax.core.context import Context
from moe_jax.core.routing import SlotChoice, token_choice
from moe_jax.core.traits import traits
from tests import oracle

S, D = 24, 4


def identity(params, x, groups):
    return x


@pytest.mark.parametrize("convention", CAPACITY_CONVENTIONS)
@pytest.mark.parametrize("dispatch", [Einsum, Scatter])
def test_slots_are_what_an_expert_keeps(dispatch, convention):
    """The slots are the tokens that reach an expert when a whole group goes to it."""
    for factor in (0.5, 1.25, None):
        d, E = dispatch(factor, convention=convention), 6
        mask, zeros = jnp.ones((1, S), bool), jnp.zeros((1, S, E))
        routing = token_choice(jnp.zeros((1, S, 1), int), jnp.ones((1, S, 1)), zeros, zeros, mask)
        _, kept = jax.jit(lambda x, d=d, r=routing: d(x, r, identity, {}))(jnp.ones((1, S, D)))
        assert d.slots(S, 1, E) == kept.sum() == (S if factor is None else oracle.capacity(S, 1, E, factor, convention))


@pytest.mark.parametrize("router", [ExpertChoice(), ExpertChoice(0.7), MixtureOfDepths(0.3), SoftMoE(C=3)], ids=str)
def test_slots_of_routers_that_bring_their_own(router):
    """They are those of their routing."""
    E = 1 if isinstance(router, MixtureOfDepths) else 4
    shapes = {"gate_DE": (D, E), "phi_DEC": (D, E, 3), "scale_": ()}
    params = {n: jnp.zeros(shapes[n]) for n in router.params}
    routing = router(params, jnp.ones((1, S, D)), jnp.ones((1, S), bool), Context(E))
    slots = routing.dispatch_GSEC if isinstance(router, SoftMoE) else routing.token_GEC
    layer = MoEConfig(E=E, router=router, dispatch=Einsum(None), losses=())
    assert layer.slots(S) == router.slots(S, E) == slots.shape[-1]
    assert Gather().slots(S, router.K, E) == Sort().slots(S, router.K, E) == S


@pytest.mark.parametrize(
    ("layer", "training", "irrelevant"),
    [
        (MoEConfig(E=4, dispatch=Scatter(None)), True, True),
        (MoEConfig(E=4, dispatch=Scatter(1.0)), False, False),
        (MoEConfig(E=4, router=NoisyTopK(), dispatch=Sort()), True, False),
        (MoEConfig(E=4, router=NoisyTopK(), dispatch=Sort()), False, True),
        (MoEConfig(E=4, router=RoundRobin(), dispatch=Sort()), False, False),
        (MoEConfig(E=4, router=BASELayer(), dispatch=Sort()), False, False),
    ],
)
def test_routing_groups_divide_the_tokens_of_a_shard(layer, training, irrelevant):
    """S, or one sequence; where S does not divide a shard's tokens all of them, or it is refused."""
    assert layer.grouping_is_irrelevant(training) == irrelevant
    assert layer.group(3, 8, training) == 8
    halves, other = (dataclasses.replace(layer, S=n) for n in (4, 16))
    assert halves.group(3, 8, training) == 4
    assert other.group(4, 8, training) == 16
    assert (layer.sequences(8), halves.sequences(8), other.sequences(8), other.sequences(12)) == (1, 1, 2, 4)
    if irrelevant:
        assert other.group(3, 8, training) == 24
    else:
        with pytest.raises(ValueError, match="A shard's 3 x 8 tokens are not whole routing groups of S=16; S must"):
            other.group(3, 8, training)


def test_traits_have_defaults():
    """Undeclared traits have the usual defaults; groups matter to routers that are not causal."""
    assert traits(None) == traits(object())
    plain, base = traits(TopK(K=3)), traits(BASELayer())
    assert (plain.causal, plain.random, plain.grouped, plain.K, plain.params) == (True, False, False, 3, ("gate_DE",))
    assert (base.causal, base.random, base.grouped) == (False, True, True)
    assert traits(RoundRobin()).grouped
    assert traits(ExpertChoice).routing is SlotChoice
