"""Bytes that a train step needs on one device, by arithmetic; `docs/planning.md` compares them with the compiler's."""

import dataclasses
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import optim
from moe_jax.config import Experiment
from moe_jax.core import dims, shard
from moe_jax.core.shard import AXES, TOKEN_AXES
from moe_jax.costs.activations import FLOAT, DeviceShare, biases, block
from moe_jax.models.pattern import blocks


class Memory(NamedTuple):
    """Bytes on one device. The state is always held; the largest phase of a step adds the peak.

    parameters, optimizer: the state, sharded. accumulated: gradients summed over microbatches. gradients: of the
    parameters of layers. copies: of these in the compute type, made once, outside of the loop over layers.
    activations: kept for the backward pass. layer: needs of a block of layers in its backward pass: weights gathered
    over fsdp, and recomputed activations. head: logits, the embedding as used, and their gradients. embedding: the
    gradient of the full embedding. update: further needs of the optimizer.
    """

    parameters: int
    optimizer: int
    accumulated: int
    gradients: int
    copies: int
    activations: int
    layer: int
    head: int
    embedding: int
    update: int

    @property
    def phases(self) -> dict[str, int]:
        """Bytes in addition to the state, by phase of the step."""
        kept = self.accumulated + self.copies + self.activations
        return {
            "head": kept + self.head,
            "layers": kept + self.gradients + self.layer,
            "embedding": self.accumulated + self.gradients + self.embedding,
            "update": self.gradients + self.update,
        }

    @property
    def total(self) -> int:
        """The predicted peak."""
        return self.parameters + self.optimizer + max(self.phases.values())


class Parameter(NamedTuple):
    """Counts of a parameter on one device."""

    path: tuple[str, ...]
    held: int  # numbers, sharded
    used: int  # numbers of one block of layers, gathered over fsdp
    cast: bool  # whether it is used in the compute type


def memory(exp: Experiment, sizes: Mapping[str, int]) -> Memory:
    """Memory of an experiment's train step on a mesh of these sizes."""
    sizes = {axis: max(sizes.get(axis, 1), 1) for axis in AXES}
    cfg, width = exp.model, jnp.dtype(exp.model.dtype).itemsize
    params, state, optimizer = held(exp, sizes)
    inner, ends = ([p for p in params if in_stack(p) == inside] for inside in (True, False))
    fsdp = sizes["fsdp"] > 1
    activations, layer = layer_memory(exp, sizes, inner)
    logits = sequences(exp, sizes) * exp.data.shapes().target_BL.shape[1] * cfg.V
    table = max(p.used for p in ends if "V" in dims.dims_of(p.path[-1]))
    gathered = FLOAT * table if fsdp else 0
    outside = FLOAT * sum(p.held for p in ends)
    everything = FLOAT * sum(p.held for p in params)
    return Memory(
        parameters=state,
        optimizer=optimizer,
        accumulated=everything + gathered if exp.data.microbatches > 1 else 0,
        gradients=everything - outside,
        copies=width * sum(p.held for p in inner if p.cast) if width < FLOAT else 0,
        activations=activations,
        layer=layer + width * logits,
        head=width * table + 2 * FLOAT * logits,
        embedding=max(gathered, outside) + width * logits,
        update=outside + 2 * FLOAT * max(p.held for p in params),
    )


def layer_memory(exp: Experiment, sizes: Mapping[str, int], params: list[Parameter]) -> tuple[int, int]:
    """Bytes that all layers keep for the backward pass, and the most that one block needs in it."""
    cfg, width = exp.model, jnp.dtype(exp.model.dtype).itemsize
    experts = math.prod(sizes[axis] for axis in exp.exchange.over)
    share = DeviceShare(sequences(exp, sizes), width, sizes["tensor"], experts)
    activations, layer = 0, 0
    for stack in cfg.stacks(exp.data.shapes()):
        for i, repeated in enumerate(blocks(cfg, stack)):
            n = repeated.n
            here = [p for p in params if p.path[0] == f"{stack.prefix}stack_{i}" and p.cast]
            gathered = width * sum(p.used for p in here) if sizes["fsdp"] > 1 else 0
            largest = width * max((p.used for p in here), default=0) if sizes["fsdp"] > 1 else 0
            kept = block(cfg, stack, repeated, share)
            bias = biases(repeated, stack.L, len(repeated.layers) if gathered else 1, share) + gathered + largest
            if cfg.remat == "none":
                activations += n * (kept.inside + gathered)
                layer = max(layer, largest, bias)
            else:
                activations += n * kept.between
                layer = max(layer, kept.inside + gathered, bias)  # a gradient reuses the memory of its weight
    return activations, layer


def activation_memory(exp: Experiment, sizes: Mapping[str, int]) -> int:
    """Bytes of activations and logits in a step, without those of weights: arithmetic alone, for any sizes."""
    activations, layer = layer_memory(exp, sizes, [])
    logits = sequences(exp, sizes) * exp.data.shapes().target_BL.shape[1] * exp.model.V
    return max(activations + layer, activations + 2 * FLOAT * logits)


def sequences(exp: Experiment, sizes: Mapping[str, int]) -> int:
    """Sequences of a microbatch on one device."""
    return math.ceil(exp.data.B / exp.data.microbatches / math.prod(sizes[axis] for axis in TOKEN_AXES))


def in_stack(p: Parameter) -> bool:
    """Tells whether a parameter belongs to the layers."""
    return "stack_" in p.path[0]


def held(exp: Experiment, sizes: Mapping[str, int]) -> tuple[list[Parameter], int, int]:
    """Parameters on one device, and bytes of them and of the optimizer state."""
    data = dataclasses.replace(exp.data, B=1, microbatches=1)
    params, state = state_shapes(exp.model, data, exp.optim, exp.run.steps)
    specs = dims.specs(params, shard.rules_for(exp.exchange, sizes))
    sharded = exp.optim.sharded(params, specs, sizes)
    found = []
    for (path, x), spec in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(specs), strict=True):
        names = optim.names_of(path)
        letters = dims.dims_of(names[-1])
        n = math.prod(dims.local_shape(x.shape, spec, sizes))
        layers = x.shape[0] if "stack_" in names[0] else 1
        gathered = sizes["fsdp"] if dims.fsdp_dim(letters) and not names[-1].startswith("router") else 1
        cast = len(letters) > 1 and not names[-1].startswith("router")
        found.append(Parameter(names, n, n // layers * gathered, cast))
    return found, bytes_of(params, specs, sizes), bytes_of(state, optim.opt_state_specs(state, params, sharded), sizes)


@lru_cache
def state_shapes(model: Any, data: Any, optimizer: Any, steps: int) -> tuple[Any, Any]:
    """Shapes of parameters and of the optimizer state."""
    params = jax.eval_shape(lambda batch: model.init(jax.random.key(0), batch), data.shapes())
    return params, jax.eval_shape(optimizer.build(steps)[0].init, params)


def bytes_of(tree: Any, specs: Any, sizes: Mapping[str, int]) -> int:
    """Bytes of one device's part of arrays with these shardings."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(specs), strict=True)
    return sum(math.prod(dims.local_shape(x.shape, spec, sizes)) * x.dtype.itemsize for x, spec in pairs)
