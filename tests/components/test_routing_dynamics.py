"""Routing while it trains: one MoE layer on clustered tokens, where the outcome is known.

A token belongs to one of eight Gaussian clusters, which are not equally frequent; its target is a random linear map
of its cluster and a ReLU. All clusters share a mean, as hidden states do: it lets the expert that starts ahead win all
tokens. Every claim is made of three seeds (other clusters, tokens and parameters), trained in one program.
"""

from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax.core.context import Ids
from moe_jax.dispatch import Scatter
from moe_jax.experts import MLP
from moe_jax.gating import ExpertDropout, Temperature
from moe_jax.losses import Adaptive, Importance, Load, LoadBalance, LoadEntropy, TokenEntropy, UniformKL
from moe_jax.moe import MoE, MoEConfig
from moe_jax.routers import BASELayer, LossFree, NoisyTopK, NullExperts, Random, Sinkhorn, Switch, TopK, TopP

SEEDS, STEPS, HELD_OUT, LATE = 3, 200, 8, 20  # runs; batches to train on and to keep; the last steps, averaged
B, L, D, C, E = 2, 128, 16, 8, 8  # C clusters
SHARE_C = np.array([0.25, 0.2, 0.15, 0.12, 0.1, 0.08, 0.06, 0.04])


class Batches(NamedTuple):
    """Arrays of all seeds, then of all batches: [seed, batch, B, L, ...]."""

    cluster: np.ndarray
    x: np.ndarray
    y: np.ndarray

    def held_out(self):
        """The tokens [seed, B, L, ...] of the batches that nothing is trained on, as one."""
        return Batches(*(a[:, STEPS:].reshape(SEEDS, HELD_OUT * B, L, *a.shape[4:]) for a in self))


class Run(NamedTuple):
    """A trained layer of every seed."""

    params: Any
    state: Any
    curves: dict[str, np.ndarray]  # [seed, step, ...]
    batches: Batches

    def late(self, name):
        """The mean [seed] of the last steps."""
        return self.curves[name][:, -LATE:].mean(1)

    def early(self, name):
        return self.curves[name][:, :LATE].mean(1)

    def moved(self, name):
        """Change of the state by every step, [seed, step, ...]."""
        return np.diff(np.concatenate([self.curves[name], self.state[name][:, None]], axis=1), axis=1)

    @property
    def counts(self):
        """Choices of every expert [seed, step, E], counted here."""
        return (self.curves["expert"][..., None] == np.arange(E)).sum((2, 3, 4))


@cache
def tokens(mean, idle):
    """Clusters around a shared mean; those in `idle` have the target 0."""

    def of(seed):
        rng = np.random.default_rng(seed)
        center_CD = mean + rng.standard_normal((C, D))
        map_CDD = rng.standard_normal((C, D, D)) / D**0.5
        map_CDD[list(idle)] = 0
        cluster = rng.choice(C, (STEPS + HELD_OUT, B, L), p=SHARE_C)
        x = center_CD[cluster] + 0.4 * rng.standard_normal((*cluster.shape, D))
        y = np.zeros_like(x)
        for c, map_DD in enumerate(map_CDD):
            y[cluster == c] = np.maximum(x[cluster == c] @ map_DD, 0)
        return Batches(cluster, x.astype(np.float32), y.astype(np.float32))

    return Batches(*map(np.stack, zip(*map(of, range(SEEDS)), strict=True)))


def weights(layer, seed, gate):
    """Parameters drawn here: the router's with std `gate` / sqrt(fan in), the others' with 1 / sqrt(fan in)."""
    rng = np.random.default_rng(100 + seed)

    def draw(path, a):
        scale = gate if "router" in jax.tree_util.keystr(path) else 1.0
        return (scale / a.shape[-2] ** 0.5 * rng.standard_normal(a.shape)).astype(np.float32)

    return jax.tree.map_with_path(draw, jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((B, L, D))))


def config(router, *losses, gating=()):
    """Room for all tokens at every expert, so that load alone is what suffers."""
    everyone = Scatter(capacity_factor=float(E))
    return MoEConfig(E=E, router=router, experts=MLP(F=16), dispatch=everyone, losses=losses, gating=gating)


@cache
def train(cfg, steps=STEPS, mean=2.0, idle=(), gate=1.0):
    """Adam on the squared error and the layer's own losses; every metric, choice and state of every step."""
    layer, adam, batches = MoE(cfg), optax.adam(0.01), tokens(mean, idle)

    def step(carry, batch):
        (params, moments, state), (x_BLD, y_BLD, key) = carry, batch

        def loss(params):
            out_BLD, aux = layer.apply(params, x_BLD, None, key if cfg.random else None, state)
            task = ((out_BLD - y_BLD) ** 2).mean()
            return task + aux.loss, (task, aux)

        (_, (task, aux)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, moments = adam.update(grads, moments)
        seen = {"task": task, "expert": aux.expert_BLK, "router": router_of(params), **state, **aux.metrics}
        return (optax.apply_updates(params, updates), moments, cfg.update_state(state, aux.stats)), seen

    def run(params, x, y, keys):
        (params, _, state), curves = jax.lax.scan(step, (params, adam.init(params), cfg.init_state()), (x, y, keys))
        return params, state, curves

    params = jax.tree.map(lambda *a: np.stack(a), *(weights(layer, seed, gate) for seed in range(SEEDS)))
    keys = jax.random.split(jax.random.key(0), (SEEDS, steps))
    out = jax.jit(jax.vmap(run))(params, batches.x[:, :steps], batches.y[:, :steps], keys)
    return Run(*jax.tree.map(np.asarray, out), batches)


def router_of(params):
    return {name: a for name, a in params["params"].items() if name.startswith("router")}


def information(run):
    """Mutual information of cluster and expert in the last steps, nats, per seed."""
    joint = np.zeros((SEEDS, C, E))
    steps = run.curves["expert"].shape[1]
    for seed in range(SEEDS):
        cluster, expert = run.batches.cluster[seed, :steps][-LATE:], run.curves["expert"][seed, -LATE:, ..., 0]
        np.add.at(joint[seed], (cluster, expert), 1 / cluster.size)
    apart = joint.sum(1, keepdims=True) * joint.sum(2, keepdims=True)
    return (joint * np.log(np.where(joint > 0, joint / np.maximum(apart, 1e-12), 1))).sum((1, 2))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def entropy(p):
    return -(p * np.log(np.maximum(p, 1e-30))).sum(-1)


COLLAPSING, BALANCED = config(Switch()), config(Switch(), LoadBalance(0.1))
NOISY = NoisyTopK(K=1, learned=False, normalize=False)


def loss_free(rate):
    return config(LossFree(K=1, normalize=False, rate=rate))


def test_without_balancing_the_load_collapses():
    """Few experts take most of the tokens, although all could hold them; the metrics say so, and say it exactly."""
    run = train(COLLAPSING)
    assert (run.late("load_max_over_mean") > 3).all()  # of at most 8
    assert (run.late("dead_experts") > 2).all()
    assert (run.late("load_entropy") < np.log(E) - 0.6).all()
    assert (run.late("task") < run.early("task") / 2).all()  # it is not that nothing was learnt
    load = run.counts / (B * L)
    np.testing.assert_allclose(run.curves["load"], load, atol=1e-6)
    np.testing.assert_allclose(run.curves["load_entropy"], entropy(load), atol=1e-5)
    np.testing.assert_allclose(run.curves["load_max_over_mean"], E * load.max(-1), rtol=1e-5)
    np.testing.assert_array_equal(run.curves["dead_experts"], (load == 0).sum(-1))


@pytest.mark.parametrize(
    ("router", "loss"),
    [
        (Switch(), LoadBalance(0.1)),
        (Switch(), Importance(0.3)),
        (Switch(), LoadEntropy(0.3)),
        (Switch(), UniformKL(0.3)),
        (NOISY, Load(0.3)),
    ],
    ids=lambda part: type(part).__name__,
)
def test_balancing_losses_balance(router, loss):
    """The same run with the loss has a more equal load, by entropy and by variation."""
    without, balanced = train(config(router)), train(config(router, loss))
    assert (balanced.late("load_entropy") > without.late("load_entropy") + 0.3).all()
    assert (balanced.late("load_cv") < 0.8 * without.late("load_cv")).all()


def test_loss_free_balances_by_its_bias():
    """No auxiliary loss, and balance; after each step the bias moves by `rate` towards the mean load."""
    without, run = train(loss_free(rate=0.0)), train(loss_free(rate=0.02))
    assert (run.late("max_violation") < without.late("max_violation") / 2).all()
    missing = run.counts.mean(-1, keepdims=True) - run.counts
    np.testing.assert_allclose(run.moved("bias_E"), 0.02 * np.sign(missing), atol=1e-6)
    assert not without.curves["bias_E"].any()


def test_no_weight_sees_the_bias():
    """The bias changes choices only: given them, the output and the weights are those without bias."""
    run, layer = train(loss_free(rate=0.02)), MoE(loss_free(rate=0.02))
    params, state, x_BLD = jax.tree.map(lambda a: a[0], (run.params, run.state, run.batches.held_out().x))

    @jax.jit
    def outputs(params, x_BLD, state):
        unbiased = jax.tree.map(jnp.zeros_like, state)
        y_BLD, aux = layer.apply(params, x_BLD, state=state)
        same_BLD, _ = layer.apply(params, x_BLD, state=unbiased, ids=Ids(expert_BLK=aux.expert_BLK))
        other_BLD, _ = layer.apply(params, x_BLD, state=unbiased)
        return y_BLD, same_BLD, other_BLD, aux

    y_BLD, same_BLD, other_BLD, aux = outputs(params, x_BLD, state)
    np.testing.assert_allclose(y_BLD, same_BLD, atol=1e-5)
    assert (np.abs(y_BLD - other_BLD).max(-1) > 0.01).mean() > 0.05
    score_BLE = 1 / (1 + np.exp(-x_BLD @ params["params"]["router_gate_DE"]))
    chosen_BLE = np.asarray(aux.expert_BLK) == np.arange(E)
    np.testing.assert_allclose(aux.stats.combine_E, (score_BLE * chosen_BLE).sum((0, 1)), rtol=1e-4)


def test_base_balances_every_step():
    """Every step of training is balanced to the token, and it learns."""
    run = train(config(BASELayer(epsilon=0.5)), steps=40)
    np.testing.assert_array_equal(run.counts, B * L // E)
    assert (run.late("task") < 0.6 * run.curves["task"][:, 0]).all()


def test_sinkhorn_balances_and_remembers_how():
    """Training is balanced by iterating; evaluation, which may not iterate, by the potential that training left."""
    without, run = train(COLLAPSING), train(cfg := config(Sinkhorn()), steps=50)
    assert (run.late("load_cv") < 0.5 * without.curves["load_cv"][:, 30:50].mean(1)).all()

    @jax.jit
    @jax.vmap
    def load_cv(params, x_BLD, state):
        return MoE(cfg).apply(params, x_BLD, None, None, state)[1].metrics["load_cv"]

    x_BLD = run.batches.held_out().x
    remembered, forgotten = (load_cv(run.params, x_BLD, s) for s in (run.state, jax.tree.map(np.zeros_like, run.state)))
    assert (remembered < 0.85 * forgotten).all()


def test_temperature_is_annealed():
    """From soft to hard: each step has the temperature of the schedule, and the router's entropy follows."""
    run = train(config(Switch(), LoadBalance(0.1), gating=(Temperature(4.0, 0.3, STEPS, "exponential"),)))
    constant = train(BALANCED)
    assert (run.early("router_entropy") > constant.early("router_entropy") + 0.15).all()
    assert (run.late("router_entropy") < constant.late("router_entropy") - 0.2).all()
    temperature = 4.0 * (0.3 / 4.0) ** (np.arange(STEPS) / STEPS)
    logits = np.einsum("ntbld,ntde->ntble", run.batches.x[:, :STEPS], run.curves["router"]["router_gate_DE"])
    expected = entropy(softmax(logits / temperature[None, :, None, None, None])).mean((2, 3))
    np.testing.assert_allclose(run.curves["router_entropy"], expected, rtol=1e-3, atol=1e-4)


def test_expert_dropout_keeps_experts_alive():
    """Where some experts never learn, dropping others has everyone used, and more of them useful on their own."""
    alone, dropout = (train(config(TopK(K=2), gating=g)) for g in ((), (ExpertDropout(0.5),)))
    used = [(run.counts[:, -50:].sum(1) > 0).sum() for run in (alone, dropout)]
    assert used[1] >= used[0] + 4  # of 24 experts
    assert used[1] >= SEEDS * E - 1
    assert (useful(dropout) >= useful(alone) + 2).all()


def useful(run):
    """Number of experts [seed] that halve the error of predicting nothing when every token goes to them alone."""

    @jax.jit
    @partial(jax.vmap, in_axes=(0, 0, 0, None))
    @partial(jax.vmap, in_axes=(None, None, None, 0))
    def loss(params, x_BLD, y_BLD, e):
        nowhere = jnp.full(x_BLD.shape[:2], E)
        ids = Ids(expert_BLK=jnp.stack([jnp.full_like(nowhere, e), nowhere], axis=-1))
        return ((MoE(config(TopK(K=2))).apply(params, x_BLD, ids=ids)[0] - y_BLD) ** 2).mean()

    _, x, y = run.batches.held_out()
    return (loss(run.params, x, y, np.arange(E)) < (y**2).mean((1, 2, 3))[:, None] / 2).sum(-1)


def test_top_p_uses_fewer_experts_where_tokens_are_decided():
    """TokenEntropy lowers the experts per token, and the task does not suffer."""
    router, balance = TopP(p=0.7, K=8), LoadBalance(0.1)
    without, run = (train(config(router, balance, *loss), mean=0.0) for loss in ((), (TokenEntropy(0.03),)))
    assert (run.late("active_experts") < without.late("active_experts") - 0.3).all()
    assert (run.late("active_experts") >= 1).all()
    assert (run.late("task") < 2 * without.late("task")).all()


def test_null_experts_save_where_there_is_nothing_to_do():
    """Tokens of clusters with the target 0 come to use fewer experts than the others."""
    idle = (1, 3, 5, 7)
    run = train(config(NullExperts(K=4, M=8), LoadBalance(0.1)), mean=0.0, idle=idle, gate=0.02)
    active = (run.curves["expert"][:, -LATE:] < E).sum(-1)
    np.testing.assert_allclose(active.mean((1, 2, 3)), run.late("active_experts"), rtol=1e-5)
    is_idle = np.isin(run.batches.cluster[:, :STEPS][:, -LATE:], idle)
    for seed in range(SEEDS):
        assert active[seed][is_idle[seed]].mean() < active[seed][~is_idle[seed]].mean() - 0.7


def test_adaptive_weight_grows_until_there_is_balance():
    """A weight too small to balance becomes one that does: up after over-capacity, down after none."""
    fixed = train(config(Switch(), LoadBalance(0.01)))
    run = train(config(Switch(), Adaptive(LoadBalance(0.01), most=1000.0)))
    assert (run.late("load_entropy") > fixed.late("load_entropy") + 0.3).all()
    over = np.maximum(run.counts / (B * L) - 1.25 / E, 0).sum(-1) > 0.01
    weight, most = run.curves["log_weight_"], np.log(1000.0)
    expected = np.minimum(weight + np.where(over, np.log(1.05), -np.log(1.05)), most) - weight
    np.testing.assert_allclose(run.moved("log_weight_"), expected, atol=1e-5)
    assert (weight.max(1) > np.log(10)).all()
    assert not over.all(1).any()  # and at last it rests


def test_the_router_finds_the_clusters():
    """Where the load is balanced, a token's expert tells its cluster; at random it tells nothing."""
    assert (information(train(config(Switch(), LoadEntropy(0.3)))) > np.log(C) / 2).all()
    assert (information(train(config(Random(K=1)), steps=LATE)) < 0.05).all()
