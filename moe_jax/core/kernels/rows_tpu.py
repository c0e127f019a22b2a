"""Elementwise functions of the rows that are used, on TPU: a receive buffer has room for many more."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from moe_jax.core.kernels.triton import varying_axes

ROWS, LANES = 512, 512  # of a tile


def elementwise(
    f: Callable,
    used: Int[Array, ""],
    *xs: Float[Array, "R F"],
    results: int = 1,
    in_place: bool = False,
    interpret: bool = False,
) -> tuple[Float[Array, "R F"], ...]:
    """f of the first `used` rows, number by number in float32; other rows are unspecified. A Pallas TPU kernel.

    f takes len(xs) arrays and returns a tuple of `results`. in_place: results take the memory of the first arrays.
    Tiles without a used row are neither read nor written: their block is that of the last used one, which stays where
    it is.
    """
    (R, F), n = xs[0].shape, len(xs)
    rows, lanes = min(ROWS, R), next((t for t in (LANES, 256, 128) if F % t == 0), F)
    tiles_1 = jnp.maximum(pl.cdiv(used, rows), 1).astype(jnp.int32)[None]
    block = pl.BlockSpec((rows, lanes), lambda column, row, tiles_1: (jnp.minimum(row, tiles_1[0] - 1), column))
    shape = jax.ShapeDtypeStruct((R, F), xs[0].dtype, manual_axis_type=varying_axes(used, *xs))

    def kernel(tiles_1, *blocks):
        @pl.when(pl.program_id(1) < tiles_1[0])
        def _():
            made = f(*(x[...].astype(jnp.float32) for x in blocks[:n]))
            for out, value in zip(blocks[n:], made, strict=True):
                out[...] = value.astype(out.dtype)

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(pl.cdiv(F, lanes), pl.cdiv(R, rows)),
        in_specs=[block] * n,
        out_specs=[block] * results,
    )
    call = pl.pallas_call(
        kernel,
        [shape] * results,
        grid_spec=grid,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        input_output_aliases={1 + i: i for i in range(results)} if in_place else {},
        interpret=interpret,
    )
    return tuple(call(tiles_1, *xs))
