"""The NNX shell of attentions is the Linen one."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.attention import Order, Relative, Rotary, Sees
from moe_jax.attention.layer import Attention as Linen
from moe_jax.attention.nnx import Attention
from tests.cases import close, mesh_of
from tests.cases_attention import DEEPSEEK, PACKED, D, L, layout, mha, mla, numbers, short, tokens

PARTS = (
    mha(J=2, bias=True, sinks=True, window=3),
    mha(J=2, position=Relative(), qk_norm="head", gate="element"),
    mha(position=Relative(shared=True)),
    mla(Q=8, position=Rotary(100.0, scaling=DEEPSEEK), gate="head"),
)
SEGMENT, POSITION = (jnp.array(a) for a in layout(PACKED))


def shells(part):
    """The same attention twice, with the same numbers, as functions of them."""
    params, shared = numbers(part)
    module = Attention(part, D, rngs=nnx.Rngs(0))
    for name, w in params.items():
        assert getattr(module, name).shape == w.shape
        setattr(module, name, nnx.Param(w))
    graph, state = nnx.split(module)
    ours = lambda state, *given: nnx.merge(graph, state)(*given)  # noqa: E731
    linen = lambda params, *given: Linen(part).apply({"params": params}, *given)  # noqa: E731
    return (ours, state), (linen, params), Sees(SEGMENT, POSITION, shared=shared)


@pytest.mark.parametrize("mesh", [None, "f2t2d2"])
@pytest.mark.parametrize("part", PARTS, ids=short)
def test_shells_agree(part, mesh):
    """Outputs, and gradients of parameters, tokens, and what the stack shares."""
    *both, sees = shells(part)
    shared = sees.shared

    def trained(apply, params):
        def loss(params, shared, x):
            y = apply(params, x, sees._replace(shared=shared))
            return (y * tokens(6)).sum(), y

        given = (params, shared, tokens())
        return jax.device_get(jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*given))

    def both_trained():
        (value, (g, *rest)), (right, (right_g, *right_rest)) = (trained(*shell) for shell in both)
        g = {path[0].key: x for path, x in jax.tree.leaves_with_path(g)}
        close((value, g, *rest), (right, right_g, *right_rest))

    if mesh is None:
        return both_trained()
    with jax.set_mesh(mesh_of(mesh)):
        both_trained()


def test_a_memory_is_attended_to():
    part = mha(J=2).for_memory()
    (ours, state), (linen, params), _ = shells(part)
    sees = Sees(SEGMENT, POSITION, Order.BOTH)
    given = (jnp.array(tokens()), sees, jnp.array(tokens(9)))
    close(jax.jit(ours)(state, *given), jax.jit(linen)(params, *given))


@pytest.mark.parametrize("part", PARTS, ids=short)
def test_parameters_are_drawn_from_rngs(part):
    """Names, order and distributions of the Linen shell; other keys, other numbers."""
    one, two = (nnx.state(Attention(part, D, rngs=nnx.Rngs(seed))) for seed in (0, 1))
    sees = Sees(SEGMENT, POSITION, shared=numbers(part)[1])
    drawn = jax.jit(Linen(part).init)(jax.random.key(0), jnp.array(tokens()), sees)["params"]
    one, two = ({path[0].key: x for path, x in jax.tree.leaves_with_path(s)} for s in (one, two))
    assert set(one) == set(part.params) == set(drawn)
    for name, w in drawn.items():
        assert (w.std() == 0) == (one[name].std() == 0) == bool((one[name] == two[name]).all()), name
        np.testing.assert_allclose(one[name].std(), w.std(), rtol=0.3, err_msg=name)


@pytest.mark.law(4)
def test_without_sees_it_is_causal():
    module = Attention(mha(), D, rngs=nnx.Rngs(0))
    whole = Sees(jnp.ones((2, L), int), jnp.tile(jnp.arange(L), (2, 1)))
    x = jnp.array(tokens()[:2])
    np.testing.assert_array_equal(module(x), module(x, whole))


def test_heads_that_cannot_be_spread_are_refused():
    module = Attention(mha(qk_norm="all"), D, rngs=nnx.Rngs(0))
    with jax.set_mesh(mesh_of("d4t2")), pytest.raises(ValueError, match=r"mesh\.tensor=2; set it to 1"):
        module(jnp.array(tokens()))


def test_attentions_do_not_import_nnx_shells():
    """Only who asks for it waits for it."""
    line = "import sys, moe_jax.attention; assert 'moe_jax.attention.nnx' not in sys.modules"
    subprocess.run([sys.executable, "-c", line], check=True)
