"""Exchanges over several slices: every row reaches its expert and comes back, from two slices to four."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe_jax import AllGather, AllToAll, RaggedAllToAll, TwoLevel, make_mesh
from moe_jax.core import shard
from moe_jax.core.groups import Padded, Ragged

BOTH = ("slice", "expert")
E, R, D = 24, 48, 2  # experts; rows of a device, padded to two for each expert


def on_slices(exchange, slices, sizes_XE=None):
    """Rows [X * R, D] of all devices, each counting up, through experts that multiply by their number + 1."""
    mesh = make_mesh(jax.devices()[: 2 * slices], slice=slices, expert=2)
    x = np.arange(2 * slices * R * D, dtype=np.float32).reshape(-1, D)

    def device(matrix_EDD, x_RD, sizes_1E):
        expert = lambda params, x, groups: groups.matmul(x, params["matrix_EDD"])  # noqa: E731
        padded = sizes_XE is None
        rows, groups = (x_RD.reshape(E, -1, D), Padded()) if padded else (x_RD, Ragged(sizes_1E[0]))
        return exchange(here, expert, {"matrix_EDD": matrix_EDD}, rows, groups)[0].reshape(-1, D)

    with jax.set_mesh(mesh):
        here, rows = shard.from_mesh(exchange), P(BOTH)
        run = jax.jit(shard.per_shard(device, here, (P(here.experts), rows, rows), rows))
        matrix_EDD = jnp.eye(D)[None] * (1 + jnp.arange(E, dtype=jnp.float32))[:, None, None]
        sizes = jnp.zeros((2 * slices, E), jnp.int32) if sizes_XE is None else jnp.asarray(sizes_XE)
        return x, np.asarray(run(matrix_EDD, x, sizes))


@pytest.mark.law(1)
@pytest.mark.parametrize("slices", [3, 4])
@pytest.mark.parametrize("exchange", [TwoLevel(), AllToAll(over=BOTH), AllGather(over=BOTH)], ids=str)
def test_rows_reach_their_experts(exchange, slices):
    """Law 1: the rows of an expert are multiplied with its matrix, whichever of 3 or 4 slices it is in."""
    x, y = on_slices(exchange, slices)
    expert_R = np.tile(np.repeat(np.arange(E), R // E), 2 * slices)
    np.testing.assert_array_equal(y, x * (1 + expert_R)[:, None])


@pytest.mark.law(1)
@pytest.mark.parametrize("slices", [3, 4])
def test_ragged_rows_reach_their_experts(slices):
    """Law 1: so do slices of unequal sizes, empty ones included."""
    sizes_XE = np.random.default_rng(0).multinomial(R, np.ones(E) / E, 2 * slices).astype(np.int32)
    assert (sizes_XE == 0).any()
    x, y = on_slices(RaggedAllToAll(over=BOTH), slices, sizes_XE)
    expert_R = np.concatenate([np.repeat(np.arange(E), sizes_E) for sizes_E in sizes_XE])
    np.testing.assert_array_equal(y, x * (1 + expert_R)[:, None])
