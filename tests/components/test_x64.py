"""With `jax_enable_x64`, as programs set it that have other parts in float64, all is as in 32 bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import GLU, MHA, LMConfig, MoE, MoEConfig, Scatter, Sort, TopK
from moe_jax.data import Batch
from moe_jax.models import Call
from tests.cases import LAYERS, close, context, normal, scenario

ON_MESH = {"sort": "d2e4", "dropless": "d2e4", "random": "s2e4", "hash": "s2e2t2", "einsum": "f2e2t2"}


def step(cfg, params, batch):
    """Everything that a layer gives in a training step."""

    def loss(params, x):
        y, aux = MoE(cfg).apply({"params": params}, x, batch.mask, batch.key, batch.state, batch.ids)
        return (y**2).sum() + aux.loss, (y, aux)

    (value, (y, aux)), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, batch.x)
    return value, y, aux, aux.metrics, grads, cfg.update_state(batch.state, aux.stats)


def wide(tree):
    """Paths of the arrays of 64 bits in a tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(p) for p, a in leaves if a.dtype in (jnp.float64, jnp.int64, jnp.uint64)]


@pytest.mark.parametrize(("name", "mesh"), [*((name, None) for name in LAYERS), *ON_MESH.items()], ids=str)
def test_no_array_has_64_bits(name, mesh):
    """Each registered component: outputs, statistics, metrics, gradients and state, and what `init` makes."""
    cfg, (params, batch) = LAYERS[name], scenario(name, "drops")
    with jax.enable_x64(True), context(mesh):
        assert wide(jax.eval_shape(lambda p, b: step(cfg, p, b), params, batch)) == []
        if mesh is None:
            made = jax.eval_shape(MoE(cfg).init, jax.random.key(0), batch.x[: cfg.S]), cfg.init_state()
            assert wide(made) == []


@pytest.mark.parametrize("dispatch", [Scatter(1.0), Sort()], ids=str)
def test_tokens_of_64_bits(dispatch):
    """The numbers of 32 bits; outputs and gradients have the types of tokens and of parameters."""
    cfg = MoEConfig(E=4, router=TopK(K=2), experts=GLU(F=4), dispatch=dispatch)
    x = normal(0, 2, 6, 4)
    params = jax.jit(MoE(cfg).init)(jax.random.key(0), x)

    def loss(params, x):
        y, aux = MoE(cfg).apply(params, x)
        return (y**2).sum() + aux.loss, y

    right = jax.device_get(jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x))
    with jax.enable_x64(True):
        found = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x.astype(np.float64))
        close(jax.device_get(found), right)
    (dparams, dx), y = found
    assert {a.dtype for a in jax.tree.leaves(dparams)} == {np.dtype("float32")}
    assert (y.dtype, dx.dtype) == (np.float64, np.float64)


def test_a_model():
    """Parameters, logits and gradients of a language model: what a checkpoint of such a run holds."""
    cfg = LMConfig(V=5, D=4, N=2, attention=MHA(H=2, A=2), ffn=GLU(F=4), moe=MoEConfig(E=2, router=TopK(K=2)))
    with jax.enable_x64(True):
        tokens, ones = jnp.zeros((2, 4), jnp.int32), jnp.ones((2, 4), jnp.int32)
        batch = Batch(tokens, tokens, ones, tokens, ones > 0, tokens[:, 0])
        params = jax.eval_shape(lambda: cfg.init(jax.random.key(0), batch))
        loss = lambda p: cfg.apply(p, batch, Call(jax.random.key(1)))[0].sum()  # noqa: E731
        assert wide((params, jax.eval_shape(jax.value_and_grad(loss), params))) == []
