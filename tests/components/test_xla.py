"""Options of the compiler: what is parsed, what is refused; with libtpu (`make tpu`), grouped matmuls on every TPU."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from moe_jax import GLU, make_mesh, xla
from moe_jax.config import RunConfig
from moe_jax.core.groups import Ragged
from moe_jax.plan import compile as compiler
from moe_jax.plan.schedule import Schedule

V5E, V6E = (SimpleNamespace(platform="tpu", device_kind=kind) for kind in ("TPU v5 lite", "TPU v6 lite"))
CPU = SimpleNamespace(platform="cpu", device_kind="cpu")


@pytest.fixture
def takes(monkeypatch):
    """A compiler that knows these options alone."""

    def known(*names: str) -> None:
        monkeypatch.setattr(xla, "_refusal", lambda device, name, value: "" if name in names else "No such option")

    return known


def test_every_program_for_a_tpu_has_grouped_matmuls(takes):
    takes(*xla.ALWAYS, "xla_a", "xla_b")
    assert xla.compiler_options(V5E) == {"xla_tpu_enable_ragged_dot_kernel": True}
    wanted = xla.compiler_options(V5E, "xla_a=12, xla_b=false,xla_tpu_enable_ragged_dot_kernel=false")
    assert wanted == {"xla_a": 12, "xla_b": False, "xla_tpu_enable_ragged_dot_kernel": False}
    assert xla.compiler_options(CPU, "xla_a=12") == {}


def test_an_option_that_nobody_asked_for_is_left_out_where_it_is_not_known(takes):
    takes("xla_a")
    assert xla.compiler_options(V5E, "xla_a=1") == {"xla_a": 1}
    with pytest.raises(ValueError, match=r"^config\.run\.xla: xla_b=2 is refused for TPU v5 lite: No such option$"):
        xla.compiler_options(V5E, "xla_a=1,xla_b=2")


def test_sets_of_options_follow_the_chip(takes):
    takes(*xla.ALWAYS, *xla.ASYNC_COLLECTIVES, "xla_tpu_scoped_vmem_limit_kib")
    assert xla.compiler_options(V6E, "scoped_vmem")["xla_tpu_scoped_vmem_limit_kib"] == 98304
    both = xla.compiler_options(V6E, "async_collectives,scoped_vmem,xla_tpu_scoped_vmem_limit_kib=1024")
    assert both == {**xla.ALWAYS, **xla.ASYNC_COLLECTIVES, "xla_tpu_scoped_vmem_limit_kib": 1024}
    with pytest.raises(ValueError, match=r"scoped_vmem has values for .*, and none for TPU v5 lite; set xla_tpu_scop"):
        xla.compiler_options(V5E, "scoped_vmem")


@pytest.mark.parametrize("text", ["async", "tpu_flag=1", "xla_flag", "scoped_vmem=1"])
def test_text_that_is_no_option_is_refused_in_a_line(text):
    with pytest.raises(ValueError, match=r"^config\.run\.xla has '.*', which is neither a set of options \(async_coll"):
        RunConfig(xla=f"async_collectives,{text}")


# ---------------------------------------------------------------- with libtpu


@pytest.mark.tpu
@pytest.mark.parametrize("slice_", ["v3:2x2", "v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_dropless_experts_are_not_dense_on_any_tpu(slice_):
    """Forward and backward of eight experts are kernels: outside of them at most 1.4 times the model's FLOPs."""
    jax.config.update("jax_disable_most_optimizations", False)  # conftest.py asks for less
    device, (E, R, D, F) = compiler.devices(slice_)[0], (8, 1024, 256, 256)
    one = SingleDeviceSharding(device)
    shape = lambda *n, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(n, dtype, sharding=one)  # noqa: E731
    params = {"gate_EDF": shape(E, D, F), "up_EDF": shape(E, D, F), "down_EFD": shape(E, F, D)}

    def loss(params, x_RD, sizes_E):
        return Ragged(sizes_E).apply(GLU(F), params, x_RD).astype(jnp.float32).sum()

    options = xla.compiler_options(device)
    assert "xla_tpu_enable_ragged_dot_kernel" in options
    program = jax.jit(jax.grad(loss, (0, 1)), compiler_options=options)
    with jax.set_mesh(make_mesh([device])):
        text = program.lower(params, shape(R, D), shape(E, dtype=jnp.int32)).compile().as_text()
    jax.config.update("jax_disable_most_optimizations", True)
    assert Schedule.of(text).flops <= 1.4 * 3 * 2 * R * 3 * D * F
    assert text.count('custom_call_target="tpu_custom_call"') == 11  # 3 forward, 6 backward, 2 for the activation
