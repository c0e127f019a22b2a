"""The grouped matmul of accelerators, by the platform that a program is lowered for.

XLA has TPU kernels for the product and for the gradient of its rows. Its default elsewhere, and for the gradient of the
weights on TPU, is dense: E times the work (rows of other experts masked), and on a GPU E times the rows in memory. The
kernels of this package replace these.
"""

from collections.abc import Callable
from functools import partial

import jax
from jax import lax
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float, Int

from moe_jax.core.kernels import ragged_gpu, ragged_tpu, rows_tpu
from moe_jax.core.kernels.triton import on_gpu
from moe_jax.core.rows import RowMap, gather_grad


@jax.custom_vjp
def ragged_matmul(
    x_RI: Float[Array, "R I"], w_EIO: Float[Array, "E I O"], sizes_E: Int[Array, "E"]
) -> Float[Array, "R O"]:
    """Every row times its expert's matrix; results for rows past sum(sizes_E) are unspecified."""
    return _matmul(x_RI, w_EIO, sizes_E)


def _ragged_bwd(residuals, g_RO):
    x_RI, w_EIO, sizes_E = residuals
    return _matmul_transposed(g_RO, w_EIO, sizes_E), _outer(x_RI, g_RO, w_EIO, sizes_E), None


ragged_matmul.defvjp(lambda *args: (ragged_matmul(*args), args), _ragged_bwd)


@jax.custom_vjp
def sent_matmul(
    x_TI: Float[Array, "T I"], to: RowMap, w_EIO: Float[Array, "E I O"], sizes_E: Int[Array, "E"]
) -> Float[Array, "R O"]:
    """Multiplies every row with its expert's matrix, fetching rows from their tokens, on a GPU."""
    return _fetching_matmul(x_TI, w_EIO, sizes_E, to.token_R)


def _sent_bwd(residuals, g_RO):
    x_TI, to, w_EIO, sizes_E = residuals
    dx_RI = _matmul_transposed(g_RO, w_EIO, sizes_E)
    return gather_grad(dx_RI, to), None, _fetching_outer(x_TI, g_RO, sizes_E, to.token_R), None


sent_matmul.defvjp(lambda *args: (sent_matmul(*args), args), _sent_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def map_rows(f: Callable, used: Int[Array, ""], *xs_RF: Float[Array, "R F"]) -> Float[Array, "R F"]:
    """f of the rows of arrays, number by number; results for rows past `used` are unspecified."""
    return _elementwise(lambda *xs: (f(*xs),), 1, used, *xs_RF)[0]


def _used_bwd(f, residuals, g_RF):
    used, *xs_RF = residuals
    pull = lambda *xs: jax.vjp(f, *xs[:-1])[1](xs[-1])  # noqa: E731
    return None, *_elementwise(pull, len(xs_RF), used, *xs_RF, g_RF)


map_rows.defvjp(lambda f, *args: (map_rows(f, *args), args), _used_bwd)

# ---------------------------------------------------------------- by platform; under vmap one after another


@sequential_vmap
def _matmul(x_RI, w_EIO, sizes_E):
    return lax.platform_dependent(x_RI, w_EIO, sizes_E, default=lax.ragged_dot, **on_gpu(x_RI, ragged_gpu.matmul))


@sequential_vmap
def _matmul_transposed(g_RO, w_EIO, sizes_E):
    kernel = partial(ragged_gpu.matmul, transposed=True)
    default = lambda g_RO, w_EIO, sizes_E: lax.ragged_dot(g_RO, w_EIO.swapaxes(1, 2), sizes_E)  # noqa: E731
    return lax.platform_dependent(g_RO, w_EIO, sizes_E, default=default, **on_gpu(g_RO, kernel))


@sequential_vmap
def _outer(x_RI, g_RO, w_EIO, sizes_E):
    masked = lambda x_RI, g_RO, sizes_E: jax.vjp(lambda w: lax.ragged_dot(x_RI, w, sizes_E), w_EIO)[1](g_RO)[0]  # noqa: E731
    kernels = {"tpu": ragged_tpu.outer, **on_gpu(x_RI, ragged_gpu.outer)}
    return lax.platform_dependent(x_RI, g_RO, sizes_E, default=masked, **kernels)


@sequential_vmap
def _fetching_matmul(x_TI, w_EIO, sizes_E, token_R):
    return ragged_gpu.matmul(x_TI, w_EIO, sizes_E, token_R)


@sequential_vmap
def _fetching_outer(x_TI, g_RO, sizes_E, token_R):
    return ragged_gpu.outer(x_TI, g_RO, sizes_E, token_R)


def _elementwise(f: Callable, results: int, used: Int[Array, ""], *xs_RF: Float[Array, "R F"]) -> tuple[Array, ...]:
    """f, which returns a tuple, on the used rows: all of them but on a TPU."""

    @sequential_vmap
    def run(used, *xs_RF):
        kernel = partial(rows_tpu.elementwise, f, results=results)
        return lax.platform_dependent(used, *xs_RF, tpu=kernel, default=lambda _, *xs: tuple(f(*xs)))

    return run(used, *xs_RF)
