"""The grouped matmul and the gradient of its weights on NVIDIA GPUs: Pallas kernels, by way of Triton.

Tiles start at the first row of an expert: no tile has rows of two experts, and at most one tile of an expert is
partial. Rows need not be gathered: a tile can fetch its tokens by index, so that no row is ever written (ScatterMoE,
arXiv:2403.08245). Sums are in float32. Float32 matrices are multiplied as XLA does, in TF32 unless
`jax.default_matmul_precision` says otherwise.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from moe_jax.core.kernels.triton import (
    Span,
    Tile,
    dot,
    launch,
    load_block,
    program_ids,
    row_slice,
    store_block,
    token_slice,
)

# The fastest of a dozen each, on an H100 (docs/speed.md).
WIDE, NARROW = Tile(128, 256), Tile(128, 128, step=64, warps=4)  # for long and for short contractions
OUTER, FETCHING = Tile(128, 256), Tile(128, 128, warps=4, most=3)  # for gradients of weights; rows given or fetched
LEAST_ROWS = 512  # bytes of a row; a contraction up to this is short


@partial(jax.jit, static_argnames=("transposed", "tile", "interpret"))
def matmul(
    x: Float[Array, "_ I"],
    w: Float[Array, "E _ _"],
    sizes_E: Int[Array, "E"],
    token_R: Int[Array, "R"] | None = None,
    transposed: bool = False,
    tile: Tile | None = None,
    interpret: bool = False,
) -> Float[Array, "R O"]:
    """Every row times its expert's matrix, w_EIO, or w_EOI where it is transposed; rows past sum(sizes_E) are not set.

    x: the rows, or tokens; then row r is token token_R[r].
    """
    R, I, O = len(x if token_R is None else token_R), x.shape[1], w.shape[1 if transposed else 2]
    tile = tile or (NARROW if I * x.dtype.itemsize <= LEAST_ROWS else WIDE)
    contraction, columns = Span.of(I, tile.step // x.dtype.itemsize), Span.of(O, tile.columns)
    tiles, token = _row_tiles(sizes_E, R, tile.rows), () if token_R is None else (token_R,)

    def kernel(expert_V, first_V, end_V, *refs):
        *token, x, w, out = refs
        index, column = program_ids(len(tiles[0]), columns.blocks)
        e, first, end = expert_V[index], first_V[index], end_V[index]

        @pl.when(first < end)
        def _():
            rows, o = row_slice(first, end, tile.rows), columns.at(column)
            source = token_slice(rows, *token) if token else rows

            def step(i, total):
                i = contraction.at(i)
                w_IO = load_block(w, o, i, e).T if transposed else load_block(w, i, o, e)
                return total + dot(load_block(x, source, i), w_IO)

            total = lax.fori_loop(0, contraction.blocks, step, jnp.zeros((tile.rows, columns.size), jnp.float32))
            store_block(out, rows, o, total)

    programs, out = len(tiles[0]) * columns.blocks, ((R, O), x.dtype)
    return launch(kernel, programs, out, tile, interpret, *tiles, *token, x, w)


@partial(jax.jit, static_argnames=("tile", "interpret"))
def outer(
    x: Float[Array, "_ I"],
    g_RO: Float[Array, "R O"],
    sizes_E: Int[Array, "E"],
    token_R: Int[Array, "R"] | None = None,
    tile: Tile | None = None,
    interpret: bool = False,
) -> Float[Array, "E I O"]:
    """x[rows of e].T @ g[rows of e] for every expert, in the type of x.

    x: the rows, or tokens; then row r is token token_R[r].
    """
    (E,), I, O = sizes_E.shape, x.shape[1], g_RO.shape[1]
    tile = tile or (OUTER if token_R is None else FETCHING)
    across, columns, rows = Span.of(I, tile.rows), Span.of(O, tile.columns), tile.step // x.dtype.itemsize
    end_E, token = jnp.cumsum(sizes_E).astype(jnp.int32), () if token_R is None else (token_R,)

    def kernel(start_E, end_E, *refs):
        *token, x, g, out = refs
        e, row, column = program_ids(E, across.blocks, columns.blocks)
        i, o, start, end = across.at(row), columns.at(column), start_E[e], end_E[e]

        def step(n, total):
            block = row_slice(start + n * rows, end, rows)
            source = token_slice(block, *token) if token else block
            return total + dot(load_block(x, source, i).T, load_block(g, block, o))

        blocks = lax.div(end - start + jnp.int32(rows - 1), jnp.int32(rows))
        total = lax.fori_loop(0, blocks, step, jnp.zeros((across.size, columns.size), jnp.float32))
        store_block(out, i, o, total, e)

    programs, out = E * across.blocks * columns.blocks, ((E, I, O), x.dtype)
    bounds = end_E - sizes_E.astype(jnp.int32), end_E
    return launch(kernel, programs, out, tile, interpret, *bounds, *token, x, g_RO)


def _row_tiles(sizes_E: Int[Array, "E"], R: int, rows: int) -> tuple[Int[Array, "V"], ...]:
    """Expert, first row, and end of the expert's rows, of each of the R / rows + E tiles."""
    E, sizes_E = len(sizes_E), sizes_E.astype(jnp.int32)
    end_E = jnp.cumsum(sizes_E)
    tiles_E = -(-sizes_E // rows)
    until_E = jnp.cumsum(tiles_E)
    tile_V = jnp.arange(pl.cdiv(R, rows) + E, dtype=jnp.int32)
    expert_V = jnp.minimum((until_E[None] <= tile_V[:, None]).sum(1), E - 1)
    first_V = (end_E - sizes_E)[expert_V] + (tile_V - (until_E - tiles_E)[expert_V]) * rows
    end_V = jnp.where(tile_V < until_E[-1], end_E[expert_V], 0)
    return tuple(a.astype(jnp.int32) for a in (expert_V, first_V, end_V))
