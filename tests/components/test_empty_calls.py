"""Calls of layers that are empty, or of something else than tokens."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from moe_jax import MLP, Ids, MoE, Scatter, Top2, make_mesh
from moe_jax.attention import MHA
from moe_jax.attention.layer import Attention
from moe_jax.core.tokens import check_tokens

LAYER = MoE.of(E=4, router=Top2(), experts=MLP(F=4), dispatch=Scatter(1.0), S=16)


@pytest.fixture(scope="module")
def params():
    return jax.jit(LAYER.init)(jax.random.key(0), jnp.ones((2, 8, 4)))


@pytest.mark.parametrize(("shape", "mesh"), [((0, 8, 4), True), ((2, 0, 4), False)], ids=str)
def test_no_tokens_have_an_empty_output(params, shape, mesh):
    """No sequences, sharded over eight devices too, or sequences of no tokens: no loss, no count, no gradient."""

    def loss(params, x):
        ids = Ids(token_BL=jnp.zeros(x.shape[:2], int))
        y, aux = LAYER.apply(params, x, None, jax.random.key(1), None, ids, ("weight", "kept"))
        return y.sum() + aux.loss, (y, aux)

    with jax.set_mesh(make_mesh(data=2, expert=4)) if mesh else jax.set_mesh(make_mesh(jax.devices()[:1])):
        grads, (y, aux) = jax.jit(jax.grad(loss, has_aux=True))(params, jnp.ones(shape))
    assert y.shape == shape
    for by_token in (aux.expert_BLK, aux.recorded.weight_BLK, aux.recorded.kept_BLK):
        assert by_token.shape == (*shape[:2], 2)
    assert aux.loss == 0
    assert not any(np.asarray(a).any() for a in jax.tree.leaves((aux.stats, grads)))


@pytest.mark.parametrize("shape", [(0, 8, 4), (2, 0, 4)], ids=str)
def test_no_tokens_attend_to_nothing(shape):
    attention = Attention(MHA(1, 4))
    params = attention.init(jax.random.key(0), jnp.ones((1, 1, 4)))
    grads = jax.grad(lambda params: attention.apply(params, jnp.ones(shape)).sum())(params)
    assert not any(np.asarray(a).any() for a in jax.tree.leaves(grads))
    assert attention.apply(params, jnp.ones(shape)).shape == shape


@pytest.mark.parametrize(
    ("x", "mask", "message"),
    [
        (
            np.ones((8, 4), np.float32),
            None,
            r"x has the shape \(8, 4\), but .* \[B, L, D\]. One sequence is x\[None\].",
        ),
        (np.ones((1, 2, 8, 4), np.float32), None, r"x has the shape \(1, 2, 8, 4\), but .* \[B, L, D\]\.$"),
        (np.ones((2, 8, 4), np.int32), None, "x has the type int32, but tokens are vectors of real numbers; embed ids"),
        (np.ones((2, 8, 4), bool), None, "x has the type bool"),
        (np.ones((2, 8, 4), np.complex64), None, "x has the type complex64"),
        (np.ones((2, 8, 4), np.float32), np.ones((2, 7), bool), r"mask_BL has the shape \(2, 7\), but x has 2 .* of 8"),
    ],
)
def test_what_is_no_tokens_is_refused(x, mask, message):
    with pytest.raises(ValueError, match=message):
        check_tokens(x, mask)


@pytest.mark.parametrize("module", [LAYER, Attention(MHA(1, 4))], ids=["moe", "attention"])
def test_layers_refuse_what_is_no_tokens(module, monkeypatch):
    """In their own words, at creation: not in those of what they call."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which only tests have on
    for x, message in ((np.ones((8, 4), np.float32), "needs sequences"), (np.ones((2, 8, 4), np.int32), "type int32")):
        with pytest.raises(ValueError, match=message):
            module.init(jax.random.key(0), x)


def test_a_mask_may_be_of_numbers(params, monkeypatch):
    """As tokenizers make attention masks: 1 for a token, 0 for padding."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    x = np.arange(64, dtype=np.float32).reshape(2, 8, 4) % 7
    mask = np.arange(8)[None] < np.array([[5], [8]])
    apply = jax.jit(LAYER.apply)
    for kind in (np.int32, np.float32):
        for one, other in zip(*(jax.tree.leaves(apply(params, x, m)) for m in (mask, mask.astype(kind))), strict=True):
            np.testing.assert_array_equal(one, other)
