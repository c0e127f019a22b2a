"""Transforms of what a router sees, dropout of experts, and replay, around every kind of router."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import moe, moe_config
from moe_jax.core import gate
from moe_jax.core.context import Context, Ids
from moe_jax.core.routing import SoftSlots, TokenChoice
from moe_jax.core.shard import Shard
from moe_jax.core.traits import traits
from moe_jax.dispatch import Einsum, Scatter
from moe_jax.experts import MLP
from moe_jax.gating import GATING, ExpertDropout, GatingDropout, Jitter, Noise, SoftCap, Temperature
from moe_jax.losses import LoadBalance, RouterZ
from moe_jax.moe import MoE, MoEConfig
from moe_jax.routers import (
    ROUTERS,
    BASELayer,
    CosineTopK,
    ExpertChoice,
    Hash,
    Hierarchical,
    LossFree,
    NoisyTopK,
    NullExperts,
    Random,
    RoundRobin,
    Sampled,
    Sinkhorn,
    SoftMoE,
    Switch,
    TaskTopK,
    Top2,
    TopK,
    TopP,
)
from tests import oracle_routing as oracle

G, S, D, E, TASKS = 4, 6, 3, 8, 3
KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X_GSD = RNG.normal(size=(G, S, D)).astype(np.float32)
MASK_GS = RNG.permuted(np.arange(S)[None] < np.array([[6], [5], [4], [5]]), axis=1)  # real tokens
TOKEN_GS, TASK_GS = RNG.integers(0, 1000, (G, S)), RNG.integers(0, TASKS, (G, S))
STATE = {"bias_E": RNG.normal(size=E).astype(np.float32), "potential_E": RNG.normal(size=E).astype(np.float32)}
DROPOUTS = (ExpertDropout, GatingDropout)


def params_of(router) -> dict:
    """Random parameters, of any router."""
    sizes = {**moe_config.sizes_of(router), "E": E, "D": D}
    rng = np.random.default_rng(1)
    return {n: rng.normal(size=moe.dims.shape_of(moe.dims.dims_of(n), sizes)).astype(np.float32) for n in router.params}


def context(key=None, gating=(), replay_GSK=None, state=None) -> Context:
    """Context as a layer gives it to its router; without a key, in evaluation."""
    groups = jnp.arange(G)
    keys_G = None if key is None else jax.vmap(functools.partial(jax.random.fold_in, key))(groups)
    ids = (jnp.array(TOKEN_GS), jnp.array(TASK_GS), replay_GSK)
    return Context(E, keys_G, key, jax.tree.map(jnp.asarray, STATE | (state or {})), *ids, gating, groups)


def route(router, ctx: Context, params=None):
    """The routing of the example's tokens."""
    return router(jax.tree.map(jnp.asarray, params or params_of(router)), jnp.array(X_GSD), jnp.array(MASK_GS), ctx)


def transformed(gating, array_GSI, key=None, **state):
    """Applies a tuple of transforms to logits or inputs."""
    ctx = context(key, gating, state=state)
    on_input = all(t.on == "input" for t in gating)
    return (ctx.input if on_input else ctx.transform)(jnp.asarray(array_GSI))


# ---- Transforms of logits and input


@pytest.mark.parametrize("shape", ["constant", "linear", "exponential", "cosine"])
def test_temperature_follows_its_schedule(shape):
    """From start to end in so many steps, then it stays; it divides the logits, in evaluation too."""
    fields = {"steps": 0} if shape == "constant" else {"steps": 10, "shape": shape}
    t = Temperature(start=2.0, end=0.3, **fields)
    steps = np.array([0, 1, 3, 5, 9, 10, 11, 1000])
    expected = [oracle.temperature(shape, step, 2.0, 0.3, 10) for step in steps]
    np.testing.assert_allclose(jnp.stack([t.at(int(step)) for step in steps]), expected, rtol=1e-6)
    logits_GSE = RNG.normal(size=(G, S, E)).astype(np.float32)
    for key in (None, KEY):
        got = transformed((t,), logits_GSE, key, step_=np.int32(3))
        np.testing.assert_allclose(got, logits_GSE / oracle.temperature(shape, 3, 2.0, 0.3, 10), rtol=1e-5)


def test_temperature_in_a_layer():
    """The layer's state counts its updates; a layer that is called without is told what to do."""
    t = Temperature(start=4.0, end=0.5, steps=2, shape="linear")
    cfg = MoEConfig(E=E, router=TopK(K=2), experts=MLP(F=2), dispatch=Scatter(), gating=(t,))
    layer, state = MoE(cfg), cfg.init_state()
    assert {n: (a.shape, a.dtype) for n, a in cfg.init_state(3).items()} == {"step_": ((3,), jnp.int32)}
    params = jax.jit(layer.init)(KEY, X_GSD)
    logits = X_GSD.astype(np.float64).reshape(-1, D) @ np.float64(params["params"]["router_gate_DE"])
    apply = jax.jit(lambda params, state: layer.apply(params, jnp.array(X_GSD), state=state)[1])
    for step in range(4):
        aux = apply(params, state)
        now = oracle.temperature("linear", step, 4.0, 0.5, 2)
        np.testing.assert_allclose(aux.metrics["router_z"], oracle.router_z(logits / now), rtol=1e-5)
        state = cfg.update_state(state, aux.stats)
    assert state == {"step_": 4}
    with pytest.raises(ValueError, match="keeps step_ from step to step, but was called without"):
        layer.apply(params, jnp.array(X_GSD))


def test_soft_cap():
    """cap * tanh(logits / cap)."""
    logits_GSE = 20 * RNG.normal(size=(G, S, E)).astype(np.float32)
    got = transformed((SoftCap(5.0),), logits_GSE)
    np.testing.assert_allclose(got, oracle.soft_cap(logits_GSE.astype(np.float64), 5.0), rtol=1e-5)
    assert 4.9 < np.abs(got).max() <= 5


def test_the_tuple_is_the_order():
    """Cap, then temperature, is not temperature, then cap."""
    logits_GSE = RNG.normal(size=(G, S, E)).astype(np.float32)
    cap, cool = SoftCap(1.0), Temperature(0.5)
    first, second = transformed((cap, cool), logits_GSE), transformed((cool, cap), logits_GSE)
    np.testing.assert_allclose(first, oracle.soft_cap(logits_GSE, 1.0) / 0.5, rtol=1e-5)
    np.testing.assert_allclose(second, oracle.soft_cap(logits_GSE / 0.5, 1.0), rtol=1e-5)
    logits = [route(TopK(), context(None, gating)).logits_GSE for gating in ((cap, cool), (cool, cap), ())]
    np.testing.assert_allclose(logits[0], oracle.soft_cap(logits[2], 1.0) / 0.5, rtol=1e-5)
    np.testing.assert_allclose(logits[1], oracle.soft_cap(logits[2] / 0.5, 1.0), rtol=1e-5)


@pytest.mark.parametrize("noise", [Jitter(0.3), Noise(0.5), Noise(0.5, on="input")], ids=str)
def test_noise_has_its_distribution_and_differs_everywhere(noise):
    """Noise has its distribution, none in evaluation, and differs by group, step and place in the tuple."""
    a_GSI = RNG.uniform(1, 2, (G, 1000, 2)).astype(np.float32)
    got, n = transformed((noise,), a_GSI, KEY), a_GSI.size
    if isinstance(noise, Jitter):
        drawn, mean, std = got / a_GSI, 1, 0.3 / 3**0.5
        assert drawn.min() >= 0.7 - 1e-6
        assert drawn.max() <= 1.3 + 1e-6
        assert drawn.max() - drawn.min() > 0.59
    else:
        drawn, mean, std = got - a_GSI, 0, 0.5
        assert 0.004 < (np.abs(drawn) > 1).mean() - 0.0455 + 0.01 < 0.016  # two standard deviations of a Gaussian
    assert abs(drawn.mean() - mean) < 4 * std / n**0.5
    np.testing.assert_allclose(drawn.std(), std, rtol=0.05)
    assert len({float(drawn[g, 0, 0]) for g in range(G)}) == G
    np.testing.assert_array_equal(transformed((noise,), a_GSI), a_GSI)
    np.testing.assert_array_equal(transformed((noise,), a_GSI, KEY), got)
    assert (transformed((noise,), a_GSI, jax.random.key(1)) != got).any()
    twice = transformed((noise, noise), a_GSI, KEY)
    drawn = (twice / a_GSI - 1) if isinstance(noise, Jitter) else twice - a_GSI
    np.testing.assert_allclose(drawn.std(), 2**0.5 * std, rtol=0.08)  # independent: not twice


def test_no_two_draws_share_a_key():
    """The router's of each group, each transform's of each group, and those of a whole step have keys of their own."""
    ctx, places = context(KEY), range(3)
    keys = [ctx.keys_G, *(ctx._keys(i) for i in places), *(ctx._step_key(i)[None] for i in places), KEY[None]]
    drawn = np.concatenate([jax.random.key_data(k) for k in keys])
    assert len({key.tobytes() for key in drawn}) == len(drawn) == G + 3 * G + 3 + 1


@pytest.mark.parametrize("gating", [(Jitter(0.9), Noise(5.0, on="input")), (Noise(5.0), Temperature(3.0))], ids=str)
def test_experts_see_clean_tokens(gating):
    """A layer's output is that of the experts on its tokens as they are, with the choices of a noisy router."""
    cfg = MoEConfig(E=E, router=TopK(K=2), experts=MLP(F=2, activation="relu"), dispatch=Einsum(None), gating=gating)
    rng = np.random.default_rng(3)
    up_EDF, down_EFD = rng.normal(size=(E, D, 2)), rng.normal(size=(E, 2, D))
    params = {"router_gate_DE": params_of(cfg.router)["gate_DE"], "up_EDF": up_EDF, "down_EFD": down_EFD}
    params = jax.tree.map(jnp.float32, params)

    @jax.jit
    def run(key):
        ctx = moe.context(cfg, Shard(), {}, key, G, Ids())
        clean = route(cfg.router, context())
        return (
            route(cfg.router, ctx),
            clean,
            MoE(cfg).apply({"params": params}, jnp.array(X_GSD), jnp.array(MASK_GS), key),
        )

    r, clean, (y_BLD, aux) = run(KEY)
    np.testing.assert_array_equal(aux.expert_BLK, r.expert_GSK)
    assert (r.expert_GSK != clean.expert_GSK).any()
    expected = np.zeros((G, S, D))
    for g, s in zip(*np.nonzero(MASK_GS), strict=True):
        for e, w in zip(r.expert_GSK[g, s], r.weight_GSK[g, s], strict=True):
            expected[g, s] += w * (np.maximum(X_GSD[g, s] @ up_EDF[e], 0) @ down_EFD[e])
    np.testing.assert_allclose(y_BLD, expected, rtol=1e-4, atol=1e-5)


# ---- Experts out of reach

OFTEN = 0.9999  # as good as always
KINDS = (
    TopK(K=2),
    Switch(),
    Top2(),
    LossFree(K=2),
    LossFree(K=2, groups=4, limit=2),
    NoisyTopK(K=2),
    NullExperts(K=4, M=4),
    TopP(K=4, p=0.9),
    Hierarchical(M=4, outer=2, inner=2, normalize=True),
    Hash(K=2),
    RoundRobin(K=3),
    Random(K=2),
    BASELayer(),
    Sinkhorn(K=2),
    ExpertChoice(),
    SoftMoE(C=2),
)


class Given:
    """Drops the experts that the test says."""

    on, random = "experts", True

    def __call__(self, ctx, key):
        return ctx.state["dropped_GE"]


@functools.cache
def without(router):
    """(key, dropped_GE, bias_E) -> visits, gradients, routing in training: one compiled program."""

    def run(key, dropped_GE, bias_E):
        def total(params):
            ctx = context(key, (Given(),), state={"bias_E": bias_E, "dropped_GE": dropped_GE})
            r = route(router, ctx, params)
            return (r.combine_GSE * jnp.arange(1.0, E + 1)[None, None]).sum(), r

        grads, r = jax.grad(total, has_aux=True)(jax.tree.map(jnp.asarray, params_of(router)))
        assignments_GSE = (
            r.combine_GSE if isinstance(r, SoftSlots) else r.assignments_GSE
        )  # every slot is some mixture of tokens
        return assignments_GSE, grads, r

    return jax.jit(run)


def dropped(gating, seed: int):
    return np.asarray(context(jax.random.key(seed), (gating,)).dropped())


def finite(*trees) -> bool:
    return all(np.isfinite(a).all() for a in jax.tree.leaves(trees))


@pytest.mark.parametrize("router", KINDS, ids=str)
def test_a_dropped_expert_gets_nothing(router):
    """From any router, whatever its bias prefers, and in another step another one; gradients are numbers."""
    used_E, popular = np.zeros(E, bool), 0.0 if traits(router).groups > 1 else 100.0
    for seed in range(4):
        dropped_GE = dropped(ExpertDropout(0.5), seed)
        assert (dropped_GE == dropped_GE[:1]).all()  # one draw for all groups
        out_E = dropped_GE[0]
        assert 0 < out_E.sum() < E
        assignments_GSE, grads, r = without(router)(jax.random.key(seed), dropped_GE, popular * out_E)
        assert (assignments_GSE[..., out_E] == 0).all()
        assert (assignments_GSE.sum((0, 1)) > 0)[~out_E].any()
        used_E |= np.asarray(assignments_GSE.sum((0, 1)) > 0)
        assert finite(grads, r.combine_GSE)
    assert used_E.sum() > E / 2


@pytest.mark.parametrize("router", KINDS, ids=str)
def test_an_island_keeps_its_tokens(router):
    """Group g reaches experts of island g mod 2 alone, from any router; nothing dropped, it reaches others."""
    dropped_GE, none_GE = dropped(GatingDropout(OFTEN, islands=2), 0), np.zeros((G, E), bool)
    home_GSE = (np.arange(E)[None] // (E // 2) == np.arange(G)[:, None] % 2)[:, None]
    assignments_GSE, grads, _ = without(router)(KEY, dropped_GE, jnp.zeros(E))
    assert (np.where(home_GSE, 0, assignments_GSE) == 0).all()
    assert (assignments_GSE.sum((1, 2)) > 0).all()
    assert finite(grads)
    assert (np.where(home_GSE, 0, without(router)(KEY, none_GE, jnp.zeros(E))[0]) > 0).any()


@pytest.mark.parametrize("router", KINDS, ids=str)
def test_no_experts(router):
    """Gate-Expert-Drop: no token goes anywhere, from any router; logits are as they were, gradients are numbers."""
    assignments_GSE, grads, r = without(router)(KEY, dropped(GatingDropout(OFTEN), 0), jnp.zeros(E))
    assert (assignments_GSE == 0).all()
    assert (r.combine_GSE == 0).all()
    assert finite(grads)
    none_GE = np.zeros((G, E), bool)
    np.testing.assert_array_equal(r.logits_GSE, without(router)(KEY, none_GE, jnp.zeros(E))[2].logits_GSE)


def test_how_often_experts_are_dropped():
    """As often as the rate says, each for itself; never all of them."""
    keys = jax.random.split(KEY, 400)

    @functools.partial(jax.jit, static_argnums=0)
    def draws(dropout):
        return jax.vmap(lambda key: context(key, (dropout,)).dropped()[0])(keys)

    n, rate = len(keys), 0.3
    dropped_NE = draws(ExpertDropout(rate))
    assert (np.abs(dropped_NE.mean(0) - rate) < 4 * (rate * (1 - rate) / n) ** 0.5).all()
    assert abs(dropped_NE.mean() - rate) < 3 * (rate * (1 - rate) / (n * E)) ** 0.5
    assert abs(dropped_NE.sum(-1).var() - E * rate * (1 - rate)) < 0.4  # independent
    almost_NE = draws(ExpertDropout(0.999))
    assert ((~almost_NE).sum(-1) >= 1).all()
    assert ((~almost_NE).sum(-1) == 1).mean() > 0.95


@pytest.mark.parametrize("islands", [0, 2])
def test_how_often_gating_is_dropped(islands):
    """All or nothing, as often as the rate says; on islands group g reaches the experts of island g mod n."""
    keys, rate = jax.random.split(KEY, 200), 0.3
    gating = (GatingDropout(rate, islands),)
    dropped_NGE = np.asarray(jax.jit(jax.vmap(lambda key: context(key, gating).dropped()))(keys))
    away_GE = np.ones((G, E), bool)
    if islands:
        away_GE = np.arange(E)[None] // (E // islands) != np.arange(G)[:, None] % islands
    happened_N = dropped_NGE.any((1, 2))
    np.testing.assert_array_equal(dropped_NGE, happened_N[:, None, None] & away_GE[None])
    assert abs(happened_N.mean() - rate) < 3 * (rate * (1 - rate) / len(keys)) ** 0.5


def test_a_layer_without_experts():
    """The shared expert still works; the losses are numbers, of logits that nothing has touched."""
    shared = MLP(F=2, activation="relu")
    cfg = MoEConfig(
        E=E,
        router=TopK(K=2),
        experts=MLP(F=2),
        dispatch=Scatter(),
        gating=(GatingDropout(OFTEN),),
        shared=shared,
        losses=(LoadBalance(0.01), RouterZ(0.001)),
    )
    layer = MoE(cfg)
    params = jax.jit(layer.init)(KEY, X_GSD)
    run = jax.jit(lambda params, key: layer.apply(params, jnp.array(X_GSD), jnp.array(MASK_GS), key))
    y_BLD, aux = run(params, KEY)
    up_DF, down_FD = (np.asarray(params["params"][n]) for n in ("shared_up_DF", "shared_down_FD"))
    expected = np.maximum(X_GSD @ up_DF, 0) @ down_FD * MASK_GS[..., None]
    np.testing.assert_allclose(y_BLD, expected, rtol=1e-5, atol=1e-6)
    assert aux.stats.choices_E.sum() == aux.metrics["drop_rate"] == 0
    assert (aux.expert_BLK == E).all()
    _, evaluated = run(params, None)
    assert evaluated.metrics["active_experts"] == 2
    logits = X_GSD[MASK_GS].astype(np.float64) @ np.float64(params["params"]["router_gate_DE"])
    np.testing.assert_allclose(aux.loss, 0.001 * oracle.router_z(logits), rtol=1e-5)


# ---- Replay

REPLAYED = (
    Switch(),
    TopK(K=2),
    TopK(K=2, normalize=False),
    TopK(K=3, score="sigmoid"),
    TopK(K=4, score="sparsemax"),
    Top2(),
    NoisyTopK(K=2),
    LossFree(K=2, groups=4, limit=2),
    CosineTopK(K=2, A=2),
    TopP(K=4, p=0.3),
    NullExperts(K=4, M=4),
    NullExperts(K=4, M=4, normalize=True),
    Sampled(K=2),
    Hierarchical(M=4, outer=2, inner=2),
    Hierarchical(M=4, outer=2, inner=2, normalize=True),
    TaskTopK(K=2, M=TASKS),
    TaskTopK(K=2, M=TASKS, token=False, normalize=False),
    Hash(K=2),
    BASELayer(),
    Sinkhorn(K=2),
    Random(K=2),
    RoundRobin(K=2),
)


def test_every_router_of_tokens_is_replayed():
    """Every router that names experts for tokens can be recorded and replayed."""
    of_tokens = {r for r in ROUTERS if traits(r).routing is TokenChoice}
    assert {type(r) for r in REPLAYED} == of_tokens
    assert {t for t in GATING if t not in DROPOUTS} == {Temperature, SoftCap, Jitter, Noise}


@pytest.mark.parametrize("router", REPLAYED, ids=str)
def test_replayed_choices_give_the_same_routing(router):
    """Recorded choices give the same routing, bit for bit, in evaluation and with the same noise, without a draw of
    second choices or assignments; other choices are made as they are given, and train the router."""

    @jax.jit
    def run(params):
        recorded = {mode: route(router, context(key), params) for mode, key in (("evaluated", None), ("trained", KEY))}
        replayed = {
            "evaluated": route(router, context(None, (), recorded["evaluated"].expert_GSK), params),
            "trained": route(router, context(KEY, (), recorded["trained"].expert_GSK), params),
        }
        turned_GSK = (recorded["trained"].expert_GSK + 1) % (E + 1)  # of padding too: it stays nowhere

        def total(params):
            r = route(router, context(KEY, (), turned_GSK), params)
            return (r.weight_GSK * jnp.arange(1.0, router.K + 1)[None, None] ** 2).sum(), r

        grads, other = jax.grad(total, has_aux=True)(params)
        return recorded, replayed, turned_GSK, other, grads

    recorded, replayed, turned_GSK, other, grads = run(params_of(router))
    for mode, record in recorded.items():
        jax.tree.map(np.testing.assert_array_equal, replayed[mode], record)
        assert (record.expert_GSK[MASK_GS] < E).any()
    np.testing.assert_array_equal(other.expert_GSK, np.where(MASK_GS[..., None], turned_GSK, E))
    assert (other.expert_GSK != recorded["trained"].expert_GSK)[MASK_GS].any()
    assert (other.weight_GSK[other.expert_GSK == E] == 0).all()
    assert (other.weight_GSK[other.expert_GSK < E] > 0).any()
    for name, g in grads.items():
        assert np.isfinite(g).all()
        assert name in traits(router).untrained or (np.abs(g) > 0).any(), name


def test_replay_in_a_layer():
    """Choices that a layer reports give the same output when replayed, without dropout or selection."""
    cfg = MoEConfig(E=E, router=Top2(), experts=MLP(F=2), dispatch=Scatter(1.0), gating=(Noise(3.0),))
    layer = MoE(cfg)
    params = jax.jit(layer.init)(KEY, X_GSD)

    @jax.jit
    def run(params):
        y_BLD, aux = layer.apply(params, jnp.array(X_GSD), jnp.array(MASK_GS), KEY)
        ids = Ids(expert_BLK=aux.expert_BLK)
        again = [layer.apply(params, jnp.array(X_GSD), jnp.array(MASK_GS), key, ids=ids) for key in (KEY, None)]
        return (y_BLD, aux), *again

    (y_BLD, aux), (same_BLD, same), (clean_BLD, clean) = run(params)
    np.testing.assert_array_equal(same_BLD, y_BLD)
    np.testing.assert_array_equal(same.expert_BLK, aux.expert_BLK)
    np.testing.assert_array_equal(clean.expert_BLK, aux.expert_BLK)
    np.testing.assert_array_equal(clean.stats.choices_E, aux.stats.choices_E)
    assert (clean_BLD != y_BLD).any()  # the weights are those of logits without noise


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Temperature(shape="step"), "Temperature(shape='step') is unknown; use one of linear, exponential"),
        (lambda: Noise(on="experts"), "Noise(on='experts') is unknown; use 'input' or 'logits'"),
        (lambda: GatingDropout(islands=1), "GatingDropout(islands=1) must be 0 or at least 2"),
        (lambda: MoEConfig(E=4, gating=(GatingDropout(islands=3),)), "GatingDropout(islands=3) does not divide E=4"),
    ],
)
def test_a_mistake_is_refused_in_one_sentence(make, message):
    """A mistake is one sentence: what was given, what is needed, what to do."""
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        make()
    assert "\n" not in str(error.value)


def test_logits_in_parts():
    """On the matrix units of a GPU: as exact as float32, gradients too, where a rounded gate would be wrong by 2e-3."""
    rng = np.random.default_rng(2)
    x, w, g = (rng.normal(size=size).astype(np.float32) for size in ((2, 32, 96), (96, E), (2, 32, E)))
    x = jnp.asarray(x, jnp.bfloat16)
    y, (dx, dw) = jax.jit(gate.matmul_bf16x3)(x, w), jax.jit(gate.matmul_bf16x3_grad)(x, w, g)
    x, w, g = (np.asarray(a, np.float64) for a in (x, w, g))
    error = lambda got, exact: np.abs(np.asarray(got, np.float64) - exact).max() / np.abs(exact).max()  # noqa: E731
    assert error(y, x @ w) < 3e-7
    assert error(dw, np.einsum("gsd,gse->de", x, g)) < 3e-7
    assert error(dx, g @ w.T) < 2**-8
    assert (dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.float32)
    back = jnp.asarray(g @ w.T, jnp.bfloat16)
    assert (np.asarray(dx) != np.asarray(back)).mean() < 0.01, "rounded once, but for ties"
