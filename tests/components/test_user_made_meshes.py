"""Meshes that `make_mesh` has not made: the layer works on them, or says in a sentence why it does not."""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax import MLP, MoE, NoisyTopK, Scatter, Sort
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


SORT = MoE.of(E=8, router=NoisyTopK(K=2, learned=False), experts=MLP(F=4), dispatch=Sort())


def whole_batch(layer, params, x, over=()):
    """Loss with its auxiliary part, and statistics; `over`: axes that tokens are sharded over in a shard_map."""
    y, aux = layer.apply(params, x, None, KEY)
    total = (y**2).sum()
    return (jax.lax.psum(total, over) if over else total) + aux.loss, aux.stats


@pytest.mark.law(1)
@pytest.mark.parametrize(("layer", "inside"), [(LAYER, False), (SORT, True)], ids=["Scatter", "Sort, gradient inside"])
def test_a_shard_map_over_axes_of_other_names(layer, inside):
    """Noise, auxiliary loss, statistics and gradients are those of one device."""

    def gradient(f, params, x):
        return jax.value_and_grad(f, has_aux=True)(params, x)

    def mapped(f):
        return jax.shard_map(f, in_specs=(P(), P("batch")), out_specs=P())

    one = lambda params, x: whole_batch(layer, params, x)  # noqa: E731
    shard = lambda params, x: whole_batch(layer, params, x, ("batch",))  # noqa: E731
    right = jax.device_get(jax.jit(lambda p, x: gradient(one, p, x))(PARAMS, X))
    with jax.set_mesh(mesh_of("batch", types=(AxisType.Auto,))):
        run = mapped(lambda p, x: gradient(shard, p, x)) if inside else lambda p, x: gradient(mapped(shard), p, x)
        close(jax.device_get(jax.jit(run)(PARAMS, X)), right)


def test_axes_along_which_parameters_vary_too_hold_other_layers():
    """An ensemble: eight layers of their own parameters on the same tokens, each with its own statistics."""
    several = jax.tree.map(lambda w: np.stack([w * (1 + i) for i in range(8)]), PARAMS)

    def member(params, x):
        y, aux = LAYER.apply(jax.tree.map(lambda w: w[0], params), x)
        return y[None], aux.stats.probs_E[None]

    with jax.set_mesh(mesh_of("batch", types=(AxisType.Auto,))):
        run = jax.shard_map(member, in_specs=(P("batch"), P()), out_specs=P("batch"))
        loss = lambda params, x: (run(params, x)[0] ** 2).sum()  # noqa: E731
        (y, probs), dx = jax.device_get((jax.jit(run)(several, X), jax.jit(jax.grad(loss, 1))(several, X)))

    def alone(x):
        found = jax.vmap(lambda p: LAYER.apply(p, x))(several)
        return (found[0] ** 2).sum(), (found[0], found[1].stats.probs_E)

    (_, right), right_dx = jax.jit(jax.value_and_grad(alone, has_aux=True))(jnp.asarray(X))
    close(((y, probs), dx), jax.device_get((right, right_dx)))


def test_statistics_of_one_shard_are_announced():
    """With check_vma=False nobody can tell whether tokens are sharded over an axis of another name."""
    with jax.set_mesh(mesh_of("batch", types=(AxisType.Auto,))):
        run = jax.shard_map(apply, in_specs=(P(), P("batch")), out_specs=P("batch"), check_vma=False)
        with pytest.warns(UserWarning, match=r"\['batch'\] has check_vma=False.* are those of one shard; leave out"):
            jax.eval_shape(run, PARAMS, X)


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
        (
            mesh_of("data", "tensor", types=(AxisType.Auto,) * 2),
            P(),
            jax.shard_map(apply, in_specs=(P(), P(("data", "tensor"))), out_specs=P(("data", "tensor"))),
            r"tokens vary along the mesh axis 'tensor', whose shards must all have the same tokens; give",
        ),
    ],
    ids=["foreign", "partly manual", "whole parameters", "tokens over tensor"],
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
