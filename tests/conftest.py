"""Eight simulated devices, before JAX starts; a GPU where its own tests are run (make gpu)."""

import gc
import os
import shutil
import signal
import tempfile
from importlib.metadata import version

PLATFORMS = os.environ["JAX_PLATFORMS"] = os.environ.get("TEST_PLATFORMS", "cpu")
if version("jaxlib") < "0.11":  # tests compile more than they compute: this halves it; later ones do not know it
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"

OWNER = "TEST_PROGRAMS" not in os.environ  # workers of xdist, and a pytest that a test starts, share one folder
PROGRAMS = os.environ.setdefault("TEST_PROGRAMS", tempfile.mkdtemp(prefix="moe_jax_tests_") if OWNER else "")

import jax
import pytest

from moe_jax.audit.laws import LAWS
from moe_jax.core.shard import make_mesh

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would children
gc.freeze()
gc.set_threshold(20_000, 20, 50)  # programs are traced all the time: an eighth of it went into looking for garbage

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", PLATFORMS == "cpu")
jax.config.update("jax_compilation_cache_dir", PROGRAMS)  # many tests compile the same program: a third of the time
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_addoption(parser):
    about = "run the tests of law N alone (docs/laws.md); may be repeated"
    parser.addoption("--law", type=int, action="append", default=[], metavar="N", help=about)


def pytest_configure(config):
    if unknown := set(config.getoption("law")) - {law.number for law in LAWS}:
        raise pytest.UsageError(f"--law {min(unknown)} is no law; the laws are 1 to {len(LAWS)} (docs/laws.md).")


def pytest_unconfigure():
    if OWNER:
        shutil.rmtree(PROGRAMS, ignore_errors=True)


def pytest_collection_modifyitems(config, items):
    """Keeps the tests of the laws that --law names."""
    if asked := set(config.getoption("law")):
        kept = [i for i in items if asked & {n for mark in i.iter_markers("law") for n in mark.args}]
        config.hook.pytest_deselected(items=[i for i in items if i not in kept])
        items[:] = kept


@pytest.fixture(scope="session")
def mesh():
    return make_mesh(data=2, expert=4)
