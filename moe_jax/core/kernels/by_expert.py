"""Experts over rows that lie back to back, one expert after another: for platforms without a grouped matmul.

Every expert gets a slice that is just large enough for its rows, from a ladder of static sizes. What lies between its
matmuls stays in cache, and the gradient of its weights is written where it belongs. Experts on one rung of the ladder
have a loop of their own: a branch inside a loop would copy all that the loop carries.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

SMALLEST_BUCKET = 2**18  # numbers of all rows


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def by_expert(
    expert: Callable, params: Any, x_RD: Float[Array, "R D"], sizes_E: Int[Array, "E"]
) -> Float[Array, "R O"]:
    """expert(params, x, groups) of rows of which the first sizes_E[0] are expert 0's, and so on; 0 for other rows.

    params: a tree of arrays with E in front.
    """
    return _forward(expert, params, x_RD, sizes_E, [])[0]


def size_buckets(R: int, E: int, D: int) -> tuple[int, ...]:
    """Static row counts around R / E rows, up to twice as many: a sixteenth of it apart where most experts are.

    Every rung is a loop that has to be compiled. Small layers, whose rows take no time, have few.
    """
    balanced = -(-R // E)
    most = min(R, 2 * balanced)
    sixteenths = (8,) if R * D < SMALLEST_BUCKET else (2, 4, 6, 8, *range(10, 21), 22, 24, 28)
    rungs = {-(-balanced * n // 128) * 8 for n in sixteenths}
    return tuple(sorted({balanced, most, *(C for C in rungs if 16 <= C < most)}))


def _by_expert_fwd(expert, params, x_RD, sizes_E):
    # What the last one makes is not needed again, or can be made again.
    y_RO, saved = _forward(expert, params, x_RD, sizes_E, _widths(expert, params, x_RD)[1][:-1])
    return y_RO, (params, x_RD, sizes_E, saved)


def _by_expert_bwd(expert, residuals, g_RO):
    params, x_RD, sizes_E, saved = residuals

    def visit(e, rows, carry):
        dparams, dx_RD = carry
        alone = _SingleExpert([rows.read(h_RF) for h_RF in saved])
        _, pull = jax.vjp(lambda p, x_CD: expert(p, x_CD, alone), _of(e, params), rows.mine(x_RD))
        dp, dx_CD = pull(rows.mine(g_RO))
        total = lambda d, new: d[e] + new if rows.may_be_more else new  # noqa: E731
        dparams = jax.tree.map(lambda d, new: lax.dynamic_update_index_in_dim(d, total(d, new), e, 0), dparams, dp)
        return dparams, rows.write(dx_RD, dx_CD)

    start = jax.tree.map(lambda w: lax.full_like(x_RD, 0, w.dtype, w.shape), params), lax.full_like(x_RD, 0)
    return *_each_expert(visit, sizes_E, x_RD.shape, start), None


by_expert.defvjp(_by_expert_fwd, _by_expert_bwd)


def _forward(expert, params, x_RD, sizes_E, widths: list[int]):
    """The output, and what comes out of the first matmuls, which are so wide."""

    def visit(e, rows, carry):
        (y_RO, saved), alone = carry, _SingleExpert()
        y_RO = rows.write(y_RO, expert(_of(e, params), rows.mine(x_RD), alone))
        return y_RO, [rows.write(h_RF, made) for h_RF, made in zip(saved, alone.made, strict=False)]

    out = _widths(expert, params, x_RD)[0]
    y_RO, *saved = (lax.full_like(x_RD, 0, shape=(len(x_RD), width)) for width in (out, *widths))
    return _each_expert(visit, sizes_E, x_RD.shape, (y_RO, saved))


def _each_expert(visit: Callable, sizes_E: Int[Array, "E"], shape: tuple[int, int], carry: Any) -> Any:
    """Folds visit(e, rows, carry) over all rows, an expert's at once; those of very large ones in several pieces."""
    R, D = shape
    rungs = size_buckets(R, len(sizes_E), D)
    expert_P, start_P, size_P = _row_blocks(sizes_E, R, rungs[-1])
    rung_P = (size_P[:, None] > jnp.array([[0, *rungs[:-1]]])).sum(1)  # 0: no rows
    piece_P = jnp.argsort(rung_P)
    until = (rung_P[None] <= jnp.arange(len(rungs) + 1)[:, None]).sum(1)
    for i, C in enumerate(rungs):

        def body(n, carry, C=C):
            p = piece_P[n]
            return visit(expert_P[p], _Rows(C, R, start_P[p], size_P[p], C == rungs[-1]), carry)

        carry = lax.fori_loop(until[i], until[i + 1], body, carry)
    return carry


def _row_blocks(
    sizes_E: Int[Array, "E"], R: int, most: int
) -> tuple[Int[Array, "P"], Int[Array, "P"], Int[Array, "P"]]:
    """Expert, first row and rows of every piece, R // most + E at most; of an expert, all but the first are full."""
    E, piece_P = len(sizes_E), jnp.arange(R // most + len(sizes_E))
    pieces_E = -(-sizes_E // most)
    until_E = jnp.cumsum(pieces_E)
    expert_P = jnp.minimum((until_E[None] <= piece_P[:, None]).sum(1), E - 1)
    left_P = until_E[expert_P] - piece_P  # of the expert's, this one included
    end_P = jnp.cumsum(sizes_E)[expert_P] - most * (left_P - 1)
    rest_P = (sizes_E - most * (pieces_E - 1))[expert_P]
    size_P = jnp.where(left_P < 1, 0, jnp.where(left_P == pieces_E[expert_P], rest_P, most))
    return expert_P, end_P - size_P, size_P


def _of(e: Int[Array, ""], params: Any) -> Any:
    return jax.tree.map(lambda w: lax.dynamic_index_in_dim(w, e, keepdims=False), params)


class _Rows:
    """C of R rows, those of an expert among them: neighbours come along."""

    def __init__(self, C: int, R: int, start: Int[Array, ""], size: Int[Array, ""], may_be_more: bool):
        self.C, self.all, self.first, self.may_be_more = C, C == R, jnp.minimum(start, R - C), may_be_more
        row_C = self.first + jnp.arange(C)
        self.mine_C1 = ((row_C >= start) & (row_C < start + size))[:, None]

    def read(self, x_RI: Array) -> Array:
        x_CI = lax.dynamic_slice_in_dim(x_RI, self.first, self.C)
        # All rows look the same for every expert, and what is made of them would be computed before the loop, always.
        return lax.optimization_barrier((x_CI, self.mine_C1))[0] if self.all else x_CI

    def mine(self, x_RI: Array) -> Array:
        return jnp.where(self.mine_C1, self.read(x_RI), 0)

    def write(self, x_RI: Array, new_CI: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(x_RI, jnp.where(self.mine_C1, new_CI, self.read(x_RI)), self.first, 0)


class _SingleExpert:
    """One expert's rows x[C, I]. Remembers what its matmuls make; the first of them may be `known` already."""

    def __init__(self, known: list[Array] | None = None):
        self.known = list(known or ())
        self.made: list[Array] = []

    def matmul(self, x_CI: Array, w_IO: Array) -> Array:
        w_IO = w_IO.astype(x_CI.dtype)
        self.made.append(_known(x_CI, w_IO, self.known.pop(0)) if self.known else x_CI @ w_IO)
        return self.made[-1]

    def bias(self, x_CO: Array, b_O: Array) -> Array:
        return x_CO + jnp.broadcast_to(b_O.astype(x_CO.dtype), x_CO.shape)

    def apply(self, expert: Callable, params: Any, x_CI: Array) -> Array:
        return expert(params, x_CI, self)


@jax.custom_vjp
def _known(x_CI: Array, w_IO: Array, y_CO: Array) -> Array:
    """x @ w, which is y: only its derivatives are computed."""
    return y_CO


_known.defvjp(
    lambda x_CI, w_IO, y_CO: (y_CO, (x_CI, w_IO)),
    lambda xw, g_CO: (g_CO @ xw[1].T, xw[0].T @ g_CO, None),
)


def _widths(expert: Callable, params: Any, x_RD: Array) -> tuple[int, list[int]]:
    """Width of the expert's output, and those of what its matmuls make."""

    def made(params, x_CD):
        alone = _SingleExpert()
        return expert(params, x_CD, alone), alone.made

    one = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape[1:], w.dtype), params)
    y_CO, found = jax.eval_shape(made, one, jax.ShapeDtypeStruct((1, x_RD.shape[1]), x_RD.dtype))
    return y_CO.shape[1], [m.shape[1] for m in found]
