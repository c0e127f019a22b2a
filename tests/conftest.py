"""Eight simulated devices, before JAX starts."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import pytest

from moe_jax.core.shard import make_mesh

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)  # tests compile more than they compute


@pytest.fixture(scope="session")
def mesh():
    return make_mesh(data=2, expert=4)
