"""An experiment: ml_collections values at the edge, typed frozen dataclasses inside, checked in between.

A component is written as its constructor call in a string, `"TopK(K=2)"`, and parsed without evaluating it.
"""

import ast
import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections

from moe_jax.core.shard import AXES
from moe_jax.data import SOURCES, TOKENIZERS, Bytes, Corpus
from moe_jax.dispatch import DISPATCHERS
from moe_jax.experts import EXPERTS
from moe_jax.models import LMConfig
from moe_jax.moe import MoEConfig
from moe_jax.optim import OPTIMIZERS, SCHEDULES, OptimConfig
from moe_jax.routers import ROUTERS

COMPONENTS = {
    c.__name__: c
    for c in (*ROUTERS, *EXPERTS, *DISPATCHERS, *OPTIMIZERS, *SCHEDULES, *SOURCES, *TOKENIZERS)
}


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """source and tokenizer: where tokens come from. L: tokens per window. B: windows per step, over all devices.

    accumulate: a step goes through its batch in this many pieces, one after another.
    """

    source: Any = Corpus()
    tokenizer: Any = Bytes()
    L: int = 64
    B: int = 32
    accumulate: int = 1


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """How long, how often (in steps), and how much is kept. eval_windows: held-out windows looked at each time.

    max_bad_steps: training stops after so many steps in a row with a non-finite loss or gradient.
    """

    steps: int = 1000
    log_every: int = 20
    eval_every: int = 500
    eval_windows: int = 2048
    save_every: int = 500
    keep_last: int = 2
    keep_best: int = 1
    max_bad_steps: int = 10

    @property
    def intervals(self) -> dict[str, int]:
        return {"log": self.log_every, "eval": self.eval_every, "save": self.save_every}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One experiment, checked: it can be built, and fits the mesh."""

    model: LMConfig
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    run: RunConfig = RunConfig()
    mesh: tuple[tuple[str, int], ...] = (("data", 1), ("expert", 1))
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "mesh", tuple(dict(self.mesh).items()))
        _check_mesh(dict(self.mesh))
        _check_batch(self)
        _check_positive(self.run, "run", zero_is_fine=("keep_best",))

    @property
    def devices(self) -> int | None:
        """Devices the mesh takes; None where it takes all there are."""
        sizes = [n for _, n in self.mesh]
        return None if -1 in sizes else math.prod(sizes)

    def to_json(self) -> str:
        """The experiment as JSON; `from_json` is the inverse."""
        return json.dumps(plain(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "Experiment":
        return build(json.loads(text))


def build(config: Mapping[str, Any]) -> Experiment:
    """The typed experiment of a config file's values. ValueError says which value is wrong, and what would do."""
    if isinstance(config, ml_collections.ConfigDict):
        config = config.to_dict()
    sections = {f.name for f in dataclasses.fields(Experiment)}
    _check_names("config", config, sections)
    data = _section("data", DataConfig, config.get("data", {}))
    model = {**config.get("model", {}), "V": data.tokenizer.V}
    if isinstance(moe := model.get("moe"), Mapping):
        model["moe"] = _section("model.moe", MoEConfig, moe)
    return Experiment(
        model=_section("model", LMConfig, model),
        data=data,
        optim=_section("optim", OptimConfig, config.get("optim", {})),
        run=_section("run", RunConfig, config.get("run", {})),
        mesh=tuple(config.get("mesh", {"data": 1, "expert": 1}).items()),
        seed=config.get("seed", 0),
    )


def plain(value: Any) -> Any:
    """A typed config as the plain values it can be built from."""
    if isinstance(value, tuple(COMPONENTS.values())):
        return repr(value)
    if dataclasses.is_dataclass(value):
        fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, LMConfig):
            del fields["V"]  # the tokenizer's
        return {k: dict(v) if k in ("losses", "mesh") else v for k, v in fields.items()}
    return value


def dense_twin(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The config of the dense model with equal active FLOPs: see `LMConfig.dense_twin`."""
    twin = build(config)
    twin = dataclasses.replace(twin, model=twin.model.dense_twin())
    return ml_collections.ConfigDict(plain(twin))


def parse(text: str, known: Iterable[type] = tuple(COMPONENTS.values())) -> Any:
    """A component from its constructor call: a registered name with literal arguments."""
    names = {c.__name__: c for c in known}
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        node = None
    if isinstance(node, ast.Name):
        raise ValueError(f"{text!r} is not a call; write {text.strip() + '(...)'!r}.")
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        raise ValueError(f"{text!r} is not a component; write its constructor call, like 'TopK(K=2)'.")
    if node.func.id not in names:
        raise ValueError(f"Component {node.func.id!r} is unknown{_near(node.func.id, names)}")
    cls = names[node.func.id]
    fields = [f.name for f in dataclasses.fields(cls)]
    if len(node.args) > len(fields):
        raise ValueError(f"{text!r} has {len(node.args)} arguments; {cls.__name__} takes {fields}.")
    given = dict(zip(fields, node.args, strict=False)) | {str(k.arg): k.value for k in node.keywords}
    _check_names(cls.__name__, given, set(fields))
    try:
        values = {name: ast.literal_eval(value) for name, value in given.items()}
    except ValueError:
        raise ValueError(f"The arguments of {text!r} must be plain values: numbers, strings, None.") from None
    return _construct(cls.__name__, cls, values)


def _section(path: str, cls: type, given: Mapping[str, Any]) -> Any:
    """A dataclass from plain values; strings that stand for components are parsed."""
    if not isinstance(given, Mapping):
        raise ValueError(f"config.{path}={given!r} must have the fields {[f.name for f in dataclasses.fields(cls)]}.")
    hints = typing.get_type_hints(cls)
    _check_names(f"config.{path}", given, {f.name for f in dataclasses.fields(cls)})
    values = {}
    for name, value in given.items():
        if hints[name] is Any and isinstance(value, str):
            try:
                value = None if value == "None" else parse(value)
            except ValueError as error:
                raise ValueError(f"config.{path}.{name}: {error}") from None
        values[name] = tuple(value) if isinstance(value, list) else value
    return _construct(f"config.{path}", cls, values)


def _construct(what: str, cls: type, values: Mapping[str, Any]) -> Any:
    hints = typing.get_type_hints(cls)
    for name, value in values.items():
        if not _fits(value, hints[name]):
            wanted = getattr(hints[name], "__name__", None) or str(hints[name])
            raise ValueError(f"{what}: {name}={value!r} must be {wanted}.")
    required = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
    if missing := sorted(required - set(values)):
        raise ValueError(f"{what} needs {', '.join(missing)}.")
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{what}: {error}" if what.startswith("config") else str(error)) from None


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value has the annotated type; containers are not looked into."""
    if hint is Any:
        return True
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_fits(value, h) for h in typing.get_args(hint))
    kind = typing.get_origin(hint) or hint
    if kind in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if kind is float else kind)


def _check_names(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    for name in given:
        if name not in known:
            raise ValueError(f"{what} has no field {name!r}{_near(name, known)}")


def _near(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(sorted(known))}."


def _check_positive(section: Any, path: str, zero_is_fine: tuple[str, ...] = ()) -> None:
    for f in dataclasses.fields(section):
        value = getattr(section, f.name)
        if isinstance(value, int) and value < (0 if f.name in zero_is_fine else 1):
            raise ValueError(f"config.{path}.{f.name}={value} must be positive.")


def _check_mesh(mesh: Mapping[str, int]) -> None:
    _check_names("config.mesh", mesh, AXES)
    for axis, n in mesh.items():
        if not isinstance(n, int) or (n < 1 and n != -1):
            raise ValueError(f"config.mesh.{axis}={n!r} must be a number of devices, or -1 for the rest.")
    if list(mesh.values()).count(-1) > 1:
        raise ValueError("config.mesh: only one axis can be -1, the rest of the devices.")


def _check_batch(exp: Experiment) -> None:
    """What must divide what, before anything is compiled."""
    mesh, data, moe = dict(exp.mesh), exp.data, exp.model.moe
    _check_positive(data, "data")
    shards = math.prod(n for n in mesh.values() if n > 0)
    if data.B % (shards * data.accumulate):
        raise ValueError(
            f"config.data.B={data.B} sequences do not spread evenly over {shards} devices in "
            f"{data.accumulate} piece(s); B must be a multiple of {shards * data.accumulate}."
        )
    if not isinstance(moe, MoEConfig):
        return
    X = mesh.get("expert", 1)
    if X > 1 and moe.E % X:
        raise ValueError(f"config.model.moe.E={moe.E} experts do not spread evenly over config.mesh.expert={X}.")
    if X > 1 and not moe.dispatch.parallel:
        raise ValueError(
            f"{type(moe.dispatch).__name__}() needs all experts on every device, but config.mesh.expert={X}; "
            "set it to 1 (and mesh.data to the devices), or use 'Scatter(capacity_factor=None)'."
        )
    local = data.B // data.accumulate // shards * data.L
    if moe.S and (local % moe.S):
        raise ValueError(
            f"config.model.moe.S={moe.S} does not divide the {local} tokens that a device sees at once "
            f"(B={data.B} x L={data.L} over {shards} devices in {data.accumulate} piece(s))."
        )
