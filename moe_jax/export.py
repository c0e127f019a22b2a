"""A trained model as files that need neither this package nor Python: StableHLO, safetensors, and a manifest."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax import export as jax_export
from jaxtyping import Array

from moe_jax.files import sha256, write_file, write_sealed
from moe_jax.inspect.run import TrainedRun
from moe_jax.models import Call

PROGRAM, STABLEHLO, WEIGHTS, MANIFEST = "program.jax", "program.stablehlo", "weights.safetensors", "manifest.json"
PLATFORMS = ("cpu", "cuda", "tpu")
KERNELS = (jax_export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton"),)  # they run with the jax of the manifest


@dataclasses.dataclass(frozen=True)
class ModelProgram:
    """The outputs of a trained model as a function of named weights and inputs.

    exported: call(weights, inputs) -> outputs [B, ...], without drops, as in evaluation.
    weights: arrays by name, `params.embed_VD`; the state of routers is among them, `router.bias_E`.
    inputs: shapes and types of the arrays of a batch that the outputs depend on, by name.
    """

    exported: jax_export.Exported
    weights: dict[str, np.ndarray]
    inputs: dict[str, jax.ShapeDtypeStruct]


def export_model(run: TrainedRun, B: int | None = None, platforms: Sequence[str] = ("cpu",)) -> ModelProgram:
    """Exports the forward pass of a run for batches of B rows, by default those of training, on all these platforms.

    ValueError for an unknown platform, or B < 1.
    """
    if not platforms or set(platforms) - set(PLATFORMS):
        listed = ", ".join(platforms) or "none"
        raise ValueError(f"platforms={listed[:100]}: name one or several of {', '.join(PLATFORMS)}.")
    if B is not None and B < 1:
        raise ValueError(f"A program for B={B} rows computes nothing; use B >= 1.")
    weights, tree = named(run.weights), jax.tree.structure(run.weights)
    names, shapes = list(weights), run.exp.data.shapes(run.exp.data.B if B is None else B)

    def outputs(weights: Mapping[str, Array], inputs: Mapping[str, Array]) -> Array:
        both = jax.tree.unflatten(tree, [weights[name] for name in names])
        unused = {n: jnp.zeros(s.shape, s.dtype) for n, s in shapes._asdict().items() if n not in inputs}
        batch = type(shapes)(**inputs, **unused)
        return run.exp.model.dropless().apply(both["params"], batch, Call(router=both["router"]))[0]

    given = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in weights.items()}
    inputs = used_inputs(outputs, given, shapes._asdict())
    exported = jax_export.export(jax.jit(outputs), platforms=tuple(platforms), disabled_checks=KERNELS)(given, inputs)
    return ModelProgram(exported, weights, inputs)


def used_inputs(f: Callable, weights: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs that f(weights, inputs) depends on."""
    jaxpr = jax.make_jaxpr(f)(weights, dict(inputs)).jaxpr
    needed = set(map(id, jaxpr.outvars))
    for eqn in reversed(jaxpr.eqns):
        if needed.intersection(map(id, eqn.outvars)):
            needed.update(map(id, eqn.invars))
    last = jaxpr.invars[len(jaxpr.invars) - len(inputs) :]  # in the order of the names
    return {name: inputs[name] for name, v in zip(sorted(inputs), last, strict=True) if id(v) in needed}


def named(tree: Any) -> dict[str, np.ndarray]:
    """The arrays of nested dicts by the names on their way, joined by dots, in the order of `jax.tree.leaves`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join(str(key.key) for key in path): np.asarray(a) for path, a in leaves}


def write_export(run: TrainedRun, program: ModelProgram, folder: Path) -> dict[str, Any]:
    """Writes an export into a folder, the manifest last; returns the manifest.

    Where the manifest is, all files are complete, and it has their checksums.
    """
    exported, exp = program.exported, run.exp
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    write_file(folder / PROGRAM, bytes(exported.serialize()))
    write_file(folder / STABLEHLO, bytes(exported.mlir_module_serialized))
    write_file(folder / WEIGHTS, safetensors.numpy.save(program.weights))
    files = {name: folder / name for name in (PROGRAM, STABLEHLO, WEIGHTS)}
    content = {
        "config": json.loads(exp.to_json()),
        "step": run.step,
        "jax": jax.__version__,
        "platforms": list(exported.platforms),
        "calling_convention_version": exported.calling_convention_version,
        "weights": {name: array_spec(a) for name, a in program.weights.items()},
        "inputs": {name: array_spec(a) for name, a in program.inputs.items()},
        "outputs": [array_spec(a) for a in exported.out_avals],
        "files": {name: {"sha256": sha256(path), "bytes": path.stat().st_size} for name, path in files.items()},
    }
    write_sealed(folder / MANIFEST, content)
    return content


def array_spec(a: Any) -> dict[str, Any]:
    """Shape and type of an array, as JSON."""
    return {"shape": list(a.shape), "dtype": str(a.dtype)}
