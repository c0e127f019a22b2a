"""The grouped matmul of accelerators, by the platform that a program is lowered for.

XLA has TPU kernels for the product and for the gradient of its rows. Its default elsewhere, and for the gradient of the
weights on TPU, is dense: E times the work (rows of other experts masked), and on a GPU E times the rows in memory. The
kernels of this package replace these.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.custom_batching import sequential_vmap
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from moe_jax.core.kernels import ragged_gpu, ragged_tpu, rows_tpu
from moe_jax.core.kernels.dense import dense_matmul
from moe_jax.core.kernels.triton import on_gpu
from moe_jax.core.linear import linear_map
from moe_jax.core.platforms import by_platform
from moe_jax.core.rows import LazyRows, RowMap, gather_grad, gather_rows


@jax.custom_jvp
def ragged_matmul(
    x_RI: Float[Array, "R I"], w_EIO: Float[Array, "E I O"], sizes_E: Int[Array, "E"]
) -> Float[Array, "R O"]:
    """Every row times its expert's matrix; results for rows past sum(sizes_E) are unspecified."""
    return _matmul(x_RI, w_EIO, sizes_E)


@partial(ragged_matmul.defjvp, symbolic_zeros=True)
def _ragged_jvp(primals, tangents):
    (_, w_EIO, sizes_E), (dx_RI, dw_EIO, _) = primals, tangents
    by_rows = _Product(
        forward=lambda fixed, dx_RI: _matmul(dx_RI, *fixed),
        transpose=lambda fixed, g_RO: _matmul_transposed(g_RO, *fixed),
        native=lambda fixed, dx_RI: dense_matmul(dx_RI, *fixed),
    )
    by_weights = _Product(
        forward=lambda fixed, dw_EIO: _matmul(fixed[0], dw_EIO, fixed[2]),
        transpose=lambda fixed, g_RO: _outer(fixed[0], g_RO, *fixed[1:]),
        native=lambda fixed, dw_EIO: dense_matmul(fixed[0], dw_EIO, fixed[2]),
    )
    return ragged_matmul(*primals), by_rows((w_EIO, sizes_E), dx_RI) + by_weights(primals, dw_EIO)


@jax.custom_jvp
def sent_matmul(
    x_TI: Float[Array, "T I"], to: RowMap, w_EIO: Float[Array, "E I O"], sizes_E: Int[Array, "E"]
) -> Float[Array, "R O"]:
    """Multiplies every row with its expert's matrix, fetching rows from their tokens, on a GPU."""
    return _fetching_matmul(x_TI, w_EIO, sizes_E, to.token_R)


@partial(sent_matmul.defjvp, symbolic_zeros=True)
def _sent_jvp(primals, tangents):
    (_, to, w_EIO, sizes_E), (dx_TI, _, dw_EIO, _) = primals, tangents
    by_tokens = _Product(
        forward=lambda fixed, dx_TI: _fetching_matmul(dx_TI, fixed[1], fixed[2], fixed[0].token_R),
        transpose=lambda fixed, g_RO: gather_grad(_matmul_transposed(g_RO, *fixed[1:]), fixed[0]),
        native=lambda fixed, dx_TI: dense_matmul(LazyRows(dx_TI, fixed[0]).rows, *fixed[1:]),
    )
    by_weights = _Product(
        forward=lambda fixed, dw_EIO: _fetching_matmul(fixed[0], dw_EIO, fixed[3], fixed[1].token_R),
        transpose=lambda fixed, g_RO: _fetching_outer(fixed[0], g_RO, *fixed[2:], fixed[1].token_R),
        native=lambda fixed, dw_EIO: dense_matmul(LazyRows(*fixed[:2]).rows, dw_EIO, fixed[3]),
    )
    return sent_matmul(*primals), by_tokens((to, w_EIO, sizes_E), dx_TI) + by_weights(primals, dw_EIO)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def map_rows(f: Callable, used: Int[Array, ""], *xs_RF: Float[Array, "R F"]) -> Float[Array, "R F"]:
    """f of the rows of arrays, number by number; results for rows past `used` are unspecified.

    f closes over no traced arrays.
    """
    return _elementwise(lambda *xs: (f(*xs),), 1, used, *xs_RF)[0]


@map_rows.defjvp
def _map_rows_jvp(f, primals, tangents):
    n = len(primals) - 1

    def tangent(*both):
        return (jax.jvp(f, both[:n], both[n:])[1],)

    def pull(*xs_and_g):
        return jax.vjp(f, *xs_and_g[:n])[1](xs_and_g[n])

    forward = lambda fixed, dxs_RF: _elementwise(tangent, 1, *fixed, *dxs_RF)[0]  # noqa: E731
    transpose = lambda fixed, g_RF: _elementwise(pull, n, *fixed, g_RF, in_place=True)  # noqa: E731
    native = lambda fixed, dxs_RF: tangent(*fixed[1:], *dxs_RF)[0]  # noqa: E731
    return map_rows(f, *primals), linear_map(forward, transpose, primals, tuple(tangents[1:]), native)


class _Product(NamedTuple):
    """A product as a linear function of one of its factors."""

    forward: Callable
    transpose: Callable
    native: Callable

    def __call__(self, fixed: Any, tangent: Array | SymbolicZero) -> Array | float:
        """The product with a tangent; 0.0 without one."""
        if isinstance(tangent, SymbolicZero):
            return 0.0
        return linear_map(self.forward, self.transpose, fixed, tangent, self.native)


# ---------------------------------------------------------------- by platform; under vmap one after another


@sequential_vmap
def _matmul(x_RI, w_EIO, sizes_E):
    return by_platform(x_RI, w_EIO, sizes_E, default=lax.ragged_dot, **on_gpu(x_RI, ragged_gpu.matmul))


@sequential_vmap
def _matmul_transposed(g_RO, w_EIO, sizes_E):
    kernel = partial(ragged_gpu.matmul, transposed=True)
    default = lambda g_RO, w_EIO, sizes_E: lax.ragged_dot(g_RO, w_EIO.swapaxes(1, 2), sizes_E)  # noqa: E731
    return by_platform(g_RO, w_EIO, sizes_E, default=default, **on_gpu(g_RO, kernel))


@sequential_vmap
def _outer(x_RI, g_RO, w_EIO, sizes_E):
    without_w = lambda kernel: lambda x_RI, g_RO, w_EIO, sizes_E: kernel(x_RI, g_RO, sizes_E)  # noqa: E731
    kernels = {"tpu": ragged_tpu.outer, **on_gpu(x_RI, ragged_gpu.outer)}
    ways = {name: without_w(kernel) for name, kernel in kernels.items()}
    return by_platform(x_RI, g_RO, w_EIO, sizes_E, default=_masked_outer, **ways)


def _masked_outer(x_RI, g_RO, w_EIO, sizes_E):
    return jax.vjp(lambda w_EIO: lax.ragged_dot(x_RI, w_EIO, sizes_E), w_EIO)[1](g_RO)[0]


@sequential_vmap
def _fetching_matmul(x_TI, w_EIO, sizes_E, token_R):
    gathered = lambda x_TI, w_EIO, sizes_E, token_R: lax.ragged_dot(gather_rows(x_TI, token_R), w_EIO, sizes_E)  # noqa: E731
    return by_platform(x_TI, w_EIO, sizes_E, token_R, default=gathered, **on_gpu(x_TI, ragged_gpu.matmul))


@sequential_vmap
def _fetching_outer(x_TI, g_RO, w_EIO, sizes_E, token_R):
    def gathered(x_TI, g_RO, w_EIO, sizes_E, token_R):
        return _masked_outer(gather_rows(x_TI, token_R), g_RO, w_EIO, sizes_E)

    def kernel(x_TI, g_RO, w_EIO, sizes_E, token_R):
        return ragged_gpu.outer(x_TI, g_RO, sizes_E, token_R)

    return by_platform(x_TI, g_RO, w_EIO, sizes_E, token_R, default=gathered, **on_gpu(x_TI, kernel))


def _elementwise(
    f: Callable, results: int, used: Int[Array, ""], *xs_RF: Float[Array, "R F"], in_place: bool = False
) -> tuple[Array, ...]:
    """f, which returns a tuple, on the used rows: all of them but on a TPU."""

    @sequential_vmap
    def run(used, *xs_RF):
        kernel = partial(rows_tpu.elementwise, f, results=results, in_place=in_place)
        return by_platform(used, *xs_RF, default=lambda _, *xs: tuple(f(*xs)), tpu=kernel)

    return run(used, *xs_RF)
