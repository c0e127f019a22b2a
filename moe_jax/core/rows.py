"""Tokens to the rows of experts and back, by gathers only, in the gradients too: scatter-adds are slow."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int

from moe_jax.core.kernels import rows_gpu
from moe_jax.core.kernels.triton import on_gpu
from moe_jax.core.linear import linear_map
from moe_jax.core.platforms import by_platform
from moe_jax.core.routing import TokenChoice


class RowMap(NamedTuple):
    """Maps between rows and choices, token t's k-th choice being number t * K + k; each is the inverse of the other."""

    row_TK: Int[Array, "T K"]  # R: no row
    choice_R: Int[Array, "R"]  # T * K: no choice

    @property
    def token_R(self) -> Int[Array, "R"]:
        """Token of each row; T for a row without one."""
        return self.choice_R // self.row_TK.shape[1]

    def restrict(self, kept_GSK: Bool[Array, "G S K"]) -> "RowMap":
        """Leaves only these choices a row: what is in the rows of others is not read."""
        R = self.choice_R.shape[0]
        return self._replace(row_TK=jnp.where(kept_GSK.reshape(self.row_TK.shape), self.row_TK, R))


class LazyRows(NamedTuple):
    """Rows of tokens that are not gathered yet: some kernels fetch them from the tokens."""

    x_TD: Float[Array, "T D"]
    maps: RowMap

    @property
    def rows(self) -> Float[Array, "R D"]:
        """Every row's token; 0 where there is none."""
        return _send(self.x_TD, self.maps)


def materialize(x: Array | LazyRows) -> Array:
    """Gathers rows that are lazy; returns others as they are."""
    return x.rows if isinstance(x, LazyRows) else x


def row_map(row_GSK: Int[Array, "G S K"], R: int) -> RowMap:
    """Builds the maps from the row of every choice: distinct rows below R, or R for choices without a row."""
    (K,), choices = row_GSK.shape[2:], row_GSK.size
    choice_R = jnp.full((R,), choices, jnp.int32)
    choice_R = choice_R.at[row_GSK.reshape(-1)].set(jnp.arange(choices, dtype=jnp.int32), mode="drop")
    return RowMap(row_GSK.reshape(-1, K), choice_R)


def ragged_rows(
    routing: TokenChoice, position_GSK: Int[Array, "G S K"], kept_GSK: Bool[Array, "G S K"]
) -> tuple[Int[Array, "G S K"], Int[Array, "E"]]:
    """Row of every kept choice in an order by expert, group and position in expert; and the rows of each expert."""
    G, E, no_row = len(position_GSK), routing.E, position_GSK.size
    expert_GSK = jnp.where(kept_GSK, routing.expert_GSK, E)
    count_GE = jnp.zeros((G, E), jnp.int32).at[jnp.arange(G)[:, None, None], expert_GSK].add(1, mode="drop")
    before_EG = jnp.cumsum(count_GE.T.reshape(-1)).reshape(E, G) - count_GE.T
    first_GSK = before_EG.at[expert_GSK, jnp.arange(G)[:, None, None]].get(mode="clip")
    return jnp.where(kept_GSK, first_GSK + position_GSK, no_row), count_GE.sum(0, dtype=jnp.int32)


def send(x_GSD: Float[Array, "G S D"], maps: RowMap) -> LazyRows:
    """Sends tokens to their rows, [R, D], gathered only where they are used."""
    return LazyRows(x_GSD.reshape(-1, x_GSD.shape[-1]), maps)


def weighted_sum(y_RO: Float[Array, "R O"], weight_GSK: Float[Array, "G S K"], maps: RowMap) -> Float[Array, "G S O"]:
    """The weighted sum of every token's rows, added up in float32."""
    G, S, K = weight_GSK.shape
    return _combine(y_RO, weight_GSK.reshape(G * S, K), maps).reshape(G, S, -1)


def gather_rows(x: Array, index_I: Int[Array, "I"]) -> Array:
    """Rows of x, 0 past its end."""
    return x.at[index_I].get(mode="fill", fill_value=0)


def _sum(rows_of: Callable[[int], Array], K: int) -> Array:
    """A sum over K choices in at least float32, whose addends are never stored."""
    wide = lambda k: _wide(rows_of(k))  # noqa: E731
    return sum((wide(k) for k in range(1, K)), wide(0))


def _wide(x: Array) -> Array:
    """x in float32, or in its own type where that is wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def gather_grad(g_RD: Float[Array, "R D"], maps: RowMap) -> Float[Array, "T D"]:
    """Sums the gradients of rows into the gradient of their tokens."""
    return _sum(lambda k: gather_rows(g_RD, maps.row_TK[:, k]), maps.row_TK.shape[1]).astype(g_RD.dtype)


def _send(x_TD: Array, maps: RowMap) -> Array:
    there = lambda maps, x_TD: gather_rows(x_TD, maps.token_R)  # noqa: E731
    return linear_map(there, lambda maps, g_RD: gather_grad(g_RD, maps), maps, x_TD)


def _sum_rows(y_RO: Array, weight_TK: Array, maps: RowMap) -> Array:
    """The weighted sum by JAX's own operations, whose own derivatives end every chain of derivatives."""
    rows_of = lambda k: weight_TK[:, k, None] * gather_rows(y_RO, maps.row_TK[:, k])  # noqa: E731
    return _sum(rows_of, weight_TK.shape[1]).astype(y_RO.dtype)


_combine = jax.custom_jvp(_sum_rows)


@partial(_combine.defjvp, symbolic_zeros=True)
def _combine_jvp(primals, tangents):
    """Rows are residuals only where weights have a gradient: on a mesh, making them again costs another exchange."""
    (y_RO, weight_TK, maps), (dy_RO, dweight_TK, _) = primals, tangents
    if isinstance(dweight_TK, SymbolicZero):
        tangent = linear_map(_combine_rows, _combine_rows_grad, (weight_TK, maps), dy_RO)
    else:
        tangent = linear_map(_combine_both, _combine_both_grad, primals, (_instantiate(dy_RO), dweight_TK))
    return _combine(y_RO, weight_TK, maps), tangent


def _instantiate(tangent: Array | SymbolicZero) -> Array:
    return jnp.zeros(tangent.shape, tangent.dtype) if isinstance(tangent, SymbolicZero) else tangent


def _combine_rows(fixed: tuple[Array, RowMap], dy_RO: Array) -> Array:
    return _sum_rows(dy_RO, *fixed)


def _combine_rows_grad(fixed: tuple[Array, RowMap], g_TO: Array) -> Array:
    weight_TK, maps = fixed
    return _weighted(gather_rows(g_TO, maps.token_R), gather_rows(weight_TK.reshape(-1), maps.choice_R))


def _combine_both(fixed: tuple[Array, Array, RowMap], tangents: tuple[Array, Array]) -> Array:
    (y_RO, weight_TK, maps), (dy_RO, dweight_TK) = fixed, tangents
    return _sum_rows(dy_RO, weight_TK, maps) + _sum_rows(y_RO, dweight_TK, maps)


def _combine_both_grad(fixed: tuple[Array, Array, RowMap], g_TO: Array) -> tuple[Array, Array]:
    y_RO, weight_TK, maps = fixed
    weight_R = gather_rows(weight_TK.reshape(-1), maps.choice_R)
    kernel = on_gpu(y_RO, rows_gpu.weighted_sum_grad)
    dy_RO, dweight_R = by_platform(y_RO, g_TO, weight_R, maps.token_R, default=_weighted_sum_grad, **kernel)
    dweight_TK = gather_rows(dweight_R, maps.row_TK.reshape(-1)).reshape(weight_TK.shape)
    return dy_RO, dweight_TK.astype(weight_TK.dtype)


def _weighted_sum_grad(y_RO: Array, g_TO: Array, weight_R: Array, token_R: Array) -> tuple[Array, Array]:
    """Gradients of rows and of combine weights, for outputs that are weighted sums of rows."""
    g_RO = gather_rows(g_TO, token_R)
    dweight_R = (_wide(g_RO) * y_RO).sum(-1)
    return _weighted(g_RO, weight_R), dweight_R


def _weighted(g_RO: Array, weight_R: Array) -> Array:
    return (weight_R[:, None] * g_RO).astype(g_RO.dtype)
