"""Prints the reference of configs: every field and every component, with types, defaults and meanings.

    python -m experiments.reference
    python -m experiments.reference --out=docs/config.md

Everything is read from the dataclasses: meanings from their docstrings, in which a field's begins with its name and a
colon, or from the comment after a field.
"""

import dataclasses
import functools
import inspect
import io
import pathlib
import re
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterable
from typing import Any, NamedTuple

from experiments import cli
from moe_jax.attention import ATTENTION, POSITIONS, SCALINGS
from moe_jax.config import COMPONENTS, KINDS, LISTS, SECTIONS
from moe_jax.core.ranges import in_words
from moe_jax.core.shard import AXES
from moe_jax.data import OBJECTIVES, SOURCES, TOKENIZERS
from moe_jax.dispatch import DISPATCHERS
from moe_jax.exchanges import EXCHANGES
from moe_jax.experts import EXPERTS
from moe_jax.files import write_file
from moe_jax.gating import GATING
from moe_jax.losses import LOSSES
from moe_jax.models import MODELS, TransformerConfig
from moe_jax.moe import MoEConfig
from moe_jax.optim import OPTIMIZERS, SCHEDULES
from moe_jax.overrides import known_fields
from moe_jax.routers import ROUTERS

OUT = cli.out("A file for the reference, instead of printing it.")

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "config.md"
CONFIG = "configs/mixtral_nano.py"  # that the first examples change
SENTENCE = re.compile(r"(?<=[^A-Z][.?!])\s+(?=[A-Z`\"])")


class Kind(NamedTuple):
    """Components that may stand in one place."""

    title: str
    path: str  # of that place
    components: tuple[type, ...]


COMPONENT_KINDS = (
    Kind("Attention", "model.attention", ATTENTION),
    Kind("Positions", "model.attention.position", POSITIONS),
    Kind("Scaling of rotary positions", "model.attention.position.scaling", SCALINGS),
    Kind("Routers", "model.moe.router", ROUTERS),
    Kind("Gating", "model.moe.gating", GATING),
    Kind("Experts", "model.moe.experts", EXPERTS),
    Kind("Dispatch", "model.moe.dispatch", DISPATCHERS),
    Kind("Exchange", "model.moe.exchange", EXCHANGES),
    Kind("Auxiliary losses", "model.moe.losses", LOSSES),
    Kind("Optimizers", "optim.optimizer", OPTIMIZERS),
    Kind("Schedules", "optim.schedule", SCHEDULES),
    Kind("Sources of data", "data.source", SOURCES),
    Kind("Objectives", "data.objective", OBJECTIVES),
    Kind("Tokenizers", "data.tokenizer", TOKENIZERS),
)
# Values for fields without a default, in the examples.
SAMPLES: dict[str, Any] = {
    **{"H": 4, "A": 24, "U": 8, "O": 16, "W": 32, "F": 256, "V": 1000, "factor": 4.0, "original": 4096},
    **{"loss": LOSSES[0](0.01), "peak": 0.001, "path": "my_data", "name": "c4", "source": "de", "target": "en"},
}
# Components that stand in fields of others.
INNER: dict[str, tuple[type, ...]] = {
    **{"position": POSITIONS, "scaling": SCALINGS, "loss": LOSSES, "source": TOKENIZERS}
}
BEGIN = f"""# Config

Which fields does an experiment have, what may stand in each, and what is typed to set it?

Any field can be set on the command line of any program that takes `--config`:

```sh
python -m experiments.train --config={CONFIG} --workdir=runs/mine \\
EXAMPLES
```

A path goes on into a component, as the first four do, and into components inside of it. The rules:

- A component as a whole is its constructor call in quotes, `"TopK(K=4)"`; several are a tuple of calls.
- An entry of a tuple has its number, `losses.0.weight`, or the name of its component where no other entry has it,
  `losses.LoadBalance.weight`. A single entry needs neither: `attention.H`.
- Flags may stand in any order: a component as a whole goes before its fields. Of two flags for one path the last
  counts.
- The config is checked once, with all flags in it, so that a flag may mend what is wrong in the file.
- Every number has a range, an interval: [0, 1) has 0, but not 1. A number outside of it, or that float32 rounds out of
  it, is refused before anything is computed.
- A name that is no field here, but one elsewhere (`num_experts`, `lr`, ...), is answered by the flag to type.

`--print_config` of `experiments.train` shows the result. This page is written by `python -m experiments.reference
--out=docs/config.md`; a test holds it to the code.
"""


def main() -> None:
    if OUT.value:
        write_file(pathlib.Path(OUT.value), page())
    else:
        print(page(), end="")


def page() -> str:
    """The text of docs/config.md."""
    examples = " \\\n".join(f"    --config.{example}" for example in cli.EXAMPLES)
    parts = [BEGIN.replace("EXAMPLES", examples), "## Fields\n", *map(section, SECTIONS), mesh(), "## Components\n"]
    return "\n".join([*parts, *(part for kind in COMPONENT_KINDS for part in components(kind))])


# ---------------------------------------------------------------- fields


def section(path: str) -> str:
    """The table of a section's fields; of the model also of those that only some kinds have."""
    cls, at = SECTIONS[path], f"config.{path}".rstrip(".")
    inside = [name for name in known_fields(at) if f"{path}.{name}".lstrip(".") in (*SECTIONS, "mesh")]
    names = [name for name in known_fields(at) if name not in ("V", "kind", *inside)]
    text = f"### {at}\n\n{linked(first(TransformerConfig if path == 'model' else cls))}\n\n"
    if path != "model":
        return text + table(cls, names, at)
    kinds = "; ".join(f"`{name}`: {first(model).rstrip('.')}" for name, model in MODELS.items())
    kind = (f"`{at}.kind`", " or ".join(f'"{name}"' for name in MODELS), "`'LM'`", kinds)
    text += table(cls, [*names, *inside], at, [kind])
    usual = {f.name: f.default for f in dataclasses.fields(cls)}
    for name, model in MODELS.items():
        if own := [f.name for f in dataclasses.fields(model) if usual.get(f.name, "none") != f.default]:
            text += f"\nOf `kind={name}`:\n\n{table(model, own, at)}"
    return text


def mesh() -> str:
    """The table of the mesh's axes."""
    rows = [(f"`config.mesh.{axis}`", "a whole number in [1, 2**31), or -1 for the rest", "`1`") for axis in AXES]
    return (
        f"### config.mesh\n\nDevices along each axis; see [parallelism](parallelism.md).\n\n{markdown(HEAD[:3], rows)}"
    )


HEAD = ("field", "takes", "default", "meaning")


def table(cls: type, names: Iterable[str], at: str = "", rows: Iterable[tuple[str, ...]] = ()) -> str:
    """A row for each of these fields of a dataclass, with the path `at` in front of them, after these rows."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    found = [
        (f"`{at}.{name}`" if at else f"`{name}`", takes(cls, name), default(fields[name]), meaning(cls, name))
        for name in names
    ]
    return markdown(HEAD, [*rows, *found])


def markdown(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(linked(cell).replace('|', chr(92) + '|') for cell in row)} |\n" for row in lines)


def takes(cls: type, name: str) -> str:
    """The values a field takes, in words, with links to the components that may stand in it."""
    known = (INNER if cls in COMPONENTS.values() else KINDS).get(name, ())
    kinds = [
        f"[{kind.title.lower()}](#{anchor(kind.title)})" for kind in COMPONENT_KINDS if set(kind.components) & {*known}
    ]
    hint = typing.get_type_hints(cls, include_extras=True)[name]
    if not kinds or (cls in COMPONENTS.values() and hint is not Any):
        return in_words(hint)
    kinds += ["the fields of `config.model.moe`"] * (MoEConfig in known) + ["None"] * (types.NoneType in known)
    return ("one or several of " if name in LISTS else "one of ") + " or ".join(kinds)


def default(field: dataclasses.Field) -> str:
    return "required" if field.default is dataclasses.MISSING else f"`{field.default!r}`"


# ---------------------------------------------------------------- components


def components(kind: Kind) -> Iterable[str]:
    """The parts of the page about components that stand in one place."""
    yield f"### {kind.title}\n\nThey stand in `config.{kind.path}`.\n"
    for cls in kind.components:
        names = [f.name for f in dataclasses.fields(cls)]
        rows = f"{table(cls, names)}\n" if names else ""
        yield f"#### {cls.__name__}\n\n{linked(first(cls))}\n\n{rows}    --config.{kind.path}={example(kind, cls)}\n"


def example(kind: Kind, cls: type) -> str:
    """A component as it is typed."""
    required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING or f.name == "original"]
    call = f"{cls.__name__}({', '.join(f'{name}={SAMPLES[name]!r}' for name in required)})"
    return f'"{call}"'


# ---------------------------------------------------------------- meanings


def first(cls: type) -> str:
    """The first line of a docstring."""
    return inspect.cleandoc(cls.__doc__ or "").partition("\n")[0]


def meaning(cls: type, name: str) -> str:
    """A field's meaning in a sentence, "" without one.

    It is what the docstring says after the field's name, or the comment after the field. Without either the first line
    of the docstring names it, or the first component in the same place that has this field says it.
    """
    kind = next((kind.components for kind in COMPONENT_KINDS if cls in kind.components), ())
    own = [base for base in cls.__mro__ if dataclasses.is_dataclass(base)]
    if not any(name in said(base) for base in own) and re.search(rf"(?<!\w){name}(?!\w)", first(cls)):
        return "see above"
    return next((said(other)[name].rstrip(".") for other in (*own, *kind) if name in said(other)), "")


def said(cls: type) -> dict[str, str]:
    """The meanings that a class itself gives its fields, by name."""
    return comments(cls) | entries(cls)


@functools.cache
def entries(cls: type) -> dict[str, str]:
    """The first sentence of what a docstring says after names of fields and a colon, by name."""
    names, found = {f.name for f in dataclasses.fields(cls)}, {}
    for paragraph in inspect.cleandoc(vars(cls).get("__doc__") or "").split("\n\n"):
        marks = list(re.finditer(r"(?:^|(?<=[.] ))((?:\w+, )*\w+): ", re.sub(r"\n +", " ", paragraph), re.MULTILINE))
        marks = [mark for mark in marks if set(mark[1].split(", ")) <= names]
        ends = [*(mark.start() for mark in marks[1:]), None]
        for mark, end in zip(marks, ends, strict=False):
            text = " ".join(mark.string[mark.end() : end].split())
            found |= dict.fromkeys(mark[1].split(", "), SENTENCE.split(text)[0].strip())
    return found


@functools.cache
def comments(cls: type) -> dict[str, str]:
    """The comments after fields, by name."""
    source = textwrap.dedent(inspect.getsource(cls))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    found = {n: re.match(r"    (\w+): ", line) for n, line in enumerate(source.splitlines(), 1)}
    return {match[1]: lines[n] for n, match in found.items() if match and n in lines}


def linked(text: str) -> str:
    """A text with its papers linked."""
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


if __name__ == "__main__":
    cli.run(main)
