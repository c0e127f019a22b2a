"""Auxiliary losses against their formulas in numpy, their gradients, and what is known of their values."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.attention import MHA, NoPE
from moe_jax.core.context import Context
from moe_jax.core.routing import TokenChoice, token_choice
from moe_jax.core.shard import Shard
from moe_jax.core.stats import stats
from moe_jax.data import Images, Pairs
from moe_jax.dispatch import Sort
from moe_jax.experts import MLP
from moe_jax.losses import (
    LOGGED,
    LOSSES,
    Adaptive,
    Importance,
    Load,
    LoadBalance,
    LoadEntropy,
    RouterZ,
    TokenEntropy,
    UniformKL,
    convert,
    is_additive,
)
from moe_jax.losses.load_balance import BALANCE_CONVENTIONS, balanced_value
from moe_jax.models import EncoderDecoderConfig, LMConfig, ViTConfig, aux_loss, layer_tokens
from moe_jax.moe import Aux, MoEConfig
from moe_jax.routers import NoisyTopK, NullExperts, TopK
from tests import oracle_routing as oracle

G, S, E, K, TASKS, B = 4, 6, 5, 2, 3, 3  # groups are not sequences: 4 x 6 tokens are 3 sequences of 8
ROUTER = TopK(K=K)


class Tokens:
    """A random routing with padding, and what the oracle needs of it, [T, ...] of real tokens."""

    def __init__(self, seed: int):
        rng = np.random.default_rng(seed)
        self.logits_GSE = rng.normal(0, 1.5, (G, S, E)).astype(np.float32)
        e_GSE = np.exp(self.logits_GSE)
        self.probs_GSE = e_GSE / e_GSE.sum(-1, keepdims=True)
        self.expert_GSK = np.argsort(rng.uniform(size=(G, S, E)) - self.probs_GSE, axis=-1)[..., :K]
        self.weight_GSK = rng.uniform(0.1, 1, (G, S, K)).astype(np.float32)
        self.load_GSE = rng.uniform(size=(G, S, E)).astype(np.float32)
        self.mask_GS = rng.uniform(size=(G, S)) < 0.8
        self.task_GS = rng.integers(0, TASKS, (G, S))

    def routing(self, **other) -> TokenChoice:
        arrays = vars(self) | other
        names = ("expert_GSK", "weight_GSK", "logits_GSE", "probs_GSE", "mask_GS", "load_GSE")
        return token_choice(*(jnp.asarray(arrays[n]) for n in names))

    def real(self, name: str, shape: tuple[int, int] = (1, G * S)) -> list[np.ndarray]:
        """Values of the real tokens, in float64, for each of so many parts of all tokens."""
        a, mask = (v.reshape(*shape, *v.shape[2:]) for v in (getattr(self, name), self.mask_GS))
        return [part[real].astype(int if "expert" in name else np.float64) for part, real in zip(a, mask, strict=True)]


@functools.partial(jax.jit, static_argnames=("B", "tasks"))
def sums(routing, task_GS, B=B, tasks=TASKS):
    return stats(routing, routing.expert_GSK < routing.E, B, task_GS, tasks)


@functools.cache
def example(seed: int = 0):
    t = Tokens(seed)
    return t, sums(t.routing(), t.task_GS)


def nothing():
    """The sums of a batch that is all padding."""
    return sums(Tokens(0).routing(mask_GS=np.zeros((G, S), bool)), Tokens(0).task_GS)


def spread(t: Tokens) -> np.ndarray:
    """Weights of the chosen, [T, E]."""
    (expert_TK,), (weight_TK,) = t.real("expert_GSK"), t.real("weight_GSK")
    return np.array([np.bincount(e, w, E) for e, w in zip(expert_TK, weight_TK, strict=True)])


def by_part(convention: str, shape: tuple[int, int]):
    """The mean of the loss of each part alone, by its tokens."""

    def loss(t: Tokens) -> float:
        parts = list(zip(t.real("expert_GSK", shape), t.real("probs_GSE", shape), strict=True))
        return sum(len(e) * oracle.load_balance(e, p, E, convention) for e, p in parts) / sum(len(e) for e, _ in parts)

    return loss


def of(loss, name: str, **options):
    """An oracle's loss of all real tokens."""
    return lambda t: loss(t.real(name)[0], **options)


def by_task(loss, **options):
    return lambda t: oracle.per_task(loss, t.real("task_GS")[0], t.real("probs_GSE")[0], **options)


SCOPES = {"batch": (1, G * S), "group": (G, S), "sequence": (B, G * S // B)}
WIDE = [c for c in BALANCE_CONVENTIONS if not BALANCE_CONVENTIONS[c].first]
ORACLE = {
    **{LoadBalance(convention=c): by_part(c, SCOPES["batch"]) for c in BALANCE_CONVENTIONS},
    **{LoadBalance(convention=c, scope=s): by_part(c, SCOPES[s]) for c in WIDE for s in ("group", "sequence")},
    RouterZ(): of(oracle.router_z, "logits_GSE"),
    Importance(): lambda t: oracle.importance(spread(t)),
    Importance(of="probs"): of(oracle.importance, "probs_GSE"),
    Load(): of(oracle.load, "load_GSE"),
    TokenEntropy(): of(oracle.token_entropy, "probs_GSE"),
    TokenEntropy(by_task=True): by_task(oracle.token_entropy),
    LoadEntropy(): of(oracle.load_entropy, "probs_GSE"),
    LoadEntropy(threshold=1.58): of(oracle.load_entropy, "probs_GSE", threshold=1.58),
    LoadEntropy(threshold=0.5): of(oracle.load_entropy, "probs_GSE", threshold=0.5),
    LoadEntropy(by_task=True): by_task(oracle.load_entropy),
    LoadEntropy(threshold=1.58, by_task=True): by_task(oracle.load_entropy, threshold=1.58),
    UniformKL(direction="forward"): of(oracle.uniform_kl, "probs_GSE", reverse=False),
    UniformKL(direction="reverse"): of(oracle.uniform_kl, "probs_GSE", reverse=True),
}
ADAPTIVE = Adaptive(LoadBalance(0.01, scope="group"), target=0.1)
ALL = (*ORACLE, ADAPTIVE)
STATE = {"log_weight_": jnp.array(0.5)}


def value(loss, s, router=ROUTER):
    return loss(s, STATE, router)


@pytest.mark.parametrize("loss", ORACLE, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_losses_equal_their_formulas(loss, seed):
    """The formula over all real tokens, in plain numpy."""
    t, s = example(seed)
    np.testing.assert_allclose(value(loss, s), ORACLE[loss](t), rtol=1e-5, atol=1e-7)


def test_the_examples_tell_the_losses_apart():
    """The examples above differ between scopes, conventions and tasks; thresholds bind and do not."""
    assert {type(loss) for loss in ALL} == set(LOSSES)
    values = {loss: float(value(loss, example()[1])) for loss in ORACLE}
    apart = [v for loss, v in values.items() if loss != LoadEntropy(threshold=0.5)]
    assert min(abs(a - b) for i, a in enumerate(apart) for b in apart[:i]) > 1e-4
    assert values[LoadEntropy(threshold=0.5)] == 0 < values[LoadEntropy(threshold=1.58)]
    t = example()[0]
    assert not t.mask_GS.all()
    assert set(t.task_GS[t.mask_GS]) == set(range(TASKS))


def test_a_task_without_tokens_counts_not():
    """The mean is over the tasks that are there; an id beyond them is none of them."""
    t = Tokens(0)
    few = np.where(t.task_GS == 1, TASKS, t.task_GS)
    s, mask_GS = sums(t.routing(), few), t.mask_GS & (few < TASKS)
    tokens = t.probs_GSE[mask_GS].astype(np.float64)
    for ours, theirs in ((TokenEntropy, oracle.token_entropy), (LoadEntropy, oracle.load_entropy)):
        expected = oracle.per_task(theirs, few[mask_GS], tokens)
        np.testing.assert_allclose(value(ours(by_task=True), s), expected, rtol=1e-5)


@pytest.mark.parametrize("loss", ALL, ids=str)
def test_any_number_of_tokens(loss):
    """Twice the same tokens are the same loss; of none, none but a threshold; layers may be stacked in front."""
    (_, one), (_, two) = example(0), example(1)
    np.testing.assert_allclose(value(loss, jax.tree.map(lambda a: 2 * a, one)), value(loss, one), rtol=1e-5, atol=1e-7)
    unmet = 0 if getattr(loss, "by_task", False) else getattr(loss, "threshold", None) or 0
    np.testing.assert_allclose(value(loss, nothing()), unmet)
    stacked = loss(jax.tree.map(lambda *a: jnp.stack(a), one, two), {"log_weight_": jnp.full(2, 0.5)}, ROUTER)
    np.testing.assert_allclose(stacked, [value(loss, one), value(loss, two)], rtol=1e-5, atol=1e-7)


def parts_of_example():
    """Sums of two groups each, uneven by padding, of groups without a token, and of all together."""
    t, first_G1 = Tokens(0), np.arange(G)[:, None] < 2
    masks = [t.mask_GS & first_G1, t.mask_GS & ~first_G1, np.zeros_like(t.mask_GS)]
    *parts, whole = [sums(t.routing(mask_GS=mask_GS), t.task_GS, B=2) for mask_GS in (*masks, t.mask_GS)]
    assert parts[0].tokens != parts[1].tokens
    return parts, whole


@pytest.mark.parametrize("loss", ALL, ids=str)
def test_what_is_additive_is_the_same_in_any_microbatches(loss):
    """A loss averaged over parts by their tokens is the whole's, an empty part included: exactly if it is additive."""
    parts, whole = parts_of_example()
    mean = sum(s.tokens * value(loss, s) for s in parts) / whole.tokens
    same = np.isclose(mean, value(loss, whole), rtol=1e-5, atol=1e-9)
    assert same == is_additive(loss) or value(loss, whole) == 0


def test_load_balance_of_microbatches_differs_by_a_covariance():
    """The loss exceeds the batch's by E sum_e cov(f_e, P_e) over microbatches, as docs/routing.md says."""
    (*parts, _), whole = parts_of_example()
    tokens = np.array([s.tokens for s in parts])
    f, P = (np.stack([s.choices_E / (K * s.tokens) for s in parts]), np.stack([s.probs_E / s.tokens for s in parts]))
    mean = lambda values: (tokens[:, None] * values).sum(0) / tokens.sum()  # noqa: E731
    covariance = E * (mean(f * P) - mean(f) * mean(P)).sum()
    averaged = sum(s.tokens * value(LoadBalance(), s) for s in parts) / whole.tokens
    np.testing.assert_allclose(averaged - value(LoadBalance(), whole), covariance, rtol=1e-3)
    assert covariance > 1e-3


def test_microbatches_are_weighted_layer_by_layer():
    """Two microbatches of a step: the encoder's layer has 30 + 10 tokens, the decoder's 5 + 15."""
    pair = Pairs(None, np.array([[1, 1, 2], [1, 0, 0]]), None, None, np.array([[1, 2, 0, 0], [1, 0, 0, 0]]), None, None)
    ffn, moe = MLP(F=4), MoEConfig(E=E, router=ROUTER)
    cfg = EncoderDecoderConfig(V=9, D=4, N=2, attention=MHA(1, 4), ffn=ffn, moe=moe, moe_layers="all")
    np.testing.assert_array_equal(layer_tokens(cfg, pair, Shard()), [4, 4, 3, 3])
    first, second = (
        Aux(jnp.array(loss), whole_stats._replace(tokens=jnp.array(tokens)))
        for whole_stats in [example()[1]]
        for loss, tokens in (([1.0, 1.0, 4.0, 4.0], [30.0, 30, 5, 5]), ([2.0, 2.0, 8.0, 8.0], [10.0, 10, 15, 15]))
    )
    tokens_N = jnp.array([40.0, 40, 20, 20])
    mean = ((30 * 1 + 10 * 2) / 40 + (5 * 4 + 15 * 8) / 20) / 2
    np.testing.assert_allclose(aux_loss(cfg, first, tokens_N) + aux_loss(cfg, second, tokens_N), mean, rtol=1e-6)
    image = Images(None, None, np.array([[True], [False], [True]]), None)
    attention, patches = MHA(1, 4, position=NoPE()), {"patch": 2, "image": (4, 4, 1)}
    vit = ViTConfig(V=9, D=4, N=1, attention=attention, ffn=ffn, moe=moe, moe_layers="all", **patches)
    np.testing.assert_array_equal(layer_tokens(vit, image, Shard()), [2 * 5])


@pytest.mark.law(7)
def test_padding_alone_has_no_gradient():
    """Where all is padding, or a probability is zero, derivatives are numbers."""
    t = Tokens(0)

    @jax.jit
    def gradient(probs_GSE, logits_GSE, mask_GS):
        def total(probs_GSE, logits_GSE):
            r = t.routing(probs_GSE=probs_GSE, logits_GSE=logits_GSE, mask_GS=mask_GS)
            return sum(value(loss, sums(r, t.task_GS)) for loss in ALL)

        return jax.grad(total, (0, 1))(probs_GSE, logits_GSE)

    for g in gradient(t.probs_GSE, t.logits_GSE, np.zeros((G, S), bool)):
        np.testing.assert_array_equal(g, 0)
    dead = np.where(np.arange(E) == 2, 0, t.probs_GSE)
    assert all(np.isfinite(g).all() for g in gradient(dead, t.logits_GSE, t.mask_GS))


FLOATS = ("weight_GSK", "logits_GSE", "probs_GSE", "load_GSE")
REACHES = {  # by class: what its gradient reaches
    LoadBalance: "probs_GSE",
    Adaptive: "probs_GSE",
    TokenEntropy: "probs_GSE",
    LoadEntropy: "probs_GSE",
    UniformKL: "probs_GSE",
    RouterZ: "logits_GSE",
    Load: "load_GSE",
}


@functools.cache
def gradients():
    """Gradients of every loss by every array that a router makes: one compiled program."""
    t = Tokens(0)

    def of_all(*floats):
        s = sums(t.routing(**dict(zip(FLOATS, floats, strict=True))), t.task_GS)
        return [value(loss, s) for loss in ALL]

    rows = jax.jit(jax.jacrev(of_all, range(len(FLOATS))))(*(getattr(t, n) for n in FLOATS))
    return {loss: dict(zip(FLOATS, row, strict=True)) for loss, row in zip(ALL, rows, strict=True)}


@pytest.mark.parametrize("loss", ALL, ids=str)
def test_gradients_flow_where_they_should(loss):
    """To probabilities, logits or weights of real tokens, and nowhere else; never through what was counted."""
    reached = REACHES.get(type(loss)) or {"weights": "weight_GSK", "probs": "probs_GSE"}[loss.of]
    mask_GS = Tokens(0).mask_GS
    for name, g in gradients()[loss].items():
        alive = name == reached and loss != LoadEntropy(threshold=0.5)  # satisfied
        some = np.any if getattr(loss, "threshold", None) else np.all  # a task may be satisfied
        assert some(np.abs(g[mask_GS]).max(-1) > 0) if alive else (g == 0).all(), name
        np.testing.assert_array_equal(g[~mask_GS], 0, name)


def test_the_gradient_of_load_balance_is_the_load():
    """d/dP of E * f . P, with f constant: E * f_e / T for every real token (Switch, sec. 2.2)."""
    t, _ = example()
    (expert_TK,) = t.real("expert_GSK")
    f_E = oracle.count(expert_TK, E) / expert_TK.size
    g = gradients()[LoadBalance()]["probs_GSE"][t.mask_GS]
    np.testing.assert_allclose(g, np.broadcast_to(E * f_E / len(expert_TK), g.shape), rtol=1e-5)


# ---- Load balance: conventions, coefficients, null experts


def even(collapsed: bool, K: int, E: int = 4):
    """The sums of E tokens that take turns among the experts, or that all choose the first K, of which all is one's."""
    first = np.zeros(E, int) if collapsed else np.arange(E)
    expert_GSK = (first[None, :, None] + np.arange(K)) % E
    probs_GSE = np.eye(E, dtype=np.float32)[first][None]
    mask_GS = jnp.ones((1, E), bool)
    arrays = (jnp.array(expert_GSK), jnp.ones((1, E, K)), jnp.array(probs_GSE), jnp.array(probs_GSE))
    return sums(token_choice(*arrays, mask_GS), None, 1, 1)


@pytest.mark.parametrize("K", [1, 2, 4])
def test_balanced_and_collapsed(K):
    """Balanced, every convention has its own value; with one expert's probability 1, E / K times as much, or E."""
    balanced = {"switch": 1, "first": 1, "gshard": 1 / 16, "sum": K, "mean": 1 / K}
    flat, one, router = even(False, K), even(True, K), TopK(K=K, normalize=False)
    for convention, expected in balanced.items():
        loss = LoadBalance(convention=convention)
        np.testing.assert_allclose(loss(flat, {}, router), expected, rtol=1e-6)
        assert expected == balanced_value(convention, 4, K)
        worst = 4 if BALANCE_CONVENTIONS[convention].first else 4 / K
        np.testing.assert_allclose(loss(one, {}, router), expected * worst, rtol=1e-6)
    for scope in SCOPES:
        np.testing.assert_allclose(LoadBalance(scope=scope)(flat, {}, router), 1, rtol=1e-6)


@pytest.mark.parametrize(("source", "target"), [(a, b) for a in BALANCE_CONVENTIONS for b in BALANCE_CONVENTIONS])
def test_a_converted_coefficient(source, target):
    """A converted coefficient gives the same weighted loss where the same choices count, and always in balance."""
    c = convert(0.01, source, target, E, K)
    a, b = LoadBalance(0.01, source), LoadBalance(c, target)
    np.testing.assert_allclose(convert(c, target, source, E, K), 0.01, rtol=1e-12)
    tried = [even(False, K, E)]
    if BALANCE_CONVENTIONS[source].first == BALANCE_CONVENTIONS[target].first:
        tried += [example(0)[1], example(1)[1]]
    for s in tried:
        np.testing.assert_allclose(a.weight * value(a, s), b.weight * value(b, s), rtol=1e-5)


def test_convert_over_layers():
    """Mixtral's 0.02 of layers added up is ours of layers averaged: the model's auxiliary loss is the same."""
    layers = 4
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *(example(seed)[1] for seed in range(layers)))
    summed = LMConfig(V=8, D=4, N=1, attention=MHA(1, 2), moe_layers="none", aux_over_layers="sum")
    meaned = LMConfig(V=8, D=4, N=1, attention=MHA(1, 2), moe_layers="none")
    theirs = LoadBalance(0.02, "sum")
    ours = LoadBalance(convert(0.02, "sum", "switch", E, K, layers, "sum", "mean"))
    losses = [Aux(loss.weight * loss(stacked, {}, ROUTER), stacked) for loss in (theirs, ours)]
    np.testing.assert_allclose(aux_loss(meaned, losses[1]), aux_loss(summed, losses[0]), rtol=1e-6)
    np.testing.assert_allclose(ours.weight, 0.02 * K * layers, rtol=1e-12)
    back = convert(ours.weight, "switch", "sum", E, K, layers, "mean", "sum")
    np.testing.assert_allclose(back, theirs.weight, rtol=1e-12)
    assert aux_loss(meaned, losses[0]) != aux_loss(summed, losses[0])
    assert aux_loss(meaned, None) == 0


def test_null_experts():
    """E * f . P over E + M experts, of which the null ones, written out, share the mean of their loads."""
    M, n = 3, E + 3
    router = NullExperts(K=4, M=M)
    rng = np.random.default_rng(0)
    params = {"gate_DE": rng.normal(size=(4, E)), "null_DM": rng.normal(size=(4, M))}
    x_GSD, mask_GS = rng.normal(size=(2, 8, 4)), rng.uniform(size=(2, 8)) < 0.8

    @jax.jit
    def run(params, x_GSD):
        r = router(params, x_GSD, jnp.array(mask_GS), Context(E))
        return stats(r, r.expert_GSK < E, 2)

    s = run(jax.tree.map(jnp.float32, params), jnp.float32(x_GSD))
    probs_TE = oracle.rows(
        oracle.softmax, x_GSD[mask_GS] @ np.concatenate([params["gate_DE"], params["null_DM"]], axis=1)
    )
    expert_TK = np.array([oracle.best(p, router.K) for p in probs_TE])
    f_E = oracle.count(expert_TK, n) / expert_TK.size
    assert len(set(f_E[E:])) > 1  # not already alike
    f_E[E:] = f_E[E:].mean()
    np.testing.assert_allclose(value(LoadBalance(), s, router), n * (f_E * probs_TE.mean(0)).sum(), rtol=1e-5)

    tokens = jnp.array(float(n))
    balanced = s._replace(tokens=tokens, choices_E=jnp.full(E, float(router.K)), probs_E=jnp.full(E, 1.0))
    np.testing.assert_allclose(value(LoadBalance(), balanced, router), 1, rtol=1e-6)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_uniform_kl_of_a_part(direction):
    """Where null experts have a part of the probability, the distribution is that over the others."""
    t, s = example()
    part = sums(t.routing(probs_GSE=0.6 * t.probs_GSE), t.task_GS)
    loss = UniformKL(direction=direction)
    np.testing.assert_allclose(value(loss, part), value(loss, s), rtol=1e-5)


# ---- Load, of a router that gives one


@pytest.mark.parametrize(
    "router",
    [NoisyTopK(K=2), NoisyTopK(K=2, normalize=False), NoisyTopK(K=1, learned=False, normalize=False)],
    ids=str,
)
def test_load_of_noise(router):
    """Shazeer's and V-MoE's smooth load, with the noise as the router draws it; in evaluation, what was chosen."""
    D = 3
    rng, keys_G = np.random.default_rng(2), jax.random.split(jax.random.key(3), G)
    params = {"gate_DE": rng.normal(size=(D, E)), "noise_DE": rng.normal(size=(D, E))}
    params = {n: params[n] for n in router.params}
    x_GSD, mask_GS = rng.normal(size=(G, S, D)), example()[0].mask_GS

    @jax.jit
    def run(params, x_GSD, keys_G):
        def load(params, keys_G):
            r = router(params, x_GSD, jnp.array(mask_GS), Context(E, keys_G))
            return Load()(stats(r, r.expert_GSK < E, G), {}, router)

        return (*jax.value_and_grad(load)(params, keys_G), load(params, None))

    given = (jax.tree.map(jnp.float32, params), jnp.float32(x_GSD))
    trained, grads, evaluated = run(*given, keys_G)
    for keys, actual in ((keys_G, trained), (None, evaluated)):
        parts = []
        for g in range(G):
            noise = None if keys is None else np.float64(jax.random.normal(keys[g], (S, E)))
            choice = oracle.noisy_topk(router, params, x_GSD[g], mask_GS[g], noise)
            parts.append(choice.load_SE[mask_GS[g]])
        np.testing.assert_allclose(actual, oracle.load(np.concatenate(parts)), rtol=1e-4)
    assert all((np.abs(g) > 0).any() and np.isfinite(g).all() for g in grads.values())


# ---- Adaptive


def test_adaptive_weight():
    """The weight grows while over capacity, shrinks while not, within its limits; each layer has its own."""
    adaptive = Adaptive(LoadBalance(0.5), target=0.1, capacity=1.25, rate=0.25, most=3.0)
    cfg = MoEConfig(E=E, router=ROUTER, experts=MLP(F=1), dispatch=Sort(), losses=(RouterZ(), adaptive))
    state = cfg.init_state(3)
    np.testing.assert_array_equal(state["log_weight_"], np.zeros(3))
    # of 40 choices 12 are above 1.25 times the mean of 8; 4, just the target; and none
    choices = jnp.array([[22.0, 10, 4, 4, 0], [14, 10, 8, 4, 4], [8, 8, 8, 8, 8]])
    s = jax.tree.map(lambda a: jnp.stack([a] * 3), example()[1])._replace(choices_E=choices)
    for step in range(1, 8):
        state = cfg.update_state(state, s)
        factor = min(1.25**step, 3.0)
        np.testing.assert_allclose(jnp.exp(state["log_weight_"]), [factor, 1 / factor, 1 / factor], rtol=1e-5)
    np.testing.assert_allclose(
        adaptive(s, state, ROUTER), np.array([3, 1 / 3, 1 / 3]) * LoadBalance()(s, {}, ROUTER), rtol=1e-5
    )
    assert adaptive.weight == 0.5


def test_what_is_logged():
    """The usual losses, without their coefficients, whatever the run is trained with."""
    _, s = example()
    metrics = Aux(jnp.zeros(()), s).metrics
    for name, loss in LOGGED.items():
        np.testing.assert_allclose(metrics[name], value(loss, s), rtol=1e-6)
    assert set(LOGGED) == {"load_balance", "router_z", "importance", "uniform_kl"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoadBalance(convention="hf"), "LoadBalance(convention='hf') is unknown; use one of switch, first,"),
        (lambda: LoadBalance(scope="token"), "LoadBalance(scope='token') is unknown; use one of batch, group, seq"),
        (lambda: LoadBalance(convention="first", scope="group"), "would need first choices of every group; use"),
        (lambda: Importance(of="gates"), "Importance(of='gates') is unknown; use 'weights' or 'probs'"),
        (lambda: UniformKL(direction="both"), "UniformKL(direction='both') is unknown; use 'forward' or 'reverse'"),
        (lambda: Adaptive("LoadBalance"), "wraps another loss, like Adaptive(LoadBalance(0.01))"),
        (lambda: convert(0.1, "hf", "switch", 8, 2), "Convention 'hf' is unknown; use one of switch, first, gshard,"),
        (lambda: convert(0.1, "switch", "hf", 8, 2), "Convention 'hf' is unknown"),
        (lambda: convert(0.1, "sum", "mean", 8, 2, 4, "max"), "Losses of layers are reduced by 'mean' or 'sum', not"),
        (lambda: convert(0.1, "sum", "mean", 8, 2, 4, "sum", "max"), "reduced by 'mean' or 'sum', not 'max'"),
        (lambda: MoEConfig(E=4, losses=(Load(),)), "Load() needs the load that a noisy router estimates, and TopK("),
        (
            lambda: MoEConfig(E=4, losses=(Adaptive(LoadBalance()), Adaptive(RouterZ()))),
            "keeps the weight of one Adaptive() loss; leave out the others",
        ),
        (
            lambda: MoEConfig(E=8, router=NullExperts(), losses=(Adaptive(LoadBalance(scope="group")),)),
            "does not count null experts; with NullExperts() use scope='batch'",
        ),
        (
            lambda: MoEConfig(E=8, router=NullExperts(normalize=True), losses=(RouterZ(), LoadBalance(0.0))),
            "has parameters that only LoadBalance() trains; add it to losses",
        ),
        (lambda: MoEConfig(E=4, losses=(Adaptive(Load()),)), "Load() needs the load that a noisy router"),
    ],
)
def test_a_mistake_is_refused_in_one_sentence(make, message):
    """A mistake is one sentence: what was given, what is needed, what to do."""
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        make()
    assert "\n" not in str(error.value)
