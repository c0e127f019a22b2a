"""The gradient of a grouped matmul's weights on TPU: XLA's own would be E times the work."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from moe_jax.core.kernels.triton import varying_axes

ROWS = 512  # rows of a tile


def outer(
    x_RI: Float[Array, "R I"], g_RO: Float[Array, "R O"], sizes_E: Int[Array, "E"], interpret: bool = False
) -> Float[Array, "E I O"]:
    """x[rows of e].T @ g[rows of e] for every expert, in the type of x, added up in float32: a Pallas TPU kernel.

    A visit is a pair of an expert and a tile that holds some of its rows. Visits are sorted by expert, and an expert
    without rows has one visit, which writes zeros (the schedule of MegaBlocks, arXiv:2211.15841, sec. 5.1).
    """
    (R, I), O, E = x_RI.shape, g_RO.shape[1], len(sizes_E)
    rows, tile_I, tile_O = min(ROWS, R), _tile(I), _tile(O)
    visits = _visits(sizes_E, R, rows)
    shape = jax.ShapeDtypeStruct((E, I, O), x_RI.dtype, manual_axis_type=varying_axes(x_RI, g_RO, sizes_E))
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(visits),
        grid=(pl.cdiv(I, tile_I), pl.cdiv(O, tile_O), len(visits[0])),
        in_specs=[
            pl.BlockSpec((rows, tile_I), lambda i, o, v, expert, tile, *_: (tile[v], i)),
            pl.BlockSpec((rows, tile_O), lambda i, o, v, expert, tile, *_: (tile[v], o)),
        ],
        out_specs=pl.BlockSpec((1, tile_I, tile_O), lambda i, o, v, expert, *_: (expert[v], i, o)),
        scratch_shapes=[pltpu.VMEM((tile_I, tile_O), jnp.float32)],
    )
    parallel = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))
    call = pl.pallas_call(_kernel, shape, grid_spec=grid, compiler_params=parallel, interpret=interpret)
    return call(*visits, x_RI, g_RO)


def _kernel(expert_V, tile_V, start_V, end_V, x, g, out, total):
    v, last = pl.program_id(2), pl.num_programs(2) - 1

    @pl.when((v == 0) | (expert_V[v] != expert_V[jnp.maximum(v - 1, 0)]))
    def _():
        total[...] = jnp.zeros_like(total)

    @pl.when(start_V[v] < end_V[v])
    def _():
        row = tile_V[v] * len(x) + lax.broadcasted_iota(jnp.int32, (len(x), 1), 0)
        own = (row >= start_V[v]) & (row < end_V[v])  # other rows may hold anything, NaN included
        own_rows = lambda rows: jnp.where(own, rows[...].astype(jnp.float32), 0)  # noqa: E731
        x_IC, g_CO = own_rows(x).swapaxes(0, 1), own_rows(g)
        if not old_chip():
            x_IC, g_CO = x_IC.astype(x.dtype), g_CO.astype(g.dtype)
        precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        total[...] += jnp.dot(x_IC, g_CO, preferred_element_type=jnp.float32, precision=precision)

    @pl.when((v == last) | (expert_V[v] != expert_V[jnp.minimum(v + 1, last)]))
    def _():
        out[0] = total[...].astype(out.dtype)


def old_chip() -> bool:
    """Tells whether a program is lowered for a TPU whose kernels multiply float32 only: v2 or v3, by the mesh."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is not None and device.device_kind in ("TPU v2", "TPU v3")


def _visits(sizes_E: Int[Array, "E"], R: int, rows: int) -> tuple[Int[Array, "V"], ...]:
    """Expert, tile, first row and last of every visit; at most tiles + experts."""
    E, tiles = len(sizes_E), pl.cdiv(R, rows)
    end_E = jnp.cumsum(sizes_E)
    start_E = end_E - sizes_E
    tiles_E = jnp.where(sizes_E > 0, (end_E - 1) // rows - start_E // rows + 1, 1)
    until_E = jnp.cumsum(tiles_E)
    visit_V = jnp.arange(tiles + E)
    expert_V = jnp.minimum((until_E[None] <= visit_V[:, None]).sum(1), E - 1)  # unused visits belong to the last expert
    tile_V = start_E[expert_V] // rows + visit_V - (until_E - tiles_E)[expert_V]
    end_V = jnp.where(visit_V < until_E[-1], end_E[expert_V], 0)
    return tuple(a.astype(jnp.int32) for a in (expert_V, jnp.clip(tile_V, 0, tiles - 1), start_E[expert_V], end_V))


def _tile(n: int) -> int:
    """Tile of a width: a multiple of the lane count that divides it, or the full width."""
    return next((t for t in (512, 256, 128) if n % t == 0), n)
