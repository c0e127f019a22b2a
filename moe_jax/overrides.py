"""Fields of a config set by their paths, which go on into components: `model.moe.router.K`, `optim.schedule.peak`.

Components are edited as data, and nothing is built: a value may mend what is wrong in a config, and `config.build`
checks the whole once.
"""

import ast
import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from moe_jax.config import (
    COMPONENTS,
    KINDS,
    LISTS,
    SECTIONS,
    ComponentCall,
    check_argument,
    literal,
    plain,
    read_call,
    syntax,
    typed,
    unknown,
)
from moe_jax.core.quoted import quoted
from moe_jax.core.ranges import check_value
from moe_jax.core.shard import AXES
from moe_jax.models import MODELS
from moe_jax.moe import MoEConfig
from moe_jax.words import meant

BOOLEANS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}
NOTHING = (None, "None", dataclasses.MISSING)


def override(config: Mapping[str, Any], given: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """The values of a config with a text for each of these paths; ValueError for a path that leads nowhere.

    A component as a whole goes before its fields, in any order; of two texts for one path the last counts. An entry of
    a tuple has its number, or the name of its component where no other entry has it, as `losses.LoadBalance.weight` of
    `model.moe`; where there is one entry only, neither is needed.
    """
    values = dict(config)
    for path, text in sorted(given, key=lambda pair: (pair[0] != "model.kind", pair[0].count("."))):
        values = _section("config", values, path.split("."), text)
    return values


def known_fields(at: str, values: Mapping[str, Any] = {}) -> dict[str, Any]:
    """The fields of a section, as `config.model.moe`, with their types; values: of a model, to know its kind."""
    path = at.removeprefix("config").lstrip(".")
    if path == "mesh":
        return dict.fromkeys(AXES, int)
    cls = MODELS.get(values.get("kind", "LM"), SECTIONS["model"]) if path == "model" else SECTIONS[path]
    hints = typing.get_type_hints(cls)
    fields = {f.name: hints[f.name] for f in dataclasses.fields(cls)}
    return {"kind": str, **fields} if path == "model" else fields


def _section(at: str, values: Any, names: list[str], text: str) -> dict[str, Any]:
    """The values of a section with one of them set."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{at}={quoted(values)} must be a dict of fields; set them one by one.")
    known, (name, *rest) = known_fields(at, values), names
    if name not in known:
        raise unknown(at, name, [k for k in known if k != "V"], text, "".join(f".{n}" for n in rest))
    where = f"{at}.{name}"
    old = values.get(name, _default(at, name))
    if where == "config.mesh" or where.removeprefix("config.") in SECTIONS:
        if isinstance(old, MoEConfig):
            old = plain(old)
        empty = name not in values or (name == "moe" and old in NOTHING)
        if rest and (empty or name != "moe" or isinstance(old, Mapping)):
            return {**values, name: _section(where, {} if empty else old, rest, text)}
        if name != "moe":
            raise ValueError(f"{where} has the fields {', '.join(known_fields(where))}; set them one by one.")
    if name in LISTS:
        return {**values, name: _entries(where, old, KINDS[name], rest, text)}
    if name in KINDS:
        return {**values, name: _component(where, old, KINDS[name], rest, text)}
    if rest:
        raise ValueError(f"{where}={quoted(old)} has no fields; set it as a whole.")
    return {**values, name: value_of(text, known[name])}


def _default(at: str, name: str) -> Any:
    """The value of a field that a section leaves out; MISSING without a default."""
    cls = SECTIONS.get(at.removeprefix("config").lstrip("."))
    return next((f.default for f in dataclasses.fields(cls) if f.name == name), dataclasses.MISSING) if cls else None


def _entries(where: str, old: Any, known: tuple[type, ...], names: list[str], text: str) -> Any:
    """Components in a tuple, or one alone, with one of them, or a field of one, set."""
    if not names:
        return _several(text)
    entries = [] if old in NOTHING else list(old) if isinstance(old, list | tuple) else [old]
    called = [str(entry).partition("(")[0].strip() for entry in entries]
    name, *rest = names
    target = "" if name in COMPONENTS else meant(name)
    if target.startswith(f"{where}.".removeprefix("config.")) and not target.endswith(f".{name}"):
        raise ValueError(f"{where} has no field {name!r}; {typed(target, text)}.")
    if name.isdecimal() and int(name) < len(entries):
        i = int(name)
    elif called.count(name) == 1:
        i = called.index(name)
    elif len(entries) == 1 and not name.isdecimal() and name not in COMPONENTS:
        i, rest, name = 0, names, ""
    else:
        listed = ", ".join(f"{i}: {entry}" for i, entry in enumerate(entries)) or "none"
        several = f"several entries {name!r}; say which by its number" if name in called else f"no entry {name!r}"
        raise ValueError(f"{where} has {several}; there are {listed}. Set it as a whole to have others.")
    entries[i] = _component(f"{where}.{name}".rstrip("."), entries[i], known, rest, text)
    return tuple(entries)


def _several(text: str) -> Any:
    """The texts of several components written in a tuple, (A(), B()); another text as it is, or the value it writes."""
    node = syntax(text)
    if isinstance(node, ast.Tuple | ast.List) and all(isinstance(part, ast.Call) for part in node.elts):
        return tuple(map(ast.unparse, node.elts))
    return literal(text)


def _component(where: str, old: Any, known: tuple[type, ...], names: list[str], text: str) -> Any:
    """The text of a component with a field set; without names it is the text itself."""
    if not names:
        return text
    if isinstance(old, tuple(COMPONENTS.values())):
        old = repr(old)
    if old in NOTHING or not isinstance(old, str):
        usual = ", ".join(f"'{c.__name__}(...)'" for c in known if c.__name__ in COMPONENTS)
        given = "not set" if old in NOTHING else quoted(old)
        raise ValueError(f"{where} is {given} and has no field {names[0]!r}; set it too, to one of {usual}.")
    try:
        call = read_call(old, known)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return repr(_edited(where, call, names, text))


def _edited(where: str, call: ComponentCall, names: list[str], text: str) -> ComponentCall:
    """A component with a field set, or a field of a component inside of it."""
    name, *rest = names
    check_argument(call.cls, name, where, text, "".join(f".{n}" for n in rest))
    at, hint = f"{where}.{name}", typing.get_type_hints(call.cls)[name]
    if not rest:
        new = _inner(at, text) if hint is Any else value_of(text, hint)
        check_value(f"{at}=#", new, hint)
    else:
        default = next(f.default for f in dataclasses.fields(call.cls) if f.name == name)
        old = call.arguments.get(name, default)
        if isinstance(old, tuple(COMPONENTS.values())):
            old = read_call(repr(old))
        if not isinstance(old, ComponentCall):
            given = "not set" if old in NOTHING else quoted(old)
            raise ValueError(f"{at} is {given} and has no field {rest[0]!r}; set it as a whole too.")
        new = _edited(at, old, rest, text)
    return ComponentCall(call.cls, {**call.arguments, name: new})


def _inner(at: str, text: str) -> Any:
    """A component inside of another, or the value that a text writes, as None."""
    value = literal(text)
    if not isinstance(value, str):
        return value
    try:
        return read_call(value)
    except ValueError as error:
        raise ValueError(f"{at}: {error}") from None


def value_of(text: str, hint: Any) -> Any:
    """The value that a text writes, for a field of this type; the text itself where it writes none of this type."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    value, kinds = literal(text), typing.get_args(hint) if union else (hint,)
    if str in kinds:
        return value if isinstance(value, str) or (value is None and types.NoneType in kinds) else text
    return BOOLEANS.get(text.strip().lower(), value) if hint is bool else value
