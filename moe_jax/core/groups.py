"""Layouts of rows grouped by expert; an expert is written once, for all of them."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from moe_jax.core.kernels.by_expert import by_expert
from moe_jax.core.kernels.triton import supported
from moe_jax.core.ragged import map_rows, ragged_matmul, sent_matmul
from moe_jax.core.rows import LazyRows, materialize


@runtime_checkable
class Groups(Protocol):
    """Operations that an expert applies to its rows, in any layout."""

    def matmul(self, x: Array, w_EIO: Array) -> Array:
        """Every row times its expert's matrix."""
        ...

    def bias(self, x: Array, b_EO: Array) -> Array:
        """Every row plus its expert's vector."""
        ...

    def elementwise(self, f: Callable, *xs: Array) -> Array:
        """f of arrays of rows, number by number."""
        ...

    def apply(self, expert: Callable, params: Any, x: Array | LazyRows) -> Array:
        """Applies expert(params, x, self) to the rows in the fastest way."""
        ...


@dataclasses.dataclass(frozen=True)
class Dense:
    """One expert for all rows: x[..., I]. A dense feed-forward layer, or a shared expert."""

    def matmul(self, x: Float[Array, "... I"], w_IO: Float[Array, "I O"]) -> Float[Array, "... O"]:
        # With several leading dimensions, XLA's CPU backend copies transposes for the gradient of w.
        y_TO = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) @ w_IO.astype(x.dtype)
        return y_TO.reshape(*x.shape[:-1], y_TO.shape[-1])

    def bias(self, x: Float[Array, "... O"], b_O: Float[Array, "O"]) -> Float[Array, "... O"]:
        return x + jnp.broadcast_to(b_O.astype(x.dtype), x.shape)

    def elementwise(self, f: Callable, *xs: Float[Array, "... F"]) -> Float[Array, "... F"]:
        return f(*xs)

    def apply(self, expert: Callable, params: Any, x: Float[Array, "... D"]) -> Float[Array, "... O"]:
        return expert(params, x, self)


@dataclasses.dataclass(frozen=True)
class Padded:
    """A fixed number of rows per expert: x[E, C, I]."""

    def matmul(self, x_ECI: Float[Array, "E C I"], w_EIO: Float[Array, "E I O"]) -> Float[Array, "E C O"]:
        return jnp.einsum("eci,eio->eco", x_ECI, w_EIO.astype(x_ECI.dtype))

    def bias(self, x_ECO: Float[Array, "E C O"], b_EO: Float[Array, "E O"]) -> Float[Array, "E C O"]:
        return x_ECO + b_EO[:, None, :].astype(x_ECO.dtype)

    def elementwise(self, f: Callable, *xs: Float[Array, "E C F"]) -> Float[Array, "E C F"]:
        return f(*xs)

    def apply(self, expert: Callable, params: Any, x: Float[Array, "E C D"]) -> Float[Array, "E C O"]:
        return expert(params, x, self)


class FetchedRows(NamedTuple):
    """The rows of experts, and the tokens that a matmul may fetch them from, so that the rows need not be stored."""

    rows: Float[Array, "R D"]
    sent: LazyRows


@dataclasses.dataclass(frozen=True)
class Ragged:
    """The rows of all experts back to back: x[R, I], the first sizes_E[0] of them expert 0's, and so on.

    Rows past sum(sizes_E) belong to no expert: results there are unspecified and must not be read.
    """

    sizes_E: Int[Array, "E"]
    fetched: FetchedRows | None = None

    def matmul(self, x_RI: Float[Array, "R I"], w_EIO: Float[Array, "E I O"]) -> Float[Array, "R O"]:
        w_EIO = w_EIO.astype(x_RI.dtype)
        if self.fetched and x_RI is self.fetched.rows:
            return sent_matmul(*self.fetched.sent, w_EIO, self.sizes_E)
        return ragged_matmul(x_RI, w_EIO, self.sizes_E)

    def bias(self, x_RO: Float[Array, "R O"], b_EO: Float[Array, "E O"]) -> Float[Array, "R O"]:
        R = x_RO.shape[0]
        b_RO = jnp.repeat(b_EO, self.sizes_E, axis=0, total_repeat_length=R).astype(x_RO.dtype)
        valid_R1 = (jnp.arange(R) < self.sizes_E.sum())[:, None]  # no gradient from rows of no expert
        return x_RO + jnp.where(valid_R1, b_RO, 0)

    def elementwise(self, f: Callable, *xs: Float[Array, "R F"]) -> Float[Array, "R F"]:
        """f of the rows of experts; on a TPU others are not computed."""
        return map_rows(f, self.sizes_E.sum(), *xs)

    def apply(self, expert: Callable, params: Any, x: Float[Array, "R D"] | LazyRows) -> Float[Array, "R O"]:
        """Runs grouped matmuls, or one expert after another on a CPU, whose grouped matmul does E times the work."""

        def one_by_one(params, x, sizes_E):
            return OneByOne(sizes_E).apply(expert, params, x)

        def at_once(params, x, sizes_E):
            return expert(params, materialize(x), Ragged(sizes_E))

        def fetching(params, x, sizes_E):
            rows = materialize(x)
            fetched = FetchedRows(rows, x) if isinstance(x, LazyRows) and supported(rows) else None
            return expert(params, rows, Ragged(sizes_E, fetched))

        return lax.platform_dependent(params, x, self.sizes_E, cpu=one_by_one, cuda=fetching, default=at_once)


class OneByOne(Ragged):
    """Ragged rows on a platform without a grouped matmul: one expert after another."""

    def apply(self, expert: Callable, params: Any, x: Float[Array, "R D"] | LazyRows) -> Float[Array, "R O"]:
        return by_expert(expert, params, materialize(x), self.sizes_E)
