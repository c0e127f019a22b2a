"""Masked block loads and stores for Pallas-Triton kernels."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

try:
    from jax.experimental.pallas import triton
except ImportError:  # deprecated in JAX
    triton = None  # type: ignore[assignment]

TYPES = (jnp.bfloat16, jnp.float16, jnp.float32) if triton else ()  # other types are left to XLA
# CUDA C++ programming guide, technical specifications by compute capability.
KIB = {"8.0": 163, "8.7": 163, "9.0": 227, "10.0": 227, "10.3": 227}


def supported(x: Array) -> bool:
    """Tells whether the kernels support the type of x."""
    return x.dtype in TYPES


def on_gpu(x: Array, kernel: Callable) -> dict[str, Callable]:
    """The kernel as an argument of `by_platform`, if it knows the type of x."""
    return {"cuda": kernel} if supported(x) else {}


def shared_memory() -> int:
    """Bytes of shared memory a program may use on this machine's GPU; on an H100 where there is none."""
    try:
        return KIB.get(jax.local_devices(backend="cuda")[0].compute_capability, 99) * 1024
    except RuntimeError:
        return KIB["9.0"] * 1024


class Tile(NamedTuple):
    """Tile of a kernel: rows and columns that one program computes, and its step along the contraction."""

    rows: int  # of the result
    columns: int
    step: int = 128  # bytes
    warps: int = 8
    most: int = 4  # pipeline stages at most

    @property
    def stages(self) -> int:
        return max(1, min(self.most, shared_memory() // (self.step * (self.rows + self.columns))))


class BlockSlice(NamedTuple):
    """Part of a dimension: indices, and the mask of those inside the array; None if all are."""

    at: Any  # a slice, or indices
    inside: Array | None

    @property
    def size(self) -> int:
        return len(self.at) if isinstance(self.at, jax.Array) else self.at.size


class Span(NamedTuple):
    """A width in blocks of a power of two; the last block may reach beyond the width."""

    width: int
    size: int
    blocks: int

    @classmethod
    def of(cls, width: int, most: int) -> "Span":
        even = width & -width  # the largest power of two that divides it
        size = min(most, even if even >= min(most, 64) else max(16, pl.next_power_of_2(width)))
        return cls(width, size, pl.cdiv(width, size))

    def at(self, n: Any) -> BlockSlice:
        first = jnp.asarray(n, jnp.int32) * self.size
        inside = first + jnp.arange(self.size, dtype=jnp.int32) < self.width if self.width % self.size else None
        return BlockSlice(pl.ds(first, self.size), inside)


def varying_axes(*args: Array) -> Any:
    """Mesh axes along which a result of all these arrays varies."""
    types = [jax.typeof(a).manual_axis_type for a in args]
    return type(types[0])(varying=frozenset().union(*(t.varying for t in types)))


def program_ids(*counts: int) -> list[Any]:
    """Indices of this program in a grid of these sizes, the last dimension fastest."""
    left, ids = pl.program_id(0), []
    for count in reversed(counts):
        ids.append(left % count)
        left = left // count
    return ids[::-1]


def row_slice(first: Any, end: Any, n: int) -> BlockSlice:
    """Block of n rows; those before the end are inside."""
    return BlockSlice(pl.ds(first, n), first + jnp.arange(n, dtype=jnp.int32) < end)


def token_slice(rows: BlockSlice, token: Any) -> BlockSlice:
    """Block of the tokens of a block of rows; `token` is a reference to their indices."""
    return BlockSlice(triton.load(token.at[rows.at], mask=rows.inside, other=0), rows.inside)


def load_block(ref: Any, down: BlockSlice, across: BlockSlice, *leading: Any) -> Array:
    """Loads a block, 0 outside the array; leading: indices of the dimensions before these two."""
    mask, indices = _mask(down, across), [down.at, across.at]
    if isinstance(down.at, jax.Array):
        numbers = down.at[:, None], (across.at.start + jnp.arange(across.size, dtype=jnp.int32))[None]
        indices = [jnp.broadcast_to(n, (down.size, across.size)) for n in numbers]
    return triton.load(ref.at[*leading, *indices], mask=mask, other=None if mask is None else 0)


def store_block(ref: Any, down: BlockSlice, across: BlockSlice, total: Array, *leading: Any) -> None:
    triton.store(ref.at[*leading, down.at, across.at], total.astype(ref.dtype), mask=_mask(down, across))


def _mask(down: BlockSlice, across: BlockSlice) -> Array | None:
    parts = [jnp.expand_dims(b.inside, axis) for axis, b in ((1, down), (0, across)) if b.inside is not None]
    return jnp.broadcast_to(parts[0] & parts[-1], (down.size, across.size)) if parts else None


def dot(a: Array, b: Array) -> Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def launch(kernel: Any, programs: int, outs: Any, tile: Tile, interpret: bool, *args: Array) -> Any:
    """Runs a kernel on a grid of `programs`. outs: (shape, type) of a result, or a tuple of them."""
    varies = varying_axes(*args)
    shape = lambda out: jax.ShapeDtypeStruct(*out, manual_axis_type=varies)  # noqa: E731
    shapes = tuple(map(shape, outs)) if isinstance(outs[0][0], tuple) else shape(outs)
    params = triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages)
    return pl.pallas_call(kernel, shapes, grid=(programs,), compiler_params=params, interpret=interpret)(*args)
