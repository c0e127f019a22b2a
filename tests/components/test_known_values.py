"""Told cases: literal numbers from papers, other code bases and by hand, and every refusal's sentence."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.core import dims
from moe_jax.core import routing as core
from moe_jax.core.activation import activation
from moe_jax.core.capacity import capacity
from moe_jax.core.context import Context
from moe_jax.core.routing import masks, token_choice
from moe_jax.core.shard import AXES, make_mesh
from moe_jax.core.stats import Stats, describe
from moe_jax.core.stats import stats as count
from moe_jax.dispatch import Einsum, Scatter
from moe_jax.experts import GLU, MLP
from moe_jax.losses import LoadBalance, RouterZ
from moe_jax.moe import MoE, MoEConfig
from moe_jax.routers import Switch, Top2, TopK

queue = jax.jit(core.position_in_expert, static_argnames="priority")
stats = jax.jit(lambda routing, kept: count(routing, kept, 1))


def routing(probs, K, mask=None):
    """Top-K of literal probabilities, [S, E], weighted by them."""
    probs = jnp.array(probs)[None]
    weight, expert = jax.lax.top_k(probs, K)
    mask = jnp.ones(probs.shape[:2], bool) if mask is None else jnp.array(mask)[None]
    return token_choice(expert, weight, jnp.log(jnp.maximum(probs, 1e-9)), probs, mask)


def slots(r, priority):
    """(expert, slot) of every choice."""
    return jnp.stack([r.expert_GSK, queue(r, priority)], axis=-1)[0].tolist()


VMOE = [[0.4, 0.0, 0.2], [0.5, 0.1, 0.4], [0.3, 0.2, 0.6]]


@pytest.mark.parametrize(
    ("priority", "expected"),
    [
        ("choice-major", [[[0, 0], [2, 1]], [[0, 1], [2, 2]], [[2, 0], [0, 2]]]),
        ("probability", [[[0, 1], [2, 2]], [[0, 0], [2, 1]], [[2, 0], [0, 2]]]),
        ("token-major", [[[0, 0], [2, 0]], [[0, 1], [2, 1]], [[2, 2], [0, 2]]]),
    ],
)
def test_slots_of_vmoe(priority, expected):
    """google-research/vmoe, moe_test.py: three tokens, three experts; at capacity two slot 2 is dropped."""
    assert slots(routing(VMOE, 2), priority) == expected


@pytest.mark.parametrize(("priority", "kept"), [("token-major", [[1, 1], [0, 0]]), ("choice-major", [[1, 0], [1, 0]])])
def test_priorities_at_capacity_one(priority, kept):
    """Choices [[0, 1], [1, 0]], one slot each: all of the first token, or all first choices."""
    r = routing([[0.6, 0.4], [0.4, 0.6]], 2)
    assert (queue(r, priority) < 1)[0].astype(int).tolist() == kept


def test_masks_by_hand():
    """The definition: token 0 in slot 0 of expert 0 with weight .6, of expert 1 with .4; token 1 dropped."""
    r = routing([[0.6, 0.4], [0.4, 0.6]], 2)
    dispatch, combine = masks(r, queue(r), 1)
    np.testing.assert_array_equal(dispatch[0, :, :, 0], [[1, 1], [0, 0]])
    np.testing.assert_allclose(combine[0, :, :, 0], [[0.6, 0.4], [0, 0]])


@pytest.mark.law(7)
def test_padding_takes_no_slot():
    """Law 7: with the first token padded the second has the first slots; the padded one is nowhere."""
    r = routing([[0.6, 0.4], [0.4, 0.6]], 2, mask=[False, True])
    assert slots(r, "token-major") == [[[2, 4], [2, 4]], [[1, 0], [0, 0]]]
    assert r.weight_GSK[0, 0].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("S", "K", "E", "factor", "C"),
    [
        (512, 2, 64, 1.25, 20),  # as V-MoE and MaxText; flaxformer and axlearn leave K out: 10
        (512, 1, 64, 1.25, 10),
        (100, 1, 5, 1.15, 23),  # int(100 * 1.15 / 5) is 22
        (10, 1, 3, 1.0, 4),  # rounded up
        (8, 2, 4, 8.0, 8),  # an expert sees a token once
        (1, 1, 64, 1.0, 1),
    ],
)
def test_capacity_has_its_known_slots(S, K, E, factor, C):
    """Slots per expert and group, exactly."""
    assert capacity(S, K, E, factor) == C


GSHARD = [[0.5, 0.4, 0.1], [0.3, 0.3, 0.4], [0.1, 0.2, 0.7], [0.8, 0.2, 0.0]]


@pytest.mark.parametrize(("K", "value"), [(1, 1.0875), (2, 1.0125)])
def test_load_balancing_loss(K, value):
    """vmoe, nn/routing_test.py: 1.0875. GShard's and V-MoE's loss counts first choices only, ours all K.

    K=1: f = (2, 0, 2)/4, P = (.425, .275, .3): 3 * (.2125 + .15), theirs. K=2: f = (3, 3, 2)/8 by hand.
    """
    r = routing(GSHARD, K)
    np.testing.assert_allclose(LoadBalance()(stats(r, r.expert_GSK < 3), {}, None), value, rtol=1e-6)


@pytest.mark.parametrize("K", [1, 2, 4])
def test_balanced_and_collapsed(K):
    """The loss is 1 when balanced, whatever K is (Switch), and E when one expert has everything."""
    nothing = Stats(*map(jnp.zeros, ((), (), 4, 4, 4, 4, 4, (), (), (), (), 1, (1, 4), 1)))
    for probs_E, value in ((jnp.full(4, 8.0), 1), (jnp.array([32.0, 0, 0, 0]), 4)):
        s = nothing._replace(tokens=jnp.array(32.0), choices_E=K * probs_E, probs_E=probs_E)
        assert LoadBalance()(s, {}, None) == value


LOGITS = jnp.log(jnp.array([[[1.0, 2.0, 5.0]]]))  # probabilities 1/8, 2/8, 5/8


@pytest.mark.law(3)
@pytest.mark.parametrize(
    ("router", "expert", "weight"),
    [
        (Switch(), [2], [5 / 8]),
        (TopK(K=1, normalize=False), [2], [5 / 8]),
        (TopK(K=2, normalize=False), [2, 1], [5 / 8, 2 / 8]),
        (TopK(K=2), [2, 1], [5 / 7, 2 / 7]),
        (TopK(K=3), [2, 1, 0], [5 / 8, 2 / 8, 1 / 8]),
        (Top2(), [2, 1], [5 / 7, 2 / 7]),
    ],
    ids=str,
)
def test_weights_by_hand(router, expert, weight):
    """One token with probabilities 1/8, 2/8, 5/8. At K=1 the weight is the probability, never 1 (law 3)."""
    r = router({"gate_DE": jnp.eye(3)}, LOGITS, jnp.ones((1, 1), bool), Context(3))
    assert r.expert_GSK[0, 0].tolist() == expert
    np.testing.assert_allclose(r.weight_GSK[0, 0], weight, rtol=1e-6)


@pytest.mark.parametrize("router", [Switch(), TopK(K=2), TopK(K=2, normalize=False), Top2()], ids=str)
def test_ties_go_to_the_lower_expert(router):
    """Equal logits: the experts in order."""
    r = router({"gate_DE": jnp.ones((3, 3))}, LOGITS, jnp.ones((1, 1), bool))
    assert r.expert_GSK[0, 0].tolist() == [0, 1][: router.K]


def test_top2_uses_the_second_as_often_as_its_weight():
    """GShard: with probability min(1, 2 w): w = 2/7, 4000 tokens, 57.1% +- 3 sigma."""
    S = 4000
    keys, mask = jax.random.split(jax.random.key(0), 1), jnp.ones((1, S), bool)
    r = Top2()({"gate_DE": jnp.eye(3)}, jnp.broadcast_to(LOGITS, (1, S, 3)), mask, Context(3, keys))
    used = r.expert_GSK[0, :, 1] < 3
    assert abs(used.mean() - 4 / 7) < 3 * (4 / 7 * 3 / 7 / S) ** 0.5
    np.testing.assert_allclose(r.weight_GSK[0, :, 0], 5 / 7, rtol=1e-6)
    assert (r.weight_GSK[0, ~used, 1] == 0).all()


def test_statistics_by_hand():
    """Two real tokens and a padded one; three of four choices kept."""
    probs = [[1 / 8, 2 / 8, 5 / 8], [1 / 2, 1 / 2, 0], [0, 0, 1]]
    r = routing(probs, 2, mask=[True, True, False])
    s = stats(r._replace(logits_GSE=jnp.log(jnp.array([[[1.0, 2, 5], [1, 1, 1e-9], [1, 1, 1]]]))), queue(r) < 1)
    assert (s.tokens, s.kept, s.choices_E.tolist()) == (2, 3, [1, 2, 1])
    np.testing.assert_allclose(s.probs_E, [0.625, 0.75, 0.625])
    m = describe(s)
    np.testing.assert_allclose(m["load"], [0.25, 0.5, 0.25])
    np.testing.assert_allclose(m["load_max_over_mean"], 1.5, rtol=1e-6)
    np.testing.assert_allclose(m["load_cv"], 0.5**0.5 / 2, rtol=1e-6)
    np.testing.assert_allclose(m["drop_rate"], 0.25)
    assert m["dead_experts"] == 0
    h = np.log(8) - (2 * np.log(2) + 5 * np.log(5)) / 8
    np.testing.assert_allclose(m["router_entropy"], (h + np.log(2)) / 2, rtol=1e-6)
    np.testing.assert_allclose(RouterZ()(s, {}, None), (np.log(8) ** 2 + np.log(2) ** 2) / 2, rtol=1e-6)


def test_a_layer_by_hand():
    """Switch of two experts on width 1: y = p * relu(x * up) * down, for tokens 1 and -2."""
    cfg = MoEConfig(E=2, router=Switch(), experts=MLP(F=1, activation="relu"), dispatch=Einsum(2.0), losses=())
    params = {"router_gate_DE": [[1.0, -1.0]], "up_EDF": [[[3.0]], [[-5.0]]], "down_EFD": [[[2.0]], [[7.0]]]}
    y, aux = MoE(cfg).apply(
        {"params": jax.tree.map(jnp.array, params, is_leaf=lambda v: isinstance(v, list))},
        jnp.array([[[1.0], [-2.0]]]),
    )
    p = 1 / (1 + np.exp(-np.array([2.0, 4.0])))
    np.testing.assert_allclose(y[0, :, 0], p * [1 * 3 * 2, 2 * 5 * 7], rtol=1e-6)
    assert aux.loss == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopK(K=1), "TopK(K=1, normalize=True) has the constant weight 1 and never trains its router; set"),
        (lambda: TopK(score="some"), "TopK(score='some') is unknown; use one of softmax, sigmoid, sparsemax, entmax15"),
        (lambda: Top2(second="never"), "Top2(second='never') is unknown; use 'random' or 'always'"),
        (lambda: MoEConfig(E=2, router=TopK(K=3)), "TopK() picks K=3 of E=2 experts; K must lie between 1 and E"),
        (lambda: MoEConfig(E=2, losses=("z",)), "losses has 'z', which is none; give a tuple of LoadBalance(0.01)"),
        (
            lambda: Scatter(priority="fifo"),
            "Scatter(priority='fifo') is unknown; use one of token-major, choice-",
        ),
        (lambda: MLP(F=4, activation="swish"), "Activation 'swish' is unknown; use one of relu, gelu, silu"),
        (lambda: GLU(F=4, activation="glu"), "Activation 'glu' is unknown"),
        (lambda: activation("Relu"), "Activation 'Relu' is unknown"),
        (lambda: make_mesh(data=3), "mesh data=3 does not multiply to the 8 devices there are"),
        (lambda: make_mesh(data=-1, expert=3), "mesh data=-1 x expert=3 does not multiply to the 8 devices"),
        (lambda: dims.dims_of("upEDf"), "Parameter 'upEDf' does not say its dimensions"),
        (lambda: dims.shape_of("EDF", {"E": 2}), "Dimensions ['D', 'F'] of 'EDF' have no size"),
        (
            lambda: dims.spec("EDF", {"E": ("slice", "expert"), "D": ("expert",)}),
            "An array [E, D, F] would be sharded over mesh axis 'expert' twice",
        ),
    ],
)
def test_a_mistake_is_refused_in_one_sentence(make, message):
    """A mistake is one sentence: what was given, what is needed, what to do."""
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("data", "expert"), [(-1, 4), (2, -1), (2, 4)])
def test_the_rest_of_the_mesh(data, expert):
    """-1 means the rest."""
    assert dict(make_mesh(data=data, expert=expert).shape) == dict(zip(AXES, (1, 2, 1, 4, 1), strict=True))
