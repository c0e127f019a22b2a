"""Shardings of trees of many kinds, and of new parameters: by the names of their leaves, and by nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import moe_jax.nnx
from moe_jax import GLU, LM, MHA, MLP, LMConfig, LossFree, MoE, MoEConfig, TwoLevel, batch_sharding, shardings
from moe_jax.core import dims
from moe_jax.core.shard import RULES
from tests.cases import mesh_of

CFG = MoEConfig(E=8, router=LossFree(), experts=MLP(F=6, bias=True), shared=GLU(F=6))
D, X, KEY = 4, jnp.zeros((8, 2, 4)), jax.random.key(0)
EFT = {"down_EFD": ("expert", "tensor", "fsdp"), "up_EDF": ("expert", "fsdp", "tensor")}
EFT |= {"down_ED": ("expert", "fsdp"), "up_EF": ("expert", "tensor")}
EFT |= {"shared_down_FD": ("tensor", "fsdp")} | dict.fromkeys(("shared_gate_DF", "shared_up_DF"), ("fsdp", "tensor"))
TX = {"adam": optax.adam(1e-3), "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))}


class Layer(nn.Module):
    """One of someone else's: a layer of ours between dense ones."""

    @nn.compact
    def __call__(self, x_BLD, state):
        y_BLD, _ = MoE(CFG, name="moe")(nn.Dense(D)(x_BLD), state=state)
        return y_BLD, None


class Model(nn.Module):
    @nn.compact
    def __call__(self, x_BLD):
        layers = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return layers(name="layer_D")(x_BLD, CFG.init_state(3))[0]


def new():
    return jax.eval_shape(MoE(CFG).init, KEY, X)


def linen(module, tx=TX["adam"]):
    def make():
        params = module.init(KEY, X)["params"]
        return TrainState.create(apply_fn=module.apply, params=params, tx=tx), CFG.init_state(3)

    return jax.eval_shape(make)


def of_nnx():
    def make():
        module = moe_jax.nnx.MoE(CFG, D, rngs=nnx.Rngs(0))
        return nnx.state((module, nnx.Optimizer(module, TX["adam"], wrt=nnx.Param)))

    return jax.eval_shape(make)


TREES = {  # and how often each parameter is in it
    "parameters": (lambda: new(), 1),
    "arrays": (lambda: jax.tree.map(lambda s: np.zeros(s.shape), new()), 1),
    "boxes": (
        lambda: {n: nn.Partitioned(w, ()) for n, w in jax.eval_shape(MoE(CFG).init, KEY, X)["params"].items()},
        1,
    ),
    "adam": (lambda: linen(MoE(CFG)), 3),
    "scan": (lambda: linen(Model(), TX["chain"]), 3),
    "nnx": (of_nnx, 3),
}


@pytest.mark.parametrize("kind", TREES)
def test_a_leaf_is_sharded_as_its_name_says(kind):
    """In parameters and the optimizer's moments; axes in front are not sharded, and everything else is replicated."""
    make, times = TREES[kind]
    tree, mesh, seen = make(), mesh_of("f2e2t2"), dict.fromkeys(EFT, 0)
    found = shardings(tree, mesh)
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    for (path, sharding), x in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(tree), strict=True):
        where = jax.tree_util.keystr(path)
        name = next((n for n in EFT if f"'{n}'" in where), None)
        assert sharding.mesh == mesh
        if name is None:
            assert sharding.is_fully_replicated, where
            continue
        seen[name] += 1
        in_front = np.ndim(x) - len(EFT[name])
        assert in_front == (kind == "scan")
        assert sharding.spec == P(*[None] * in_front, *EFT[name]), where
    assert set(seen.values()) == {times}


def test_matrices_of_a_model_are_sharded_as_in_its_train_step():
    """Shardings of all parameters of a language model are those of its train step; vectors are replicated here."""
    cfg = LMConfig(N=2, D=8, V=12, moe=CFG, attention=MHA(2, 4))
    params = jax.eval_shape(LM(cfg).init, KEY, jnp.zeros((8, 2), int))["params"]
    mesh = mesh_of("f2e2t2")
    expected, found = dims.specs(params, RULES), shardings(params, mesh)
    for path, spec in jax.tree.leaves_with_path(expected):
        mine = found
        for key in path:
            mine = mine[key.key]
        vector = len(dims.dims_of(str(path[-1].key))) < 2
        shape = (8,) * len(spec)
        assert mine.shard_shape(shape) == (shape if vector else NamedSharding(mesh, spec).shard_shape(shape)), path


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        (("dense", "kernel"), (8, 8)),
        (("layer_EDF", "kernel"), (8, 8, 8)),  # of a module, not of an array
        (("up_EDF",), (8, 8)),  # fewer axes than letters
        (("lora_B",), (8, 8)),
        (("EDF",), (8, 8, 8)),
        (("out_DD",), (8, 8)),  # two dimensions over one axis
        (("moe", "router_gate_DE"), (8, 8)),
        (("bias_E",), (8,)),
        (("v_row", "up_EDF"), (8, 8, 8)),  # a stack without one of its axes
        ((0, "step_"), ()),
        ((), ()),
    ],
    ids=str,
)
def test_what_is_no_parameter_of_a_layer_is_replicated(path, shape):
    tree = jax.ShapeDtypeStruct(shape, jnp.float32)
    for key in reversed(path):
        tree = {key: tree}
    (sharding,) = jax.tree.leaves(shardings(tree, mesh_of("f2e2t2")))
    assert sharding.spec == P()


def test_adafactors_sums_are_replicated():
    """Sums over rows and columns of a stack have as many axes as the letters of its parameter."""
    params = {"up_EDF": jnp.zeros((3, 8, 4, 4))}
    state = optax.adafactor(1e-3, min_dim_size_to_factor=2).init(params)
    assert sorted(x.shape for x in jax.tree.leaves(state) if x.ndim == 3) == [(3, 4, 4), (3, 8, 4)]
    assert all(s.is_fully_replicated for s in jax.tree.leaves(shardings(state, mesh_of("d2e4"))))


def test_a_size_that_does_not_divide_is_refused():
    params = {"moe": {"up_EDF": jnp.zeros((3, 6, 2, 2))}}
    message = r"^\['moe'\]\['up_EDF'\] has shape \(3, 6, 2, 2\), and axis 1 does not divide evenly over mesh.expert=4; "
    with pytest.raises(ValueError, match=message):
        shardings(params, mesh_of("d2e4"))


def test_experts_over_slices():
    """By the exchange; without one over the mesh axis `expert` alone."""
    params, mesh = {"up_EDF": jnp.zeros((8, 2, 2))}, mesh_of("s2e4")
    two, one = (jax.tree.leaves(shardings(params, mesh, exchange))[0] for exchange in (TwoLevel(), None))
    assert (two.shard_shape((8, 2, 2)), one.shard_shape((8, 2, 2))) == ((1, 2, 2), (2, 2, 2))


def test_the_batch_is_over_all_axes_of_tokens():
    assert batch_sharding(mesh_of("f2e2t2")).shard_shape((8, 3)) == (2, 3)
    assert batch_sharding(mesh_of("s2e4")).shard_shape((8, 3)) == (1, 3)
    assert batch_sharding(jax.make_mesh((2, 4), ("batch", "expert"))).shard_shape((8, 3)) == (2, 3)


def test_axes_with_other_names_shard_nothing():
    mesh = jax.make_mesh((8,), ("batch",))
    assert all(s.is_fully_replicated for s in (shardings({"up_EDF": X}, mesh)["up_EDF"], batch_sharding(mesh)))


# ---------------------------------------------------------------- new parameters

SMALL = MoE.of(E=8, experts=MLP(F=4))


def first_shard(x):
    return x.addressable_shards[0].data.shape


def test_new_parameters_are_sharded_over_the_current_mesh():
    """By `init` alone, with the values that they have without a mesh."""
    expected = jax.jit(SMALL.init)(KEY, X)["params"]
    with jax.set_mesh(mesh_of("d2e4")):
        params = jax.jit(SMALL.init)(KEY, X)["params"]
    assert {n: first_shard(w) for n, w in params.items()} == {
        "router_gate_DE": (4, 8),
        "up_EDF": (2, 4, 4),
        "down_EFD": (2, 4, 4),
    }
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_new_parameters_of_nnx_are_sharded():
    with jax.set_mesh(mesh_of("d2e4")):
        made = moe_jax.nnx.MoE(SMALL.cfg, D, rngs=nnx.Rngs(0))
    assert first_shard(made.up_EDF[...]) == (2, 4, 4)
    assert made.router_gate_DE[...].shape == (4, 8)


def test_new_parameters_go_by_the_exchange():
    layer = MoE.of(E=8, experts=MLP(F=4), exchange=TwoLevel())
    with jax.set_mesh(mesh_of("s2e4")):
        assert first_shard(jax.jit(layer.init)(KEY, X)["params"]["up_EDF"]) == (1, 4, 4)


def test_new_experts_that_do_not_divide_are_not_sharded():
    """A call of the layer refuses them."""
    with jax.set_mesh(mesh_of("d2e4")):
        made = moe_jax.nnx.MoE(MoEConfig(E=6, experts=MLP(F=4)), D, rngs=nnx.Rngs(0))
        assert first_shard(made.up_EDF[...]) == (6, 4, 4)
        with pytest.raises(ValueError, match="E=6 does not "):
            made(X)


def test_axes_that_are_part_of_types_do_not_shard_new_parameters():
    """Explicit ones; initialisation works there."""
    with jax.set_mesh(jax.make_mesh((2, 4), ("data", "expert"), axis_types=(AxisType.Explicit,) * 2)):
        assert jax.jit(SMALL.init)(KEY, X)["params"]["up_EDF"].sharding.is_fully_replicated
