"""Experts over contiguous rows, one expert after another: for platforms without a grouped matmul.

Every expert gets the smallest slice that holds its rows, out of a few static sizes (buckets). Activations between its
matmuls stay in cache, and the gradient of its weights is written in place. The experts of one bucket share a loop: a
branch inside a loop would copy all that the loop carries.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from moe_jax.core.kernels.dense import dense_matmul
from moe_jax.core.linear import linear_map

SMALLEST_BUCKET = 2**18  # numbers in all rows


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def by_expert(
    expert: Callable, params: Any, x_RD: Float[Array, "R D"], sizes_E: Int[Array, "E"]
) -> Float[Array, "R O"]:
    """expert(params, x, groups) of rows: the first sizes_E[0] are expert 0's, and so on; 0 for rows of no expert.

    params: a tree of arrays [E, ...].
    """
    return _forward(expert, params, x_RD, sizes_E, [])[0]


@by_expert.defjvp
def _by_expert_jvp(expert, primals, tangents):
    y_RO, saved = _with_residuals(expert, *primals)
    tangent = partial(_tangent, partial(by_expert_at_once, expert))
    fixed, moving = (*primals, saved), tangents[:2]
    return y_RO, linear_map(tangent, partial(_gradient, expert), fixed, moving)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _with_residuals(expert, params, x_RD, sizes_E):
    """The output, and what its gradient needs: the outputs of all matmuls but the last, constants to derivatives."""
    return _forward(expert, params, x_RD, sizes_E, _widths(expert, params, x_RD)[1][:-1])


@_with_residuals.defjvp
def _with_residuals_jvp(expert, primals, tangents):
    y_RO, saved = _with_residuals(expert, *primals)
    _, dy_RO = _by_expert_jvp(expert, primals, tangents)
    return (y_RO, saved), (dy_RO, jax.tree.map(jnp.zeros_like, saved))


def _tangent(f: Callable, fixed: tuple, moving: tuple[Any, Array]) -> Array:
    params, x_RD, sizes_E, _ = fixed
    return jax.jvp(lambda params, x_RD: f(params, x_RD, sizes_E), (params, x_RD), moving)[1]


def by_expert_at_once(
    expert: Callable, params: Any, x_RD: Float[Array, "R D"], sizes_E: Int[Array, "E"]
) -> Float[Array, "R O"]:
    """The same as `by_expert` by matmuls with derivatives of every kind and order, in E times the work."""
    real_R1 = (jnp.arange(len(x_RD)) < sizes_E.sum())[:, None]
    y_RO = expert(params, jnp.where(real_R1, x_RD, 0), _AllExperts(sizes_E))
    return jnp.where(real_R1, y_RO, 0)


def size_buckets(R: int, E: int, D: int) -> tuple[int, ...]:
    """Static row counts around R / E, up to twice that, in steps of R / (16 E) where most experts are.

    Each bucket compiles a loop of its own, so small layers, whose rows are cheap, have few.
    """
    balanced = -(-R // E)
    most = min(R, 2 * balanced)
    sixteenths = (8,) if R * D < SMALLEST_BUCKET else (2, 4, 6, 8, *range(10, 21), 22, 24, 28)
    buckets = {-(-balanced * n // 128) * 8 for n in sixteenths}
    return tuple(sorted({balanced, most, *(C for C in buckets if 16 <= C < most)}))


def _gradient(expert: Callable, fixed: tuple, g_RO: Array) -> tuple[Any, Array]:
    """Gradients of params and rows, of one expert after another."""
    params, x_RD, sizes_E, saved = fixed

    def accumulate(e, rows, carry):
        dparams, dx_RD = carry
        single = _SingleExpert([rows.read(h_RF) for h_RF in saved])
        _, pull = jax.vjp(lambda p, x_CD: expert(p, x_CD, single), _select_expert(e, params), rows.own(x_RD))
        dp, dx_CD = pull(rows.own(g_RO))
        total = lambda d, new: d[e] + new if rows.accumulates else new  # noqa: E731
        dparams = jax.tree.map(lambda d, new: lax.dynamic_update_index_in_dim(d, total(d, new), e, 0), dparams, dp)
        return dparams, rows.write(dx_RD, dx_CD)

    start = jax.tree.map(lambda w: lax.full_like(x_RD, 0, w.dtype, w.shape), params), lax.full_like(x_RD, 0)
    return _each_expert(accumulate, sizes_E, x_RD.shape, start)


def _forward(expert, params, x_RD, sizes_E, widths: list[int]):
    """The output, and the outputs of the first len(widths) matmuls, which have these widths."""

    def accumulate(e, rows, carry):
        (y_RO, saved), single = carry, _SingleExpert()
        y_RO = rows.write(y_RO, expert(_select_expert(e, params), rows.own(x_RD), single))
        return y_RO, [rows.write(h_RF, made) for h_RF, made in zip(saved, single.made, strict=False)]

    out = _widths(expert, params, x_RD)[0]
    y_RO, *saved = (lax.full_like(x_RD, 0, shape=(len(x_RD), width)) for width in (out, *widths))
    return _each_expert(accumulate, sizes_E, x_RD.shape, (y_RO, saved))


def _each_expert(accumulate: Callable, sizes_E: Int[Array, "E"], shape: tuple[int, int], carry: Any) -> Any:
    """Folds accumulate(e, rows, carry) over all rows, an expert at a time; experts with many rows in several blocks."""
    R, D = shape
    buckets = size_buckets(R, len(sizes_E), D)
    expert_P, start_P, size_P = _row_blocks(sizes_E, R, buckets[-1])
    bucket_P = (size_P[:, None] > jnp.array([[0, *buckets[:-1]]], jnp.int32)).sum(1, dtype=jnp.int32)  # 0: no rows
    order_P = jnp.argsort(bucket_P)
    until = (bucket_P[None] <= jnp.arange(len(buckets) + 1)[:, None]).sum(1, dtype=jnp.int32)
    for i, C in enumerate(buckets):

        def body(n, carry, C=C):
            p = order_P[n]
            return accumulate(expert_P[p], _Rows(C, R, start_P[p], size_P[p], C == buckets[-1]), carry)

        carry = lax.fori_loop(until[i], until[i + 1], body, carry)
    return carry


def _row_blocks(
    sizes_E: Int[Array, "E"], R: int, most: int
) -> tuple[Int[Array, "P"], Int[Array, "P"], Int[Array, "P"]]:
    """Expert, first row and size of each of the R // most + E blocks; all but an expert's first are full."""
    E, block_P = len(sizes_E), jnp.arange(R // most + len(sizes_E), dtype=jnp.int32)
    blocks_E = -(-sizes_E // most)
    until_E = jnp.cumsum(blocks_E)
    expert_P = jnp.minimum((until_E[None] <= block_P[:, None]).sum(1, dtype=jnp.int32), E - 1)
    left_P = until_E[expert_P] - block_P  # blocks of the expert, from this one on
    end_P = jnp.cumsum(sizes_E)[expert_P] - most * (left_P - 1)
    rest_P = (sizes_E - most * (blocks_E - 1))[expert_P]
    size_P = jnp.where(left_P < 1, 0, jnp.where(left_P == blocks_E[expert_P], rest_P, most))
    return expert_P, end_P - size_P, size_P


def _select_expert(e: Int[Array, ""], params: Any) -> Any:
    return jax.tree.map(lambda w: lax.dynamic_index_in_dim(w, e, keepdims=False), params)


class _Rows:
    """C of R rows: those of one expert, and neighbouring rows, which are masked."""

    def __init__(self, C: int, R: int, start: Int[Array, ""], size: Int[Array, ""], accumulates: bool):
        self.C, self.all, self.first, self.accumulates = C, C == R, jnp.minimum(start, R - C), accumulates
        row_C = self.first + jnp.arange(C, dtype=jnp.int32)
        self.own_C1 = ((row_C >= start) & (row_C < start + size))[:, None]

    def read(self, x_RI: Array) -> Array:
        x_CI = lax.dynamic_slice_in_dim(x_RI, self.first, self.C)
        # With C = R the read does not depend on the expert, and XLA would hoist its use out of the loop.
        return lax.optimization_barrier((x_CI, self.own_C1))[0] if self.all else x_CI

    def own(self, x_RI: Array) -> Array:
        return jnp.where(self.own_C1, self.read(x_RI), 0)

    def write(self, x_RI: Array, new_CI: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(x_RI, jnp.where(self.own_C1, new_CI, self.read(x_RI)), self.first, 0)


class _SingleExpert:
    """One expert's rows x[C, I]. Records the outputs of its matmuls (`made`); the first ones may be `known`."""

    def __init__(self, known: list[Array] | None = None):
        self.known = list(known or ())
        self.made: list[Array] = []

    def matmul(self, x_CI: Array, w_IO: Array) -> Array:
        w_IO = w_IO.astype(x_CI.dtype)
        self.made.append(_known(x_CI, w_IO, self.known.pop(0)) if self.known else x_CI @ w_IO)
        return self.made[-1]

    def bias(self, x_CO: Array, b_O: Array) -> Array:
        return x_CO + jnp.broadcast_to(b_O.astype(x_CO.dtype), x_CO.shape)

    def elementwise(self, f: Callable, *xs: Array) -> Array:
        return f(*xs)

    def apply(self, expert: Callable, params: Any, x_CI: Array) -> Array:
        return expert(params, x_CI, self)


@dataclasses.dataclass(frozen=True)
class _AllExperts:
    """Rows x[R, I] of all experts, back to back."""

    sizes_E: Int[Array, "E"]

    def matmul(self, x_RI: Array, w_EIO: Array) -> Array:
        return dense_matmul(x_RI, w_EIO.astype(x_RI.dtype), self.sizes_E)

    def bias(self, x_RO: Array, b_EO: Array) -> Array:
        return x_RO + jnp.repeat(b_EO, self.sizes_E, axis=0, total_repeat_length=len(x_RO)).astype(x_RO.dtype)

    def elementwise(self, f: Callable, *xs: Array) -> Array:
        return f(*xs)

    def apply(self, expert: Callable, params: Any, x_RI: Array) -> Array:
        return expert(params, x_RI, self)


@jax.custom_vjp
def _known(x_CI: Array, w_IO: Array, y_CO: Array) -> Array:
    """Returns y = x @ w, which is known; computes only its derivatives."""
    return y_CO


_known.defvjp(
    lambda x_CI, w_IO, y_CO: (y_CO, (x_CI, w_IO)),
    lambda xw, g_CO: (g_CO @ xw[1].T, xw[0].T @ g_CO, None),
)


def _widths(expert: Callable, params: Any, x_RD: Array) -> tuple[int, list[int]]:
    """Width of the expert's output, and the widths of its matmuls' outputs."""

    def made(params, x_CD):
        single = _SingleExpert()
        return expert(params, x_CD, single), single.made

    one = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape[1:], w.dtype), params)
    y_CO, found = jax.eval_shape(made, one, jax.ShapeDtypeStruct((1, x_RD.shape[1]), x_RD.dtype))
    return y_CO.shape[1], [m.shape[1] for m in found]
