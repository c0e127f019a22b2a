"""Small instances of everything registered, layers made of them, the situations they are put in, and one
compiled training step per layer and mesh, which all law tests share (compiling is what tests spend time on).
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax import (
    GLU,
    MLP,
    Adaptive,
    AllGather,
    AllToAll,
    BASELayer,
    CosineTopK,
    Einsum,
    ExpertChoice,
    ExpertDropout,
    Gather,
    GatingDropout,
    Hash,
    Hierarchical,
    Ids,
    Importance,
    Jitter,
    Load,
    LoadBalance,
    LoadEntropy,
    LossFree,
    MixtureOfDepths,
    MoE,
    MoEConfig,
    Noise,
    NoisyTopK,
    NullExperts,
    RaggedAllToAll,
    Random,
    RoundRobin,
    RouterZ,
    Sampled,
    Scatter,
    Sinkhorn,
    SoftCap,
    SoftMoE,
    Sort,
    Switch,
    TaskTopK,
    Temperature,
    TokenEntropy,
    Top2,
    TopK,
    TopP,
    TwoLevel,
    UniformKL,
    make_mesh,
)
from moe_jax.core import dims
from moe_jax.core.shard import AXES, TOKEN_AXES, rules_for
from moe_jax.moe import check_mesh
from tests import oracle

ROUTERS = (
    Switch(),
    TopK(K=2),
    TopK(K=1, normalize=False),
    TopK(K=2, normalize=False),
    TopK(K=2, score="sigmoid"),
    TopK(K=2, score="sparsemax"),
    TopK(K=2, score="entmax15", normalize=False),
    Top2(second="always"),
    Top2(),
    Top2(threshold=0.9),
    NoisyTopK(K=2),
    NoisyTopK(K=2, learned=False, normalize=False),
    LossFree(K=2, groups=4, limit=2, scale=0.75),
    LossFree(K=1, score="softmax", normalize=False),
    CosineTopK(K=2, A=3),
    TopP(p=0.5, K=2),
    NullExperts(K=2, M=3),
    NullExperts(K=2, M=3, normalize=True),
    Sampled(K=2, temperature=0.5),
    Hierarchical(M=2, outer=1, inner=2),
    Hierarchical(M=4, outer=2, inner=1),
    TaskTopK(K=2, M=3, normalize=False),
    TaskTopK(K=2, M=3, token=False, normalize=False),
    Hash(K=2, seed=7),
    BASELayer(epsilon=0.001),
    Sinkhorn(K=2),
    Random(K=2),
    RoundRobin(K=2),
)
# Experts (or nobody) choose there.
SLOT_ROUTERS = (ExpertChoice(), SoftMoE(C=2), MixtureOfDepths(fraction=0.5))
GATING = (
    Temperature(2.0, 0.5, 10, "exponential"),
    Jitter(0.3),
    Noise(0.1),
    SoftCap(2.0),
    ExpertDropout(0.3),
    GatingDropout(0.3, islands=2),
)
EXPERTS = (MLP(F=5), MLP(F=5, activation="relu2", bias=True), GLU(F=5))
DISPATCHERS = (
    Einsum(1.0),
    Einsum(1.0, "probability"),
    Einsum(None),
    Scatter(1.0),
    Scatter(1.0, "probability"),
    Scatter(1.25, "token-major", "flaxformer"),
    Scatter(None),
    Sort(),
)
EXCHANGES = (AllToAll(), AllToAll(chunks=2), TwoLevel(), RaggedAllToAll(), AllGather())
LOSSES = (
    LoadBalance(),
    RouterZ(),
    Importance(),
    Load(),
    TokenEntropy(by_task=True),
    LoadEntropy(threshold=2.07),
    UniformKL(),
    Adaptive(LoadBalance()),
)

# Every registered component is in one of these, so that every law is tried on it.
USUAL = {
    "einsum": MoEConfig(E=8, router=Top2(), experts=GLU(F=6), dispatch=Einsum(1.0)),
    "scatter": MoEConfig(
        E=16,
        router=TopK(K=2),
        experts=MLP(F=6, bias=True),
        dispatch=Scatter(1.0, "choice-major"),
        shared=GLU(F=4),
        S=16,
    ),
    "dropless": MoEConfig(
        E=8,
        router=Switch(),
        experts=MLP(F=6, activation="silu"),
        dispatch=Scatter(None),
        exchange=AllGather(),
        gating=(Jitter(0.3),),
        S=2,
    ),
    "sort": MoEConfig(
        E=8, router=TopK(K=2, normalize=False), experts=GLU(F=6), dispatch=Sort(), exchange=RaggedAllToAll(), S=4
    ),
}


def layer(router, dispatch=None, E=8, **fields):
    return MoEConfig(E=E, router=router, experts=MLP(F=4), dispatch=dispatch or Scatter(1.0), **fields)


OTHERS = {
    "sparsemax": layer(TopK(K=3, score="sparsemax"), losses=(LoadBalance(0.1, scope="sequence"),), S=16),
    "noisy": layer(NoisyTopK(K=2), losses=(Importance(0.1), Load(0.1))),
    "loss_free": layer(
        LossFree(K=2, groups=4, limit=2, scale=2.5), losses=(Adaptive(LoadBalance(0.1, "sum", "group")),), S=16
    ),
    "cosine": layer(CosineTopK(K=2, A=3), Scatter(None), losses=(UniformKL(0.1), LoadEntropy(0.1))),
    "top_p": layer(
        TopP(p=0.5, K=3),
        losses=(TokenEntropy(0.1, by_task=True), LoadEntropy(0.1, threshold=1.5, by_task=True)),
        tasks=3,
    ),
    "null": layer(NullExperts(K=3, M=4), Scatter(1.0, "probability"), losses=(LoadBalance(0.1), RouterZ(0.1))),
    "sampled": layer(Sampled(K=2), losses=(Importance(0.1, "probs"), LoadBalance(0.1, "first"))),
    "hierarchical": layer(Hierarchical(M=4, outer=2, inner=2, normalize=True)),
    "task": layer(TaskTopK(K=2, M=3), Sort(), exchange=RaggedAllToAll()),
    "hash": layer(Hash(K=2), exchange=AllToAll(chunks=2), losses=()),
    "base": layer(BASELayer(epsilon=0.001), losses=()),
    "sinkhorn": layer(Sinkhorn(K=2), losses=()),
    "random": layer(Random(K=2), exchange=TwoLevel(), losses=()),
    "round_robin": layer(RoundRobin(K=1), losses=()),
    "expert_choice": layer(ExpertChoice(), Gather(), losses=(RouterZ(0.1),)),
    "soft": layer(SoftMoE(C=2), Einsum(None), losses=()),
    "depths": layer(MixtureOfDepths(fraction=0.5), Gather(), E=1, losses=()),
    "gating": layer(TopK(K=2), gating=GATING, losses=(LoadBalance(0.1),)),
}
LAYERS = USUAL | OTHERS
WITHOUT_ORACLE = ("gating",)  # compared with one device only
MESHES = ("d8", "d2e4", "e8", "f2e2t2")  # sizes of the axes that begin with these letters


def sizes_of(mesh: str) -> dict[str, int]:
    """`d2e4` -> {"data": 2, "expert": 4}."""
    return {next(a for a in AXES if a[0] == letter): int(n) for letter, n in re.findall(r"([a-z])(\d+)", mesh)}


def mesh_of(mesh: str) -> jax.sharding.Mesh:
    return make_mesh(**sizes_of(mesh))


def fits(cfg: MoEConfig, mesh: str) -> bool:
    try:
        check_mesh(cfg, sizes_of(mesh), D)
    except ValueError:
        return False
    return True


B, L, D = 16, 8, 4
ELSEWHERE = {"random": "s2e4", "hash": "s2e2t2", "loss_free": "f2e2t2", "depths": "d2f2t2", "soft": "f2e2t2"}
ON_MESH = [(name, m) for name, cfg in USUAL.items() for m in MESHES if fits(cfg, m)]
ON_MESH += [(name, ELSEWHERE.get(name, "d2e4")) for name in OTHERS]
SCENARIOS = ("drops", "ties", "flat", "empty", "one", "padding")
TRIED = [(name, what) for name in LAYERS for what in (SCENARIOS if name in USUAL else ("drops", "padding"))]
RATE = 0.1


class Batch(NamedTuple):
    x: np.ndarray
    mask: np.ndarray
    target: np.ndarray
    ids: Ids
    key: jax.Array
    state: dict


class Step(NamedTuple):
    """One training step of a layer, and all that can be seen of it."""

    loss: jax.Array
    y: jax.Array
    expert: jax.Array | None
    aux_loss: jax.Array
    stats: dict
    metrics: dict
    grads: dict
    grad_x: jax.Array
    params: dict
    state: dict  # what the layer remembers after the step


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@functools.cache
def shapes_of(cfg: MoEConfig) -> dict:
    """Shapes of a layer's parameters."""
    x = jax.ShapeDtypeStruct((B, L, D), jnp.float32)
    return jax.eval_shape(MoE(dataclasses.replace(cfg, S=None)).init, jax.random.key(0), x)["params"]


def scenario(name: str, what: str) -> tuple[dict, Batch]:
    """Parameters and a batch that force something; always the same shapes, so nothing is compiled again."""
    cfg = LAYERS[name]
    params = {n: 0.5 * normal(i, *s.shape) for i, (n, s) in enumerate(sorted(shapes_of(cfg).items()))}
    x, target, mask = normal(100, B, L, D), normal(101, B, L, D), np.ones((B, L), bool)
    x[..., 0] = 1  # the gate's first row is a bias
    gate = normal(102, D, cfg.E)
    if what == "drops":  # half of the experts are twice as popular
        gate[0, ::2] += 1
    if what == "ties":  # dyadic numbers, exact in any order of addition; experts and tokens in equal pairs
        x, gate = np.round(4 * x) / 4, np.round(4 * gate) / 4
        gate[:, 1::2], x[1::2] = gate[:, ::2], x[::2]
    if what == "flat":  # all logits 0: all tokens to the first experts
        gate[:] = 0
    if what == "empty":  # nobody goes to the upper half
        gate[0, gate.shape[1] // 2 :] = -20
    if what == "one":  # everybody goes to expert 2 first
        gate /= 8
        gate[0, 2] = 6
    if isinstance(cfg.router, CosineTopK):
        params["router_scale_"] = np.float32(-1)  # milder than a cosine over 0.07, which magnifies rounding
    if "router_gate_DE" in params:
        params["router_gate_DE"] = gate
    if what == "padding":  # two whole sequences (a shard of 8), ends of others, holes
        mask = np.arange(L)[None, :] < np.random.default_rng(103).integers(3, L + 1, B)[:, None]
        mask[:2], mask[5, 1] = False, False
    rng = np.random.default_rng(104)
    ids = Ids(rng.integers(0, 50, (B, L)), rng.integers(0, 3, (B, L)))
    state = {n: np.full_like(a, 3) if n == "step_" else 0.2 * normal(105, *a.shape) for n, a in states_of(cfg).items()}
    return params, Batch(x, mask, target, ids, jax.random.key(7), state)


@functools.cache
def states_of(cfg: MoEConfig) -> dict:
    return {n: np.asarray(a) for n, a in cfg.init_state().items()}


def given(name: str, batch: Batch) -> oracle.Given:
    """Further inputs of the oracle: above all what is drawn.

    Group g, counted over the whole batch, has the g-th key folded in; its i-th transform has i + 1 folded in there.
    """
    cfg = LAYERS[name]
    S = cfg.S or L
    keys = [jax.random.fold_in(batch.key, g) for g in range(B * L // S)]
    times = 1.0
    for i, transform in enumerate(cfg.gating):
        if isinstance(transform, Jitter):
            low, high = 1 - transform.size, 1 + transform.size
            folded = [jax.random.fold_in(k, i + 1) for k in keys]
            times = np.stack([jax.random.uniform(k, (S, D), minval=low, maxval=high) for k in folded])
    ids = [np.asarray(a).reshape(-1, S) for a in batch.ids[:2]]
    state = {n: np.asarray(a, np.float64) for n, a in batch.state.items()}
    return oracle.Given(noise(cfg.router, keys, S, cfg.E), np.asarray(times, np.float64), state, *ids, cfg.E)


def noise(router, keys, S: int, E: int) -> list | None:
    """Draws of a router for each group."""
    draw = {
        Top2: lambda k: jax.random.uniform(k, (S,)),
        NoisyTopK: lambda k: jax.random.normal(k, (S, E)),
        Sampled: lambda k: jax.random.gumbel(k, (S, E)),
        Random: lambda k: jax.random.uniform(k, (S, E)),
        BASELayer: lambda k: np.zeros(()),  # it draws nothing, but trains otherwise than it evaluates
        Sinkhorn: lambda k: np.zeros(()),
    }.get(type(router))
    return None if draw is None else [np.asarray(draw(k), np.float64) for k in keys]


def context(mesh: str | None):
    return jax.set_mesh(mesh_of(mesh)) if mesh else nullcontext()


@functools.cache
def compiled(name: str, mesh: str | None) -> tuple[Callable, str]:
    """A training step of this layer on this mesh (None: one device), and its compiled text."""
    cfg = LAYERS[name]

    def loss(params, x, batch):
        y, aux = MoE(cfg).apply({"params": params}, x, batch.mask, batch.key, batch.state, batch.ids)
        task = (((y - batch.target) ** 2).sum(-1) * batch.mask).sum()
        return task + aux.loss, (y, aux)

    def step(params, batch):
        (value, (y, aux)), (grads, grad_x) = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, batch.x, batch)
        new = jax.tree.map(lambda p, g: p - RATE * g, params, grads)
        state = cfg.update_state(batch.state, aux.stats)
        stats = {n: v for n, v in aux.stats._asdict().items() if n != "sums"}
        return Step(value, y, aux.expert_BLK, aux.loss, stats, aux.metrics, grads, grad_x, new, state)

    params, batch = scenario(name, "drops")
    place, inputs, outputs = lambda tree: tree, None, None
    if mesh:
        on = partial(NamedSharding, mesh_of(mesh))
        layout = jax.tree.map(on, dims.specs(params, rules_for(cfg.exchange)))
        tokens = on(P(TOKEN_AXES))
        inputs = (layout, Batch(tokens, tokens, tokens, tokens, on(P()), on(P())))
        outputs = Step(*[None] * (len(Step._fields) - 2), layout, on(P()))
        place = lambda tree: jax.device_put(tree, inputs)  # noqa: E731
    with context(mesh):
        program = jax.jit(step, in_shardings=inputs, out_shardings=outputs).lower(params, batch).compile()
    return lambda params, batch: program(*place((params, batch))), program.as_text()


@functools.cache
def run(name: str, mesh: str | None, what: str) -> Step:
    return jax.tree.map(np.asarray, compiled(name, mesh)[0](*scenario(name, what)))


def close(actual, expected, rel: float = 1e-5, least: float = 0.0) -> None:
    """Every array of a tree within rel of the largest number of the expected one, or of `least`."""

    def check(path, a, e):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        where = jax.tree_util.keystr(path)
        size = np.abs(np.nan_to_num(e)).max(initial=0)
        np.testing.assert_allclose(a, e, rtol=rel, atol=rel * max(size, least), err_msg=where)

    jax.tree.map_with_path(check, actual, expected)
