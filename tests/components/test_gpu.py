"""On an NVIDIA GPU (make gpu): its kernels as they are compiled there, and layers against the same ones on a CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import GLU, MLP, MoE, Scatter, Sort, TopK
from moe_jax.core import gate
from moe_jax.core.kernels import ragged_gpu, rows_gpu
from tests.cases import normal

pytestmark = pytest.mark.gpu
E = 8
SIZES = {
    "all": [130, 1, 257, 64, 300, 16, 128, 90],
    "some empty": [0, 500, 0, 0, 13, 0, 200, 0],
    "one": [0, 0, 0, 1000, 0, 0, 0, 0],
    "none": [0] * E,
}
R = 1024
WIDTHS = [(256, 128), (192, 320), (72, 40), (4, 6)]
ERROR = {"bfloat16": 4e-3, "float16": 1e-3, "float32": 1e-5}  # of a matrix: |got - expected| / |expected|


def error(got, expected) -> float:
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert np.isfinite(got).all()
    return float(np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-30))


@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_grouped_matmuls(widths, dtype):
    """Rows in place and rows fetched, any number for each expert, against numpy; NaN in rows that are nobody's."""
    I, O = widths
    owners = {name: np.repeat(np.arange(E), sizes) for name, sizes in SIZES.items()}
    x, w, g = (jnp.asarray(normal(i, *shape), dtype) for i, shape in enumerate([(R, I), (E, I, O), (R, O)]))
    exact = lambda a: np.asarray(a.astype(jnp.float32), np.float64)  # noqa: E731
    token = jnp.asarray(np.random.default_rng(0).permutation(R), jnp.int32)

    @jax.jit
    def every(x, w, g, sizes):
        nobody = (jnp.arange(R) >= sizes.sum())[:, None]
        x, g = jnp.where(nobody, jnp.nan, x), jnp.where(nobody, jnp.nan, g)
        kept = jnp.zeros_like(x).at[token].set(x)
        with jax.default_matmul_precision("highest"):
            forward = ragged_gpu.matmul(x, w, sizes), ragged_gpu.matmul(kept, w, sizes, token)
            outer = ragged_gpu.outer(x, g, sizes), ragged_gpu.outer(kept, g, sizes, token)
            return forward, ragged_gpu.matmul(g, w, sizes, transposed=True), outer

    for name, sizes in SIZES.items():
        (y, fetched), dx, outers = every(x, w, g, jnp.asarray(sizes))
        of, n = owners[name], sum(sizes)
        for got in (y, fetched):
            assert error(got[:n], np.einsum("ri,rio->ro", exact(x)[:n], exact(w)[of])) < ERROR[dtype]
        assert error(dx[:n], np.einsum("ro,rio->ri", exact(g)[:n], exact(w)[of])) < ERROR[dtype]
        expected = np.stack([exact(x)[:n][of == e].T @ exact(g)[:n][of == e] for e in range(E)])
        for got in outers:
            assert error(got, expected) < ERROR[dtype]
            assert not np.asarray(got, np.float32)[np.array(sizes) == 0].any()


@pytest.mark.parametrize("dtype", ERROR)
def test_weighted_rows_back(dtype):
    T, D = 300, 200
    y, g = jnp.asarray(normal(0, R, D), dtype), jnp.asarray(normal(1, T, D), dtype)
    token = np.random.default_rng(0).integers(0, T + 1, R).astype(np.int32)
    weight = np.where(token < T, normal(2, R), 0).astype(np.float32)
    dy, dweight = jax.jit(rows_gpu.weighted_sum_grad)(jnp.where((token < T)[:, None], y, jnp.nan), g, weight, token)
    of = np.concatenate([np.asarray(g, np.float64), np.zeros((1, D))])[token]
    assert error(dy, weight[:, None] * of) < ERROR[dtype]
    assert error(dweight, (of * np.asarray(y, np.float64)).sum(1)) < 1e-6


def test_logits_of_bfloat16_tokens_are_exact():
    """As in float32: rounding the gate to bfloat16 would be wrong by 2e-3, TF32 by 3e-4."""
    x, w, g = jnp.asarray(normal(0, 4, 256, 512), jnp.bfloat16), normal(1, 512, 16), normal(2, 4, 256, 16)
    y, pull = jax.vjp(jax.jit(gate.linear), x, w)
    dx, dw = pull(jnp.asarray(g))
    x = np.asarray(x, np.float64)
    assert error(y, x @ w) < 1e-6
    assert error(dw, np.einsum("gsd,gse->de", x, g)) < 1e-6
    assert error(dx, g @ w.T.astype(np.float64)) < ERROR["bfloat16"]


@functools.cache
def layer(expert, dispatch):
    return MoE.of(E=E, router=TopK(K=2), experts=expert, dispatch=dispatch)


@pytest.mark.law(1)
@pytest.mark.parametrize("dispatch", [Sort(), Scatter(1.0), Scatter(None)], ids=str)
@pytest.mark.parametrize("expert", [MLP(F=48, bias=True), GLU(F=48)], ids=str)
def test_layers_are_those_of_the_cpu(expert, dispatch):
    """Outputs, losses and all gradients, in float32."""
    moe, x = layer(expert, dispatch), jnp.asarray(normal(0, 4, 96, 40))
    params, direction = jax.tree.map(np.asarray, moe.init(jax.random.key(0), x)), normal(1, 4, 96, 40)

    def value(params, x):
        y, aux = moe.apply(params, x)
        return (y * direction).sum() + aux.loss, y

    found = {}
    with jax.default_matmul_precision("highest"):
        for platform in ("cuda", "cpu"):
            args = jax.device_put((params, x), jax.devices(platform)[0])
            found[platform] = jax.tree.map(np.asarray, jax.jit(jax.value_and_grad(value, (0, 1), has_aux=True))(*args))
    for got, expected in zip(*map(jax.tree.leaves, found.values()), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_nothing_is_dense_and_no_row_is_written():
    """Each of 64 experts computes its own rows; the matmuls fetch their tokens; there is no loop."""
    moe = MoE.of(E=64, router=TopK(K=2), experts=GLU(F=128), dispatch=Sort())
    x = jax.ShapeDtypeStruct((4, 512, 1024), jnp.bfloat16)
    params = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, x.dtype), jax.eval_shape(moe.init, jax.random.key(0), x)
    )
    forward = jax.jit(lambda params, x: moe.apply(params, x)[0]).lower(params, x).compile()
    assert forward.as_text().count("__gpu$xla.gpu.triton") == 3
    assert " while(" not in forward.as_text()
    rows = 2 * 4 * 512 * 1024 * 2
    assert forward.memory_analysis().temp_size_in_bytes < 2 * rows  # outputs, and what is narrower
