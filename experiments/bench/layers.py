"""Timed functions: an MoE layer with all that a training step uses of it, and its dense baseline."""

import contextlib
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from experiments.bench.shapes import Shape
from experiments.bench.timing import Program, compiled
from experiments.bench.tokens import Tokens
from moe_jax.core import dims, shard
from moe_jax.core.groups import Dense, Padded
from moe_jax.core.shard import Shard
from moe_jax.moe import MoE, MoEConfig, shared_specs, sizes_of


class Placement(NamedTuple):
    """Placement of arrays: on the first device, or sharded over a mesh."""

    mesh: Mesh | None = None

    def here(self, exchange: Any = None) -> Shard:
        """A shard of the mesh; Shard() without one."""
        with self.active():
            return shard.from_mesh(exchange)

    def active(self) -> contextlib.AbstractContextManager:
        return jax.set_mesh(self.mesh) if self.mesh else jax.default_device(jax.devices()[0])

    def put(self, tree: Any, specs: Any) -> Any:
        """Puts arrays on devices by their PartitionSpecs; specs may be a prefix of the tree."""
        if self.mesh is None:
            return jax.device_put(tree, jax.devices()[0])
        shardings = jax.tree.map(
            partial(NamedSharding, self.mesh), specs, is_leaf=lambda p: isinstance(p, PartitionSpec)
        )
        return jax.device_put(tree, shardings)

    def axis_size(self, axes: tuple[str, ...]) -> int:
        """Number of shards along these axes."""
        return math.prod(self.mesh.shape[axis] for axis in axes) if self.mesh else 1

    @property
    def shards(self) -> int:
        """Number of shards of the batch."""
        return self.axis_size(shard.TOKEN_AXES)


class Passes(NamedTuple):
    """Forward alone, and forward with backward."""

    forward: Program
    both: Program

    @property
    def seconds(self) -> list[float]:
        return [program.seconds for program in self]


# ---------------------------------------------------------------- the layer


def layer_passes(cfg: MoEConfig, placement: Placement, params: Any, x_BLD: Array, mask_BL: Array) -> Passes:
    """Timed passes of the layer: outputs, losses and statistics; gradients of an objective by parameters and tokens."""

    def forward(params, x_BLD, mask_BL):
        y_BLD, aux = MoE(cfg).apply({"params": params}, x_BLD, mask_BL)
        return y_BLD, aux.loss, aux.stats

    def objective(params, x_BLD, mask_BL):
        y_BLD, loss, stats = forward(params, x_BLD, mask_BL)
        return square(y_BLD) + loss, stats

    both = jax.value_and_grad(objective, (0, 1), has_aux=True)
    with placement.active():
        return Passes(*(compiled(f, params, x_BLD, mask_BL) for f in (forward, both)))


def layer_inputs(
    cfg: MoEConfig, shape: Shape, tokens: Tokens, placement: Placement, params: Any = None
) -> tuple[Any, ...]:
    """(params, x_BLD, mask_BL); given parameters get the gate of these tokens."""
    here = placement.here(cfg.exchange)
    if params is None:
        x_BLD = jax.ShapeDtypeStruct((1, shape.L, shape.D), jnp.float32)
        shapes = jax.eval_shape(MoE(cfg).init, jax.random.key(0), x_BLD)["params"]
        params = drawn({name: s.shape for name, s in shapes.items()}, shape.weights)
        params = placement.put(params, dims.specs(params, here.rules))
    gate = {"router_gate_DE": placement.put(jnp.asarray(tokens.gate_DE), PartitionSpec())}
    x_BLD = jnp.asarray(tokens.x_TD.reshape(-1, shape.L, shape.D), shape.dtype)
    rows = shard.token_spec(here)
    return params | gate, *placement.put((x_BLD, jnp.ones(x_BLD.shape[:2], bool)), (rows, rows))


# ---------------------------------------------------------------- its dense baseline


def baseline_passes(shape: Shape, placement: Placement, params: Any, x_TD: Array) -> Passes:
    """Timed passes of the dense layer, whose tokens are in one dimension: the faster way on XLA's CPU backend."""

    def forward(params, x_TD):
        return shape.dense_baseline(params, x_TD, Dense())

    both = jax.value_and_grad(lambda params, x_TD: square(forward(params, x_TD)), (0, 1))
    with placement.active():
        return Passes(*(compiled(f, params, x_TD) for f in (forward, both)))


def baseline_inputs(shape: Shape, placement: Placement) -> tuple[Any, Array]:
    """(params, x_TD), with random tokens: the time of a dense layer does not depend on them."""
    here, sizes = placement.here(), {**sizes_of(shape.dense_baseline), "D": shape.D}
    shapes = {name: dims.shape_of(dims.dims_of(name.replace("_E", "_")), sizes) for name in shape.dense_baseline.params}
    params = drawn(shapes, shape.weights)
    x_TD = jax.random.normal(jax.random.key(1), (shape.T, shape.D)).astype(shape.dtype)
    return placement.put(params, shared_specs(params, here)), placement.put(x_TD, shard.token_spec(here))


# ---------------------------------------------------------------- lower bound


def batched_passes(shape: Shape) -> tuple[Passes, Any]:
    """The experts' matmuls alone, as XLA batches them, on equally many rows per expert; and their inputs."""
    sizes = {**sizes_of(shape.experts), "D": shape.D, "E": shape.E}
    params = drawn({name: dims.shape_of(dims.dims_of(name), sizes) for name in shape.experts.params}, shape.weights)
    rows = shape.E, -(-shape.T * shape.K // shape.E), shape.D
    x_ECD = jax.random.normal(jax.random.key(1), rows).astype(shape.dtype)

    def forward(params, x_ECD):
        return shape.experts(params, x_ECD, Padded())

    both = jax.value_and_grad(lambda params, x_ECD: square(forward(params, x_ECD)), (0, 1))
    return Passes(*(compiled(f, params, x_ECD) for f in (forward, both))), (params, x_ECD)


# ---------------------------------------------------------------- both


def square(y: Array) -> Array:
    """Loss that is minimised: the mean square, in float32."""
    return (y.astype(jnp.float32) ** 2).mean()


def drawn(shapes: Mapping[str, tuple[int, ...]], dtype: str = "float32") -> dict[str, Array]:
    """Parameters of these shapes and this type, of variance 1 / fan_in."""

    @jax.jit
    def draw(key):
        keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
        scale = {n: (s[-2] if len(s) > 1 else 1) ** -0.5 for n, s in shapes.items()}
        return {n: (scale[n] * jax.random.normal(keys[n], s)).astype(dtype) for n, s in shapes.items()}

    return draw(jax.random.key(0))
