"""Layouts of "rows grouped by expert". What an expert computes is written once, for all of them."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int


@runtime_checkable
class Groups(Protocol):
    """What an expert may ask of the rows it is given."""

    def matmul(self, x: Array, w_EIO: Array) -> Array:
        """Every row times its expert's matrix."""
        ...

    def bias(self, x: Array, b_EO: Array) -> Array:
        """Every row plus its expert's vector."""
        ...


@dataclasses.dataclass(frozen=True)
class Dense:
    """One expert for all rows: x[..., I]. A dense feed-forward layer, or a shared expert."""

    def matmul(self, x: Float[Array, "... I"], w_IO: Float[Array, "I O"]) -> Float[Array, "... O"]:
        return x @ w_IO.astype(x.dtype)

    def bias(self, x: Float[Array, "... O"], b_O: Float[Array, "O"]) -> Float[Array, "... O"]:
        return x + jnp.broadcast_to(b_O.astype(x.dtype), x.shape)


@dataclasses.dataclass(frozen=True)
class Padded:
    """A fixed number of rows per expert: x[E, C, I]."""

    def matmul(self, x_ECI: Float[Array, "E C I"], w_EIO: Float[Array, "E I O"]) -> Float[Array, "E C O"]:
        return jnp.einsum("eci,eio->eco", x_ECI, w_EIO.astype(x_ECI.dtype))

    def bias(self, x_ECO: Float[Array, "E C O"], b_EO: Float[Array, "E O"]) -> Float[Array, "E C O"]:
        return x_ECO + b_EO[:, None, :].astype(x_ECO.dtype)


@dataclasses.dataclass(frozen=True)
class Ragged:
    """The rows of all experts back to back: x[R, I], the first sizes_E[0] of them expert 0's, and so on.

    Rows past sum(sizes_E) belong to nobody: what comes back there is unspecified and must not be read.
    """

    sizes_E: Int[Array, "E"]

    def matmul(self, x_RI: Float[Array, "R I"], w_EIO: Float[Array, "E I O"]) -> Float[Array, "R O"]:
        return ragged_matmul(x_RI, w_EIO.astype(x_RI.dtype), self.sizes_E)

    def bias(self, x_RO: Float[Array, "R O"], b_EO: Float[Array, "E O"]) -> Float[Array, "R O"]:
        R = x_RO.shape[0]
        b_RO = jnp.repeat(b_EO, self.sizes_E, axis=0, total_repeat_length=R).astype(x_RO.dtype)
        mine_R1 = (jnp.arange(R) < self.sizes_E.sum())[:, None]  # no gradient from rows that are nobody's
        return x_RO + jnp.where(mine_R1, b_RO, 0)


@jax.custom_vjp
def ragged_matmul(
    x_RI: Float[Array, "R I"], w_EIO: Float[Array, "E I O"], sizes_E: Int[Array, "E"]
) -> Float[Array, "R O"]:
    """Grouped matmul: `lax.ragged_dot`, which on CPU is E times as much work, and there a loop over experts.

    The loop gives every expert a slice just large enough for its rows, from a ladder of static sizes.
    """
    return lax.platform_dependent(x_RI, w_EIO, sizes_E, cpu=_ladder_matmul, default=lax.ragged_dot)


def _ragged_fwd(x_RI, w_EIO, sizes_E):
    return ragged_matmul(x_RI, w_EIO, sizes_E), (x_RI, w_EIO, sizes_E)


def _ragged_bwd(residuals, g_RO):
    x_RI, w_EIO, sizes_E = residuals
    dx_RI = ragged_matmul(g_RO, w_EIO.swapaxes(1, 2), sizes_E)
    dw_EIO = lax.platform_dependent(x_RI, w_EIO, sizes_E, g_RO, cpu=_ladder_dw, default=_dot_dw)
    return dx_RI, dw_EIO, None


ragged_matmul.defvjp(_ragged_fwd, _ragged_bwd)


def _dot_dw(x_RI, w_EIO, sizes_E, g_RO):
    return jax.vjp(lambda w: lax.ragged_dot(x_RI, w, sizes_E), w_EIO)[1](g_RO)[0]


def _ladder_matmul(x_RI, w_EIO, sizes_E):
    def visit(e, rows, mine_C1, y_RO):
        new_CO = rows.read(x_RI) @ w_EIO[e]
        return rows.write(y_RO, jnp.where(mine_C1, new_CO, rows.read(y_RO)))

    return _each_expert(visit, sizes_E, x_RI, (x_RI.shape[0], w_EIO.shape[2]))


def _ladder_dw(x_RI, w_EIO, sizes_E, g_RO):
    def visit(e, rows, mine_C1, dw_EIO):
        g_CO = jnp.where(mine_C1, rows.read(g_RO), 0)
        return dw_EIO.at[e].set(rows.read(x_RI).T @ g_CO)

    return _each_expert(visit, sizes_E, x_RI, w_EIO.shape)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """C rows from a first one on."""

    first: Int[Array, ""]
    C: int

    def read(self, x_RI: Array) -> Array:
        return lax.dynamic_slice_in_dim(x_RI, self.first, self.C)

    def write(self, x_RI: Array, new_CI: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(x_RI, new_CI, self.first, 0)


def _each_expert(visit: Callable, sizes_E: Int[Array, "E"], like: Array, shape: tuple[int, ...]) -> Array:
    """Folds visit(e, rows, which of them are e's, carry) over experts, from zeros of this shape."""
    (E,), R = sizes_E.shape, like.shape[0]
    start_E, ladder = jnp.cumsum(sizes_E) - sizes_E, _ladder(R)

    def body(e, carry):
        def rung(C, carry):
            rows = _Rows(jnp.minimum(start_E[e], R - C), C)  # at the end, earlier rows come along
            row_C = rows.first + jnp.arange(C)
            mine_C = (row_C >= start_E[e]) & (row_C < start_E[e] + sizes_E[e])
            return visit(e, rows, mine_C[:, None], carry)

        return lax.switch(jnp.searchsorted(ladder, sizes_E[e]), [partial(rung, int(C)) for C in ladder], carry)

    return lax.fori_loop(0, E, body, lax.full_like(like, 0, shape=shape))


def _ladder(R: int) -> np.ndarray:
    """Static row counts, each about a quarter larger than the last, up to R."""
    rungs, C = [], 16
    while C < R:
        rungs.append(C)
        C = max(C + 16, C * 5 // 4 // 16 * 16)
    return np.array([*rungs, R])
