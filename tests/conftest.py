"""Eight simulated devices, before JAX starts."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile more than they compute: this halves it.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"

import jax
import pytest

from moe_jax.core.shard import make_mesh

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def mesh():
    return make_mesh(data=2, expert=4)
