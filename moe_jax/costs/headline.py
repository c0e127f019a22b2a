"""An experiment in a few lines: model, data, mesh and parameters, as pages begin with them."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from moe_jax.config import Experiment, kind_of
from moe_jax.costs.parameters import parameters


def headline(exp: Experiment) -> dict[str, str]:
    """Rows of words: the model, its parameters, the data of a step, the mesh."""
    count = parameters(exp.model)
    return {
        "model": model_words(exp.model),
        "parameters": f"{count.total:,} in all, {count.active:,} active for a token",
        "data": data_words(exp),
        "mesh": mesh_words(exp.mesh),
    }


def model_words(model: Any) -> str:
    """A model in a line: kind, layers, width, attention, dense and MoE layers."""
    attention = ", ".join(dict.fromkeys(short(part) for part in model.attention))
    words = [f"{kind_of(model)}: {model.N} layers, D={model.D}, {attention}, {short(model.ffn)}"]
    if (moe := model.routed) is not None:
        n = model.n_moe_layers
        stacks = f" in {model.STACKS} stacks" if model.STACKS > 1 else ""
        words.append(
            f"{n} MoE layer{'s' * (n > 1)}{stacks} of {moe.E} experts {short(moe.experts)}, {short(moe.router)}, "
            f"{short(moe.dispatch)}"
        )
    return "; ".join(words)


def data_words(exp: Experiment) -> str:
    """Source, tokenizer, objective and the batch of a step, in a line."""
    data = exp.data
    parts = [short(data.source), short(data.tokenizer), short(data.objective)]
    if data.objective.batch_kind == "images":
        return f"{parts[0]}, {parts[2]}; {data.B:,} images a step"
    return f"{', '.join(parts)}; {data.B:,} sequences of {data.L:,} tokens a step"


def mesh_words(mesh: Iterable[tuple[str, int]]) -> str:
    """Axes that have more than one device, data=2 x expert=4; -1 is inferred from the devices."""
    return " x ".join(f"{axis}={'inferred' if n == -1 else n}" for axis, n in mesh if n != 1) or "one device"


def short(component: Any) -> str:
    """A component as one would write it: without what is default."""
    if not dataclasses.is_dataclass(component) or isinstance(component, type):
        return repr(component)
    values = [(f, getattr(component, f.name)) for f in dataclasses.fields(component)]
    given = ", ".join(f"{f.name}={short(value)}" for f, value in values if value != f.default)
    return f"{type(component).__name__}({given})"
