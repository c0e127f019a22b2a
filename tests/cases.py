"""Small instances of everything registered, layers made of them, the situations they are put in, and one
compiled training step per layer and mesh, which all law tests share (compiling is what tests spend time on).
"""

import dataclasses
import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.core.shard import make_mesh
from moe_jax.dispatch import Einsum, Scatter, Sort
from moe_jax.experts import GLU, MLP
from moe_jax.losses import load_balance, router_z
from moe_jax.moe import MoE, MoEConfig
from moe_jax.routers import Switch, Top2, TopK

ROUTERS = (
    Switch(),
    Switch(jitter=0.3),
    TopK(K=2),
    TopK(K=1, softmax="all"),
    TopK(K=2, softmax="all"),
    Top2(second="always"),
    Top2(),
)
EXPERTS = (MLP(F=5), MLP(F=5, activation="relu2", bias=True), GLU(F=5))
DISPATCHERS = (
    Einsum(1.0),
    Einsum(1.0, "probability"),
    Einsum(None),
    Scatter(1.0),
    Scatter(1.0, "probability"),
    Scatter(None),
    Sort(),
)
LOSSES = (load_balance, router_z)

# Every registered component is in one of these, so that every law is tried on it.
LAYERS = {
    "einsum": MoEConfig(E=8, router=Top2(), experts=GLU(F=5), dispatch=Einsum(1.0)),
    "scatter": MoEConfig(
        E=16,
        router=TopK(K=2),
        experts=MLP(F=5, bias=True),
        dispatch=Scatter(1.0, "choice-major"),
        shared=GLU(F=3),
        S=16,
    ),
    "dropless": MoEConfig(
        E=8, router=Switch(jitter=0.3), experts=MLP(F=5, activation="silu"), dispatch=Scatter(None), S=2
    ),
    "sort": MoEConfig(E=8, router=TopK(K=2, softmax="all"), experts=GLU(F=5), dispatch=Sort(), S=4),
}
MESHES = ((8, 1), (4, 2), (2, 4), (1, 8))  # data x expert
ON_MESH = [(name, m) for name, cfg in LAYERS.items() for m in MESHES if cfg.dispatch.parallel or m[1] == 1]
SCENARIOS = ("drops", "ties", "flat", "empty", "one", "padding")
B, L, D = 16, 8, 4
RATE = 0.1


class Batch(NamedTuple):
    x: np.ndarray
    mask: np.ndarray
    target: np.ndarray
    key: jax.Array


class Step(NamedTuple):
    """One training step of a layer, and all that can be seen of it."""

    loss: jax.Array
    y: jax.Array
    aux_loss: jax.Array
    stats: dict
    metrics: dict
    grads: dict
    grad_x: jax.Array
    params: dict


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@functools.cache
def shapes_of(cfg: MoEConfig) -> dict:
    """Shapes of a layer's parameters."""
    x = jax.ShapeDtypeStruct((B, L, D), jnp.float32)
    return jax.eval_shape(MoE(dataclasses.replace(cfg, S=None)).init, jax.random.key(0), x)["params"]


def scenario(name: str, what: str) -> tuple[dict, Batch]:
    """Parameters and a batch that force something; always the same shapes, so nothing is compiled again."""
    params = {n: 0.5 * normal(i, *s.shape) for i, (n, s) in enumerate(sorted(shapes_of(LAYERS[name]).items()))}
    x, target, mask = normal(100, B, L, D), normal(101, B, L, D), np.ones((B, L), bool)
    gate = params["router_gate_DE"] = normal(102, D, LAYERS[name].E)
    x[..., 0] = 1  # the gate's first row is a bias
    if what == "drops":  # half of the experts are twice as popular
        gate[0, ::2] += 1
    if what == "ties":  # dyadic numbers, exact in any order of addition; experts and tokens in equal pairs
        x, gate = np.round(4 * x) / 4, np.round(4 * gate) / 4
        gate[:, 1::2], x[1::2] = gate[:, ::2], x[::2]
        params["router_gate_DE"] = gate
    if what == "flat":  # all logits 0: all tokens to the first experts
        gate[:] = 0
    if what == "empty":  # nobody goes to the upper half
        gate[0, gate.shape[1] // 2 :] = -20
    if what == "one":  # everybody goes to expert 2 first
        gate /= 8
        gate[0, 2] = 6
    if what == "padding":  # two whole sequences (a shard of 8), ends of others, holes
        mask = np.arange(L)[None, :] < np.random.default_rng(103).integers(3, L + 1, B)[:, None]
        mask[:2], mask[5, 1] = False, False
    return params, Batch(x, mask, target, jax.random.key(7))


def noise(name: str, key: jax.Array) -> np.ndarray | None:
    """What the layer's router draws: group g, counted over the whole batch, has the g-th key folded in."""
    cfg = LAYERS[name]
    S = cfg.S or L
    keys = [jax.random.fold_in(key, g) for g in range(B * L // S)]
    if isinstance(cfg.router, Switch):
        low, high = 1 - cfg.router.jitter, 1 + cfg.router.jitter
        return np.stack([jax.random.uniform(k, (S, D), minval=low, maxval=high) for k in keys]).astype(np.float64)
    if isinstance(cfg.router, Top2):
        return np.stack([jax.random.uniform(k, (S,)) for k in keys]).astype(np.float64)
    return None


def context(mesh: tuple[int, int] | None):
    return jax.set_mesh(make_mesh(*mesh)) if mesh else nullcontext()


@functools.cache
def compiled(name: str, mesh: tuple[int, int] | None) -> tuple[Callable, str]:
    """A training step of this layer on this mesh (None: one device), and its compiled text."""
    layer = MoE(LAYERS[name])

    def loss(params, x, batch):
        y, aux = layer.apply({"params": params}, x, batch.mask, batch.key)
        task = (((y - batch.target) ** 2).sum(-1) * batch.mask).sum()
        return task + aux.loss, (y, aux)

    def step(params, batch):
        (value, (y, aux)), (grads, grad_x) = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, batch.x, batch)
        new = jax.tree.map(lambda p, g: p - RATE * g, params, grads)
        return Step(value, y, aux.loss, aux.stats._asdict(), aux.metrics, grads, grad_x, new)

    params, batch = scenario(name, "drops")
    place, inputs, outputs = lambda tree: tree, None, None
    if mesh:
        on = lambda spec: NamedSharding(make_mesh(*mesh), spec)  # noqa: E731
        experts = set(LAYERS[name].experts.params)
        layout = {n: on(P("expert") if n in experts else P()) for n in params}
        tokens = on(P(("data", "expert")))
        inputs = (layout, Batch(tokens, tokens, tokens, on(P())))
        outputs = Step(None, None, None, None, None, None, None, layout)
        place = lambda tree: jax.device_put(tree, inputs)  # noqa: E731
    with context(mesh):
        program = jax.jit(step, in_shardings=inputs, out_shardings=outputs).lower(params, batch).compile()
    return lambda params, batch: program(*place((params, batch))), program.as_text()


@functools.cache
def run(name: str, mesh: tuple[int, int] | None, what: str) -> Step:
    return jax.tree.map(np.asarray, compiled(name, mesh)[0](*scenario(name, what)))


def close(actual, expected, rel: float = 1e-5) -> None:
    """Every array of a tree within rel of the largest number of the expected one."""

    def check(path, a, e):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, e, rtol=rel, atol=rel * np.abs(e).max(initial=0), err_msg=where)

    jax.tree.map_with_path(check, actual, expected)
