"""Tokens to the rows of experts and back, by gathers only, in the gradients too: scatter-adds are slow."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values
from jaxtyping import Array, Bool, Float, Int

from moe_jax.core.kernels import rows_gpu
from moe_jax.core.kernels.triton import on_gpu
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
    choice_R = jnp.full((R,), choices).at[row_GSK.reshape(-1)].set(jnp.arange(choices), mode="drop")
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
    return jnp.where(kept_GSK, first_GSK + position_GSK, no_row), count_GE.sum(0)


def send(x_GSD: Float[Array, "G S D"], maps: RowMap) -> LazyRows:
    """Sends tokens to their rows, [R, D], gathered only where they are used."""
    return LazyRows(x_GSD.reshape(-1, x_GSD.shape[-1]), maps)


def weighted_sum(y_RO: Float[Array, "R O"], weight_GSK: Float[Array, "G S K"], maps: RowMap) -> Float[Array, "G S O"]:
    """The weighted sum of every token's rows, added up in float32."""
    G, S, K = weight_GSK.shape
    return _combine(y_RO, weight_GSK.reshape(G * S, K), maps).reshape(G, S, -1)


def _at(x: Array, index_I: Int[Array, "I"]) -> Array:
    """Rows of x, 0 past its end."""
    return x.at[index_I].get(mode="fill", fill_value=0)


def _sum(rows_of: Callable[[int], Array], K: int) -> Array:
    """A sum over K choices in float32, whose addends are never stored."""
    return sum((rows_of(k).astype(jnp.float32) for k in range(1, K)), rows_of(0).astype(jnp.float32))


def gather_grad(g_RD: Float[Array, "R D"], maps: RowMap) -> Float[Array, "T D"]:
    """Sums the gradients of rows into the gradient of their tokens."""
    return _sum(lambda k: _at(g_RD, maps.row_TK[:, k]), maps.row_TK.shape[1]).astype(g_RD.dtype)


@jax.custom_vjp
def _send(x_TD: Array, maps: RowMap) -> Array:
    return _at(x_TD, maps.token_R)


_send.defvjp(lambda x_TD, maps: (_send(x_TD, maps), maps), lambda maps, g_RD: (gather_grad(g_RD, maps), None))


@jax.custom_vjp
def _combine(y_RO: Array, weight_TK: Array, maps: RowMap) -> Array:
    rows_of = lambda k: weight_TK[:, k, None] * _at(y_RO, maps.row_TK[:, k])  # noqa: E731
    return _sum(rows_of, weight_TK.shape[1]).astype(y_RO.dtype)


def _combine_fwd(y_RO, weight_TK, maps):
    """Saves rows only where weights have a gradient: on a mesh, recomputing unused rows would cost another exchange."""
    kept_RO = y_RO.value if weight_TK.perturbed else None
    y_RO, weight_TK, maps = custom_vjp_primal_tree_values((y_RO, weight_TK, maps))
    return _combine(y_RO, weight_TK, maps), (kept_RO, weight_TK, maps)


def _combine_bwd(residuals, g_TO):
    y_RO, weight_TK, maps = residuals
    if isinstance(g_TO, SymbolicZero):
        g_TO = jnp.zeros(g_TO.shape, g_TO.dtype)
    weight_R = _at(weight_TK.reshape(-1), maps.choice_R)
    if y_RO is None:
        return _weighted(_at(g_TO, maps.token_R), weight_R), None, None
    kernel = on_gpu(y_RO, rows_gpu.weighted_sum_grad)
    dy_RO, dweight_R = lax.platform_dependent(y_RO, g_TO, weight_R, maps.token_R, default=_weighted_sum_grad, **kernel)
    return dy_RO, _at(dweight_R, maps.row_TK.reshape(-1)).reshape(weight_TK.shape), None


def _weighted_sum_grad(y_RO: Array, g_TO: Array, weight_R: Array, token_R: Array) -> tuple[Array, Array]:
    """Gradients of rows and of combine weights, for outputs that are weighted sums of rows."""
    g_RO = _at(g_TO, token_R)
    dweight_R = (g_RO.astype(jnp.float32) * y_RO).sum(-1)
    return _weighted(g_RO, weight_R), dweight_R


def _weighted(g_RO: Array, weight_R: Array) -> Array:
    return (weight_R[:, None] * g_RO).astype(g_RO.dtype)


_combine.defvjp(_combine_fwd, _combine_bwd, symbolic_zeros=True)
