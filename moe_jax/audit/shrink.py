"""Shrinks a user's experiment for simulated devices, and lists the changes."""

import dataclasses
import math
from typing import Any

from moe_jax.config import Experiment
from moe_jax.data import Digits
from moe_jax.models import Model, ViTConfig
from moe_jax.moe import MoEConfig
from moe_jax.optim import Constant

V, D, H, A, F, L = 512, 32, 4, 8, 16, 32  # at most
PATCH = 2  # of 8 x 8 images
RATE = 0.01
B = 64  # at least: two sequences, in two microbatches, for each of 16 shards


def shrink(exp: Experiment, devices: int) -> tuple[Experiment, list[str]]:
    """The experiment in float32 at small widths on a mesh of at most `devices`, and a list of the changes.

    Routing, losses, dispatch, exchange, number of experts, kinds of layers, rematerialisation, microbatches and
    optimizer are as configured. Its learning rate is constant, and large, so that one step shows in float32.
    """
    data = dataclasses.replace(exp.data, L=min(L, exp.data.L))
    if isinstance(exp.model, ViTConfig):
        data = dataclasses.replace(data, source=Digits())
    model = narrow(exp.model, exp.data.shapes(1), data.shapes(1))
    rows = exp.data.microbatches * devices * rows_of_a_group(model, data.shapes(1))
    data = dataclasses.replace(data, B=max(rows, B // rows * rows))
    mesh = tuple(fold(dict(exp.mesh), devices).items())
    optim = dataclasses.replace(exp.optim, schedule=Constant(RATE))
    small = dataclasses.replace(exp, model=model, data=data, optim=optim, mesh=mesh)
    return small, changed_fields(exp, small)


def narrow(model: Model, full: Any, small: Any) -> Model:
    """The model at small widths, with layers of every kind, for `small` batches instead of `full` ones."""
    sizes: dict[str, Any] = {"V": min(V, model.V), "D": min(D, model.D)}
    sizes["attention"] = tuple(map(narrow_heads, model.attention))
    if isinstance(model, ViTConfig):
        sizes |= {"V": Digits.V, "image": Digits.image, "patch": PATCH}
    if model.routed is not None and (S := model.routed.S):
        length = dataclasses.replace(model, moe=None, moe_layers="none", **sizes).stacks(small)[0].L
        S = max(1, S * length // model.stacks(full)[0].L)
        moe = dataclasses.replace(thin_layer(model.moe), S=S)
    else:
        moe = thin_layer(model.moe)
    parts = {"ffn": thin(model.ffn), "dense_after_moe": thin(model.dense_after_moe), "moe": moe}
    return shallow(dataclasses.replace(model, **parts, dtype="float32", **sizes))


def narrow_heads(attention: Any) -> Any:
    """An attention with few small heads, and the same share of heads of keys; its other widths small as well."""
    fields = {f.name: getattr(attention, f.name) for f in dataclasses.fields(attention)}
    widths = {name: n for name, n in fields.items() if len(name) == 1 and n is not None}
    small = {name: min(H if name == "H" else A, n) for name, n in widths.items()}
    if "J" in widths:
        small["J"] = max(1, small["H"] * widths["J"] // widths["H"])
    return dataclasses.replace(attention, **small)


def kinds(model: Model) -> set[Any]:
    """The kinds of layers that a model has."""
    return {model.sublayers(stack, i) for stack in model.stacks() for i in range(model.N)}


def thin_layer(moe: Any) -> Any:
    """Returns the content of sparse layers with few hidden units."""
    if not isinstance(moe, MoEConfig):
        return thin(moe)
    return dataclasses.replace(moe, experts=thin(moe.experts), shared=thin(moe.shared))


def rows_of_a_group(model: Model, batch: Any) -> int:
    """Number of sequences that make whole routing groups in every stack."""
    routed = [stack for stack in model.stacks(batch) if isinstance(stack.moe, MoEConfig)]
    return math.lcm(*(stack.moe.sequences(stack.L) for stack in routed))


def thin(expert: Any) -> Any:
    """An expert with few hidden units."""
    return expert if expert is None else dataclasses.replace(expert, F=min(F, expert.F))


def shallow(model: Model) -> Model:
    """Returns the model with the fewest layers that include every kind, and two that route where there are two."""
    for N in range(1, model.N):
        try:
            fewer = dataclasses.replace(model, N=N)
        except ValueError:  # moe_layers names layers that are cut off
            continue
        if kinds(fewer) == kinds(model) and fewer.n_moe_layers >= min(2, model.n_moe_layers):
            return fewer
    return model


def fold(mesh: dict[str, int], devices: int) -> dict[str, int]:
    """A mesh on at most `devices`, its largest axes halved; an inferred axis (-1) counts as 1."""
    sizes = {axis: max(n, 1) for axis, n in mesh.items()}
    while math.prod(sizes.values()) > devices:
        largest = max(sizes, key=lambda axis: sizes[axis])
        sizes[largest] = sizes[largest] // 2 if sizes[largest] % 2 == 0 else 1
    if -1 in mesh.values() and devices % (known := math.prod(sizes.values())) == 0:
        sizes[next(axis for axis, n in mesh.items() if n == -1)] = devices // known
    return sizes


def changed_fields(exp: Experiment, small: Experiment) -> list[str]:
    """Lists what was changed from the config."""
    pairs = [(name, getattr(exp, name), getattr(small, name)) for name in ("data", "optim", "model")]
    if exp.model.routed is not None:
        pairs.append(("model.moe", exp.model.moe, small.model.moe))
    changed = [
        f"{path}.{f.name} {short_repr(old)} -> {short_repr(new)}"
        for path, one, other in pairs
        for f in dataclasses.fields(one)
        if (old := getattr(one, f.name)) != (new := getattr(other, f.name)) and f.name != "moe"
    ]
    sizes = {axis: n for axis, n in small.mesh if n > 1}
    if dict(exp.mesh) != dict(small.mesh):
        changed.append("mesh " + (" x ".join(f"{axis}={n}" for axis, n in sizes.items()) or "of one device"))
    return changed


def short_repr(value: Any) -> str:
    return f"F={value.F}" if hasattr(value, "F") else repr(value)
