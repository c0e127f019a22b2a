"""Eight simulated devices, before JAX starts; a GPU where its own tests are run (make gpu)."""

import gc
import os
from importlib.metadata import version

PLATFORMS = os.environ["JAX_PLATFORMS"] = os.environ.get("TEST_PLATFORMS", "cpu")
if version("jaxlib") < "0.11":  # tests compile more than they compute: this halves it; later ones do not know it
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"

import jax
import pytest

from moe_jax.core.shard import make_mesh

gc.freeze()
gc.set_threshold(20_000, 20, 50)  # programs are traced all the time: an eighth of it went into looking for garbage

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", PLATFORMS == "cpu")


@pytest.fixture(scope="session")
def mesh():
    return make_mesh(data=2, expert=4)
