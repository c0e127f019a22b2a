"""Derivatives of every kind and order: forward mode, curvature, gradient penalties, and under vmap."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import MLP, Einsum, MoE, RaggedAllToAll, Scatter, Sort, TopK
from moe_jax.core import rows
from moe_jax.core.linear import linear_map
from tests.cases import close, context, normal

X, EXPERT = jnp.asarray(normal(0, 8, 2, 4)), MLP(F=3, bias=True)
ALL = "jvp", "forward over reverse", "reverse over reverse"


@functools.cache
def derivatives(dispatch, kinds=ALL, mesh=None, **fields):
    """Derivatives of a layer's loss along a direction: the first by forward mode, the second in both orders."""
    layer = MoE.of(E=4, router=TopK(K=2), experts=EXPERT, dispatch=dispatch, **fields)
    leaves, tree = jax.tree.flatten(jax.eval_shape(layer.init, jax.random.key(0), X))
    p, along = (tree.unflatten([normal(i + n, *s.shape) for i, s in enumerate(leaves)]) for n in (1, 50))
    f = lambda p: (layer.apply(p, X)[0] ** 3).sum()  # noqa: E731
    dot = lambda a, b: sum(map(jnp.vdot, jax.tree.leaves(a), jax.tree.leaves(b)))  # noqa: E731
    ways = {
        "jvp": lambda p, along: jax.jvp(f, (p,), (along,))[1],
        "forward over reverse": lambda p, along: jax.jvp(jax.grad(f), (p,), (along,))[1],
        "reverse over reverse": jax.grad(lambda p, along: dot(jax.grad(f)(p), along)),
    }
    with context(mesh):
        return jax.device_get(jax.jit(lambda *given: {kind: ways[kind](*given) for kind in kinds})(p, along))


@pytest.mark.law(2)
@pytest.mark.parametrize(
    ("dispatch", "dense", "kinds"),
    [(Sort(), Einsum(None), ALL), (Scatter(1.0), Einsum(1.0), ALL[1:2])],
    ids=["Sort", "Scatter"],
)
def test_derivatives_of_every_dispatcher(dispatch, dense, kinds):
    """`Einsum`, which has JAX's own rules, gives the same; and both orders of second derivatives agree."""
    found = derivatives(dispatch, kinds)
    close(found, derivatives(dense, kinds), rel=1e-4)
    for kind in kinds[2:]:
        close(found[kind], found[kinds[1]], rel=1e-4)


def test_derivatives_across_shards():
    """Rows that travel keep their second derivatives."""
    found = derivatives(Sort(), ALL[1:2], "d2e4", exchange=RaggedAllToAll())
    close(found[ALL[1]], derivatives(Sort())[ALL[1]], rel=1e-4)


def test_rows_of_tokens_under_every_transformation():
    """Sending and combining rows, whose gradients are our own: Hessian, third derivative, gradient of vmap."""
    maps = rows.row_map(jnp.array([[[0, 2], [1, 5]], [[3, 5], [4, 5]]]), 5)
    x, weight = jnp.asarray(normal(1, 2, 2, 3)), jnp.asarray(normal(2, 2, 2, 2))

    def ours(x, weight):
        return rows.weighted_sum(rows.send(x, maps).rows ** 2, weight, maps).reshape(4, 3)

    def by_hand(x, weight):
        row = jnp.concatenate([x.reshape(4, 3)[jnp.array([0, 1, 0, 2, 3])] ** 2, jnp.zeros((1, 3))])
        return (weight.reshape(4, 2)[..., None] * row[jnp.array([[0, 2], [1, 5], [3, 5], [4, 5]])]).sum(1)

    def every(f):
        loss = lambda x, weight: (f(x, weight) ** 3).sum()  # noqa: E731
        slope = lambda x, weight: jax.grad(loss)(x, weight).sum()  # noqa: E731
        third = jax.grad(lambda x, weight: jax.grad(slope)(x, weight).sum(), (0, 1))
        several = lambda x, weight: (jax.vmap(f, (0, None))(jnp.stack([x, 2 * x]), weight) ** 2).sum()  # noqa: E731
        return jax.jit(lambda *xw: (jax.hessian(loss, (0, 1))(*xw), third(*xw), jax.grad(several, (0, 1))(*xw)))

    close(every(ours)(x, weight), jax.device_get(every(by_hand)(x, weight)))


def test_a_linear_function_has_the_transpose_that_it_is_given():
    """Gradients use it, also under vmap, and all further derivatives JAX's own rules."""
    twice = lambda a, x: 2 * a * x  # noqa: E731
    marked = lambda a, g: 2 * a * g + 100  # noqa: E731
    f = lambda a, x: linear_map(twice, marked, a, x)  # noqa: E731
    a, x = jnp.array([3.0, 5.0]), jnp.array([1.0, 2.0])
    total = lambda a, x: f(a, x).sum()  # noqa: E731
    close(jax.jvp(f, (a, x), (a, x)), (2 * a * x, 4 * a * x))
    close(jax.grad(total, (0, 1))(a, x), (2 * x, 2 * a + 100))
    close(jax.vmap(jax.grad(total, 1), (None, 0))(a, jnp.stack([x, x])), np.stack([2 * a + 100] * 2))
    close(jax.grad(lambda x: jax.vmap(f, (None, 0))(a, x).sum())(jnp.stack([x, x])), np.stack([2 * a + 100] * 2))
    close(jax.jacfwd(jax.grad(total, 1))(a, x), 2 * np.eye(2))
