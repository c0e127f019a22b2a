"""The NNX layer is the Linen layer: values and gradients with the same parameters, alone and on a mesh."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moe_jax
from moe_jax import (
    GLU,
    MLP,
    Adaptive,
    Ids,
    Jitter,
    LoadBalance,
    LoadEntropy,
    LossFree,
    MoEConfig,
    Scatter,
    Temperature,
    TopK,
)
from moe_jax.models import blocks
from moe_jax.nnx import FeedForward, MoE, RouterState
from tests.cases import close, context, normal

B, L, D = 8, 6, 4
CONFIGS = {
    "plain": MoEConfig(E=8, router=TopK(K=2), experts=MLP(F=6, bias=True), dispatch=Scatter(1.0), shared=GLU(F=4)),
    "state": MoEConfig(
        E=8,
        router=LossFree(K=2),
        experts=MLP(F=6),
        gating=(Jitter(0.3), Temperature(2.0, 0.5, 10)),
        losses=(Adaptive(LoadBalance(0.1)), LoadEntropy(0.1, threshold=1.5, by_task=True)),
        tasks=3,
    ),
}
X, TARGET, KEY = jnp.array(normal(0, B, L, D)), normal(1, B, L, D), jax.random.key(3)
MASK = jnp.array(np.arange(L)[None] < np.array([6, 5, 0, 6, 3, 6, 6, 1])[:, None])
IDS = Ids(task_BL=jnp.array(np.random.default_rng(2).integers(0, 3, (B, L))))


def task(y, aux):
    return ((y - TARGET) ** 2).sum() + aux.loss, (y, aux)


@functools.cache
def layer(name):
    """An NNX layer, its parameters as Linen has them, and a state that changes something."""
    module = MoE(CONFIGS[name], D, rngs=nnx.Rngs(0))
    for variable in module.router_state.values():
        variable[...] = jnp.full_like(variable[...], 2) + jnp.arange(variable[...].size).reshape(variable[...].shape)
    return module, nnx.to_pure_dict(nnx.state(module, nnx.Param))


@functools.cache
def linen(name, mesh):
    module, params = layer(name)
    state = {n: v[...] for n, v in module.router_state.items()}

    def loss(params, x):
        return task(*moe_jax.MoE(CONFIGS[name]).apply({"params": params}, x, MASK, KEY, state, IDS))

    with context(mesh):
        return jax.device_get(jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, X))


@pytest.mark.parametrize("mesh", [None, "d2e4"])
@pytest.mark.parametrize("name", CONFIGS)
def test_nnx_is_linen(name, mesh):
    """Output, everything reported, and all gradients, under nnx.jit and nnx.value_and_grad."""
    module, params = layer(name)
    shapes = jax.eval_shape(moe_jax.MoE(CONFIGS[name]).init, KEY, X)["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)

    @nnx.jit
    def step(module, x):
        def loss(module, x):
            return task(*module(x, MASK, KEY, ids=IDS))

        of = (nnx.DiffState(0, nnx.Param), 1)
        return nnx.value_and_grad(loss, argnums=of, has_aux=True)(module, x)

    with context(mesh):
        seen, (grads, grad_x) = jax.device_get(step(module, X))
    (expected, expected_grads) = linen(name, mesh)
    close(seen, expected)
    close((nnx.to_pure_dict(grads), grad_x), expected_grads)
    close(seen[0], linen(name, None)[0][0])


def test_state_is_a_variable():
    """Calls read the state, `update` writes it as `update_state` does for Linen; another can be given."""
    cfg, (module, _) = CONFIGS["state"], layer("state")
    module = nnx.clone(module)
    before = {n: v[...] for n, v in module.router_state.items()}
    assert set(before) == set(cfg.init_state()) == {"bias_E", "log_weight_", "step_"}
    assert len(jax.tree.leaves(nnx.state(module, RouterState))) == 3

    @nnx.jit
    def step(module):
        def loss(module):
            y, aux = module(X, ids=IDS)
            module.update(aux)
            return (y**2).sum(), aux

        return nnx.grad(loss, has_aux=True)(module)[1]

    aux = step(module)
    after = {n: v[...] for n, v in module.router_state.items()}
    close(after, cfg.update_state(before, aux.stats))
    assert after["step_"] == before["step_"] + 1
    given, own = (nnx.jit(lambda m, s: m(X, state=s, ids=IDS))(module, s)[0] for s in (before, None))
    np.testing.assert_array_equal(given, nnx.jit(lambda m: m(X, ids=IDS))(layer("state")[0])[0])
    assert np.abs(given - own).max() > 0


def test_parameters_are_drawn_as_linens_are():
    """Parameters have Linen's deviations, zeros where Linen has zeros; other seeds draw others."""
    cfg = MoEConfig(E=4, router=TopK(K=2), experts=MLP(F=64, bias=True), init_scale=0.1)
    one, other = (nnx.to_pure_dict(nnx.state(MoE(cfg, 64, rngs=nnx.Rngs(seed)), nnx.Param)) for seed in (0, 1))
    true = jax.jit(moe_jax.MoE(cfg).init)(KEY, jnp.zeros((1, 2, 64)))["params"]
    for name, w in one.items():
        np.testing.assert_allclose(w.std(), true[name].std(), rtol=0.1)
        assert not w.any() or (w != other[name]).any()
    same = MoE.of(64, rngs=nnx.Rngs(0), E=4, router=TopK(K=2), experts=MLP(F=64, bias=True), init_scale=0.1)
    np.testing.assert_array_equal(same.up_EDF[...], one["up_EDF"])


def test_dense_layer_is_linens():
    """A dense feed-forward layer, with copied parameters."""
    module = FeedForward(GLU(F=6), D, rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    loss = lambda params: (blocks.FeedForward(GLU(F=6)).apply({"params": params}, X) ** 2).sum()  # noqa: E731
    seen, grads = nnx.value_and_grad(lambda module: (module(X) ** 2).sum())(module)
    close((seen, nnx.to_pure_dict(grads)), jax.value_and_grad(loss)(params))


def test_another_width_is_refused():
    with pytest.raises(ValueError, match="Tokens are 5 wide, but the layer was made for D=4"):
        layer("plain")[0](jnp.zeros((B, L, 5)))


def test_linen_does_not_wait_for_nnx():
    """Importing the package does not import flax.nnx."""
    code = "import sys, moe_jax; assert 'flax.nnx' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
