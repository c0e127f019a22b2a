"""Gradient of weighted sums of rows on NVIDIA GPUs in one pass (XLA takes two): a Pallas kernel, by way of Triton."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from moe_jax.core.kernels.triton import (
    Span,
    Tile,
    launch,
    load_block,
    program_ids,
    row_slice,
    store_block,
    token_slice,
    triton,
)

TILE = Tile(16, 512)


@partial(jax.jit, static_argnames=("tile", "interpret"))
def weighted_sum_grad(
    y_RD: Float[Array, "R D"],
    g_TD: Float[Array, "T D"],
    weight_R: Float[Array, "R"],
    token_R: Int[Array, "R"],
    tile: Tile = TILE,
    interpret: bool = False,
) -> tuple[Float[Array, "R D"], Float[Array, "R"]]:
    """Gradients of rows and of combine weights, for outputs that are weighted sums of rows.

    token_R: T for rows without a token, whose gradients are 0 whatever they hold.
    """
    (R, D), T = y_RD.shape, len(g_TD)
    columns = Span.of(D, tile.columns)

    def kernel(weight, token, y, g, dy, dweight):
        (n,) = program_ids(pl.cdiv(R, tile.rows))
        block = row_slice(n * tile.rows, R, tile.rows)
        tokens = token_slice(block, token)
        valid = block.inside & (tokens.at < T)
        weight_C1 = triton.load(weight.at[block.at], mask=valid, other=0)[:, None]
        rows, tokens = block._replace(inside=valid), tokens._replace(inside=valid)

        def step(column, total):
            d = columns.at(column)
            g_CD = load_block(g, tokens, d).astype(jnp.float32)
            store_block(dy, block, d, weight_C1 * g_CD)
            return total + (g_CD * load_block(y, rows, d).astype(jnp.float32)).sum(1)

        total = lax.fori_loop(0, columns.blocks, step, jnp.zeros((tile.rows,), jnp.float32))
        triton.store(dweight.at[block.at], total, mask=block.inside)

    outs = (y_RD.shape, y_RD.dtype), ((R,), jnp.dtype(jnp.float32))
    args = weight_R.astype(jnp.float32), token_R.astype(jnp.int32), y_RD, g_TD
    return launch(kernel, pl.cdiv(R, tile.rows), outs, tile, interpret, *args)
