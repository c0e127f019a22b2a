"""Meshes that `make_mesh` has not made: the layer works on them, or says in a sentence why it does not."""

from contextlib import nullcontext

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax import MLP, MoE, NoisyTopK, Scatter
from tests.cases import close, normal

LAYER = MoE.of(E=8, router=NoisyTopK(K=2, learned=False), experts=MLP(F=4), dispatch=Scatter(1.0))
X, KEY = normal(0, 8, 6, 4), jax.random.key(1)
PARAMS = jax.device_get(jax.jit(LAYER.init)(KEY, X))
BOTH = P(("data", "expert"))


def step(params, x):
    def loss(params, x):
        y, aux = LAYER.apply(params, x, None, KEY)
        return (y**2).sum() + aux.loss, (y, aux)

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)


@pytest.fixture(scope="module")
def one():
    return jax.device_get(jax.jit(step)(PARAMS, X))


def mesh_of(*names, types=None):
    sizes = (2, 4) if len(names) == 2 else (8,)
    return jax.make_mesh(sizes, names, axis_types=types)


MIXED = (AxisType.Auto, AxisType.Explicit)


@pytest.mark.law(1)
@pytest.mark.parametrize(
    ("mesh", "spec"),
    [
        (mesh_of("data", "expert"), P()),  # Explicit by default
        (mesh_of("data", "expert"), P("data")),
        (mesh_of("data", "expert", types=MIXED), P()),
        (mesh_of("batch", "expert", types=(AxisType.Auto,) * 2), P("batch")),
        (mesh_of("batch", "expert"), P("batch")),
        (mesh_of("batch", types=(AxisType.Auto,)), P("batch")),
        (mesh_of("batch"), P()),
    ],
    ids=str,
)
def test_other_meshes(mesh, spec, one):
    """Explicit axes, and axes with other names beside or instead of ours: initialisation, values and gradients."""
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, spec))
        close(jax.device_get(jax.jit(LAYER.init)(KEY, x)), PARAMS)
        close(jax.device_get(jax.jit(step)(PARAMS, x)), one)


@pytest.mark.parametrize("mesh", [None, mesh_of("data", "expert")], ids=str)
def test_outputs_beside_parameters_are_those_of_the_input(mesh):
    """`init_with_output` gives what `apply` gives with the parameters it makes."""
    with jax.set_mesh(mesh) if mesh else nullcontext():
        (y, _), made = jax.device_get(jax.jit(LAYER.init_with_output)(KEY, X))
    close(y, jax.jit(LAYER.apply)(made, X)[0])
    assert np.abs(y).max() > 0


def apply(params, x):
    return LAYER.apply(params, x)[0]


@pytest.mark.parametrize(
    ("mesh", "spec", "f", "message"),
    [
        (mesh_of("batch"), P("batch"), apply, r"Explicit mesh axes \['batch'\], .* or make them with axis_types"),
        (
            mesh_of("data", "expert", types=(AxisType.Auto,) * 2),
            P(),
            jax.shard_map(apply, in_specs=(P(), P("data")), out_specs=P("data"), axis_names={"data"}),
            r"over the mesh axes \['data'\] only, but the layer communicates over \['expert'\] too; leave out",
        ),
        (
            mesh_of("data", "expert", types=(AxisType.Auto,) * 2),
            P(),
            jax.shard_map(apply, in_specs=(P(), BOTH), out_specs=BOTH),
            r"up_EDF has 8 experts, but a shard has 2 of E=8; give parameters in_specs that shard E over",
        ),
    ],
    ids=["foreign", "partly manual", "whole parameters"],
)
def test_what_cannot_work_is_refused(mesh, spec, f, message):
    """In one sentence, which says what to do."""
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, spec))
        with pytest.raises(ValueError, match=message):
            jax.jit(f)(PARAMS, x)


def test_a_shard_map_of_all_axes(one):
    """With parameters as a shard has them the layer is a function of one shard."""
    with jax.set_mesh(mesh_of("data", "expert", types=(AxisType.Auto,) * 2)):
        specs = {"params": {n: P("expert") if "_E" in n else P() for n in PARAMS["params"]}}
        run = jax.shard_map(lambda p, x: LAYER.apply(p, x, None, KEY)[0], in_specs=(specs, BOTH), out_specs=BOTH)
        np.testing.assert_allclose(jax.jit(run)(PARAMS, X), one[0][1][0], rtol=1e-5, atol=1e-5)
