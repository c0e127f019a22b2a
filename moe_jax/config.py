"""An experiment: ml_collections values at the edge, typed frozen dataclasses inside, checked in between.

A component is written as its constructor call in a string, `"TopK(K=2)"`, and parsed without evaluating it.
"""

import ast
import dataclasses
import difflib
import json
import math
import pathlib
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from typing import Annotated, Any

import ml_collections
import numpy as np

from moe_jax.attention import ATTENTION, POSITIONS, SCALINGS
from moe_jax.core.quoted import quoted
from moe_jax.core.ranges import (
    UNIONS,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Range,
    check_ranges,
    check_value,
    fits,
    without_range,
)
from moe_jax.core.shard import AXES, RULES, TOKEN_AXES
from moe_jax.data import (
    OBJECTIVES,
    SERIAL,
    SOURCES,
    TOKENIZERS,
    Bytes,
    Corpus,
    Limited,
    NextToken,
    Preparation,
)
from moe_jax.dispatch import DISPATCHERS
from moe_jax.exchanges import EXCHANGES, AllToAll
from moe_jax.experts import EXPERTS
from moe_jax.files import parse_json
from moe_jax.gating import GATING
from moe_jax.losses import LOSSES
from moe_jax.models import MODELS, LMConfig, Model
from moe_jax.models.pattern import layer_counts
from moe_jax.moe import MoEConfig, check_divides, check_mesh
from moe_jax.optim import OPTIMIZERS, SCHEDULES, OptimConfig
from moe_jax.routers import ROUTERS
from moe_jax.words import meant, meant_field
from moe_jax.xla import check_options

LAYERS = (ATTENTION, POSITIONS, SCALINGS, ROUTERS, GATING, EXPERTS, DISPATCHERS, EXCHANGES, LOSSES)
REGISTERED = (*LAYERS, OPTIMIZERS, SCHEDULES, SOURCES, OBJECTIVES, TOKENIZERS)
NESTED = (*POSITIONS, *SCALINGS)  # stand in other components alone
COMPONENTS: dict[str, type] = {c.__name__: c for kind in REGISTERED for c in kind}
# What may stand in a field that holds a component, or, in those of LISTS, several.
KINDS: dict[str, tuple[type, ...]] = {
    "attention": ATTENTION,
    "router": ROUTERS,
    "experts": EXPERTS,
    "dispatch": DISPATCHERS,
    "exchange": EXCHANGES,
    "shared": (*EXPERTS, types.NoneType),
    "ffn": EXPERTS,
    "dense_after_moe": (*EXPERTS, types.NoneType),
    "moe": (*EXPERTS, MoEConfig, types.NoneType),
    "source": SOURCES,
    "objective": OBJECTIVES,
    "tokenizer": TOKENIZERS,
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "gating": GATING,
    "losses": LOSSES,
}
LISTS = ("attention", "gating", "losses")
NOT_LITERAL = (SyntaxError, ValueError, TypeError, MemoryError, RecursionError)  # what ast says to it
LONGEST, DEEPEST = 10_000, 50  # characters, or bits of a number, and levels of a text that is parsed


Seed = Annotated[int, Range(0, 2**32, "[)")]
Devices = Annotated[int, Range(-1, 2**31, "[)")]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data of an experiment: where it comes from, what is to be predicted, and how much a step takes.

    source: where documents, pairs or images come from. tokenizer: turns text into token ids, and says how many there
        are.
    L: tokens per sequence.
    B: sequences per step, of all devices together.
    microbatches: a step goes through its batch in this many microbatches, one after another; auxiliary losses are their
        means, weighted by tokens.
    objective: what is to be predicted, which says what a sequence is where it is not text.
    documents: at most so many training documents (or pairs) of the source, and a twentieth of it held out; None: all.
    """

    source: Any = Corpus()
    tokenizer: Any = Bytes()
    L: PositiveInt = 64
    B: PositiveInt = 32
    microbatches: PositiveInt = 1
    objective: Any = NextToken()
    documents: PositiveInt | None = None

    def __post_init__(self):
        check_ranges(self)
        if self.documents is not None and not {"documents", "pairs"} & set(dir(type(self.source))):
            raise ValueError(f"documents={self.documents} limits text, and {self.source} has none; set it to None.")

    @property
    def sizes(self) -> dict[str, Any]:
        """Fields of the model that the data says."""
        return self.objective.sizes(self.source, self.tokenizer)

    def shapes(self, B: int | None = None) -> Any:
        """Shapes of a batch of B rows, as arrays without values."""
        return self.objective.shapes(self.source, self.B if B is None else B, self.L)

    def prepare(self, directory: pathlib.Path, how: Preparation = SERIAL) -> tuple[Any, Any]:
        """The training and the held-out examples, made once and kept under `directory`."""
        source = self.source if self.documents is None else Limited(self.source, self.documents)
        return self.objective.prepare(source, self.tokenizer, self.L, directory, how)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Run: number of steps, intervals in steps, and the checkpoints that are kept.

    steps: training steps.
    log_every: steps between log records. eval_every: steps between evaluations. save_every: steps between checkpoints.
    eval_sequences: held-out sequences of each evaluation.
    keep_last: newest checkpoints that are kept. keep_best: checkpoints of the lowest held-out loss that are kept.
    max_bad_steps: training stops after so many steps in a row with a non-finite loss or gradient.
    watts: power of a chip or a CPU core in W, for the energy in the run's last record (`costs.energy`); None takes what
        is published. pue: power usage effectiveness of the data centre. carbon: kg of CO2e per kWh.
    xla: options of the compiler on TPU, separated by commas: sets (async_collectives, scoped_vmem) and xla_name=value;
        docs/planning.md has them.
    """

    steps: PositiveInt = 1000
    log_every: PositiveInt = 20
    eval_every: PositiveInt = 500
    eval_sequences: PositiveInt = 2048
    save_every: PositiveInt = 500
    keep_last: PositiveInt = 2
    keep_best: NonNegativeInt = 1
    max_bad_steps: PositiveInt = 10
    watts: NonNegativeFloat | None = None
    pue: Annotated[float, Range(1, math.inf, "[)")] = 1.1
    carbon: NonNegativeFloat = 0.429
    xla: str = ""

    def __post_init__(self):
        check_ranges(self)
        check_options(self.xla)

    @property
    def intervals(self) -> dict[str, int]:
        return {"log": self.log_every, "eval": self.eval_every, "save": self.save_every}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One experiment, checked: it can be built, and fits the mesh.

    model: the network. data: what it is trained on. optim: how. run: for how long. mesh: sizes of the device mesh's
        axes, 1 where left out; one may be -1, the rest of the devices.
    seed: of parameters, of the order of the data, and of all that is drawn in training.
    """

    model: Model
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    run: RunConfig = RunConfig()
    mesh: tuple[tuple[str, Devices], ...] = ()
    seed: Seed = 0

    def __post_init__(self):
        _check_names("config.mesh", dict(self.mesh), AXES)
        object.__setattr__(self, "mesh", tuple((axis, dict(self.mesh).get(axis, 1)) for axis in AXES))
        check_value("config.seed=#", self.seed, Seed)
        _check_mesh(dict(self.mesh))
        _check_objective(self)
        _check_batch(self)
        self.optim.build(self.run.steps)  # says if the schedule does not fit

    @property
    def exchange(self) -> Any:
        """Exchange of the MoE layers, which names the mesh axes that experts are sharded over."""
        return getattr(self.model.moe, "exchange", AllToAll())

    @property
    def weighs_microbatches(self) -> bool:
        """Tells whether a step weighs the auxiliary losses of its microbatches by their tokens."""
        return self.data.microbatches > 1 and self.model.routed is not None and bool(self.model.routed.losses)

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
        return build(parse_json(text))


def build(config: Mapping[str, Any] | ml_collections.ConfigDict) -> Experiment:
    """The typed experiment of a config file's values; ValueError says which is wrong, and what would do."""
    if isinstance(config, ml_collections.ConfigDict):
        config = config.to_dict()
    _check_names("config", config, [f.name for f in dataclasses.fields(Experiment)])
    sections = ("model", "data", "optim", "run", "mesh")
    config = {**{name: {} for name in sections}, "seed": 0, **config}
    for name in sections:
        if not isinstance(config[name], Mapping) or not all(isinstance(field, str) for field in config[name]):
            raise ValueError(f"config.{name}={quoted(config[name])} must be a dict of fields; set them one by one.")
    check_version(config)
    check_value("config.seed=#", config["seed"], Seed)
    _check_mesh(config["mesh"])
    data = _section("data", DataConfig, config["data"])
    model = dict(config["model"])
    cls = _kind(model.pop("kind", "LM"))
    for name in data.sizes:
        if name in model:
            parts = ", ".join(f"config.data.{part}" for part in ("source", "tokenizer", "objective"))
            raise ValueError(f"config.model.{name}={quoted(model[name])} is the data's to say; set {parts}.")
    sizes = {name: n for name, n in data.sizes.items() if name in typing.get_type_hints(cls)}
    if isinstance(moe := model.get("moe"), Mapping):
        model["moe"] = _section("model.moe", MoEConfig, moe)
    return Experiment(
        model=_section("model", cls, {**model, **sizes}, tuple(sizes)),
        data=data,
        optim=_section("optim", OptimConfig, config["optim"]),
        run=_section("run", RunConfig, config["run"]),
        mesh=tuple(config["mesh"].items()),
        seed=config["seed"],
    )


def plain(value: Any) -> Any:
    """A typed config as the plain values it can be built from."""
    if isinstance(value, tuple(COMPONENTS.values())):
        return repr(value)
    if dataclasses.is_dataclass(value):
        fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, Experiment):
            fields["model"] = {k: v for k, v in fields["model"].items() if k not in value.data.sizes}
            fields["mesh"] = dict(fields["mesh"])
        if isinstance(value, Model) and not isinstance(value, LMConfig):
            return {"kind": kind_of(value), **fields}
        return fields
    return tuple(map(plain, value)) if isinstance(value, tuple) else value


def dense_baseline(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The config of the dense model with equal active FLOPs: see `TransformerConfig.dense_baseline`."""
    exp = build(config)
    return ml_collections.ConfigDict(plain(dataclasses.replace(exp, model=exp.model.dense_baseline())))


SECTIONS: dict[str, type] = {
    "": Experiment,
    "model": LMConfig,
    "model.moe": MoEConfig,
    "data": DataConfig,
    "optim": OptimConfig,
    "run": RunConfig,
}
# Fields that are in one section alone, and their paths.
_PATHS = {
    f"{path}.{f.name}".lstrip("."): f.name
    for path, cls in (*SECTIONS.items(), *(("model", cls) for cls in MODELS.values()))
    for f in dataclasses.fields(cls)
}
ELSEWHERE = {name: path for path, name in _PATHS.items() if list(_PATHS.values()).count(name) == 1}


@dataclasses.dataclass(frozen=True)
class ComponentCall:
    """A component as data: its class, and the arguments that are given."""

    cls: type
    arguments: dict[str, Any]

    def __repr__(self) -> str:
        return f"{self.cls.__name__}({', '.join(f'{name}={value!r}' for name, value in self.arguments.items())})"


def parse(text: str, known: Iterable[type] = tuple(COMPONENTS.values())) -> Any:
    """A component from its constructor call: a registered name with literal arguments."""
    return _made(read_call(text, known))


def read_call(text: str, known: Iterable[type] = tuple(COMPONENTS.values())) -> ComponentCall:
    """A constructor call as data: its names are checked, its values are not."""
    return _call(text, syntax(text), known)


def _call(text: str, node: ast.expr | None, known: Iterable[type]) -> ComponentCall:
    """The constructor call that is written at a node of the syntax of `text`."""
    names = {c.__name__: c for c in known if c.__name__ in COMPONENTS}
    if isinstance(node, ast.Name) and node.id in names:
        raise ValueError(f"{quoted(text)} is not a call; write {node.id + '()'!r}, with its arguments.")
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        raise ValueError(f"{quoted(text)} is not a component; write its constructor call, like 'TopK(K=2)'.")
    if (name := node.func.id) not in names:
        what = "cannot stand here" if name in COMPONENTS else "is unknown"
        raise ValueError(f"Component {quoted(name)} {what}{suggestion(name, names)}")
    cls = names[name]
    fields = [f.name for f in dataclasses.fields(cls)]
    if len(node.args) > len(fields):
        raise ValueError(f"{quoted(text)} has {len(node.args)} arguments; {name} takes {', '.join(fields) or 'none'}.")
    pairs = [*zip(fields, node.args, strict=False), *((k.arg or "**", k.value) for k in node.keywords)]
    for argument, _ in pairs:
        check_argument(cls, argument)
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"{quoted(text)} gives an argument twice; give it once.")
    return ComponentCall(cls, {argument: _argument(text, value) for argument, value in pairs})


def syntax(text: str) -> ast.expr | None:
    """The expression that a text writes, as Python's syntax; None where it writes none, or is too long or too deep."""
    try:
        node = ast.parse(text.strip(), mode="eval").body if len(text) <= LONGEST else None
    except NOT_LITERAL:
        return None
    level: list[ast.AST] = [] if node is None else [node]
    for _ in range(DEEPEST):
        if any(_endless(part) for part in level):
            return None
        level = [child for parent in level for child in ast.iter_child_nodes(parent)]
    return None if level else node


def _endless(node: ast.AST) -> bool:
    """Tells whether a node is a whole number that Python might not print: it writes no more than 4300 digits."""
    value = node.value if isinstance(node, ast.Constant) else None
    return isinstance(value, int) and value.bit_length() > LONGEST


def literal(text: str) -> Any:
    """The Python value that a text writes, or the text."""
    try:
        return text if (node := syntax(text)) is None else ast.literal_eval(node)
    except NOT_LITERAL:
        return text


def _argument(text: str, node: ast.expr) -> Any:
    """A literal, or a component's constructor call; `text` is where it stands."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in COMPONENTS:
        return _call(text, node, COMPONENTS.values())
    try:
        return ast.literal_eval(node)
    except NOT_LITERAL:
        raise ValueError(f"The arguments of {quoted(text)} must be plain values: numbers, strings, None.") from None


def _made(call: ComponentCall) -> Any:
    """The component that a call constructs, those inside of it first."""
    values = {
        name: _made(value) if isinstance(value, ComponentCall) else value for name, value in call.arguments.items()
    }
    return _construct(call.cls.__name__, call.cls, values)


def check_argument(cls: type, name: str, what: str = "", value: str = "VALUE", rest: str = "") -> None:
    """ValueError where a component has no such field: what was probably meant, and the fields it has.

    what: the path of the component, where it is known. value, rest: as of `unknown`.
    """
    fields = _field_names(cls)
    if name in fields:
        return
    kind = next(kind for kind in REGISTERED if cls in kind)
    wanted = next((n for n in (name, meant_field(name)) if any(n in _field_names(c) for c in kind)), None)
    if wanted is None or wanted in fields:
        ending = advice(what, name, fields, value, rest)
    else:
        others = [c.__name__ for c in kind if wanted in _field_names(c)]
        ending = f"; {wanted!r} is a field of {', '.join(others[:4])}{' and others' if len(others) > 4 else ''}."
    takes = "" if "there are" in ending else f" {cls.__name__} takes {', '.join(fields) or 'no arguments'}."
    given = f"{what}={cls.__name__}({'...' if fields else ''})"
    here = f"{given} has no field" if what else f"{cls.__name__} has no argument"
    raise ValueError(f"{here} {quoted(name)}{ending}{takes}")


def _field_names(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def kind_of(model: Model) -> str:
    """The name of a model's kind."""
    return next(name for name, cls in MODELS.items() if cls is type(model))


def _kind(name: Any) -> type:
    """The model of this name."""
    if not isinstance(name, str) or name not in MODELS:
        raise ValueError(f"config.model.kind={quoted(name)} is unknown{suggestion(str(name), MODELS)}")
    return MODELS[name]


def _section(path: str, cls: type, given: Mapping[str, Any], said: tuple[str, ...] = ()) -> Any:
    """A dataclass from plain values; strings that stand for components are parsed. said: what is not the user's."""
    fields = [f.name for f in dataclasses.fields(cls)]
    _check_names(f"config.{path}", given, [name for name in fields if name != "V"] + list(said))
    values = {}
    for name, value in given.items():
        where = f"config.{path}.{name}"
        if name in LISTS:
            several = value if isinstance(value, list | tuple) else (value,)  # one may stand alone
            value = tuple(_component(where, part, KINDS[name]) for part in several)
        elif name in KINDS:
            value = _component(where, value, KINDS[name])
        values[name] = tuple(value) if isinstance(value, list) else value
    return _construct(f"config.{path}", cls, values)


def _component(path: str, value: Any, known: tuple[type, ...]) -> Any:
    """Parses the value of a field that holds a component, and checks its kind."""
    if isinstance(value, str) and value != "None":
        try:
            return parse(value, known)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    value = None if value == "None" else value
    if not isinstance(value, known):
        names = ", ".join(f"'{c.__name__}(...)'" for c in known if c.__name__ in COMPONENTS)
        raise ValueError(f"{path}={quoted(value)} must be one of {names}.")
    return value


def _construct(what: str, cls: type, values: Mapping[str, Any]) -> Any:
    hints = typing.get_type_hints(cls, include_extras=True)
    for name, value in values.items():
        check_value(f"{what}.{name}=#" if what.startswith("config") else f"{what}({name}=#)", value, hints[name])
    required = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
    if missing := sorted(required - set(values)):
        raise ValueError(f"{what} needs {', '.join(missing)}.")
    try:
        return cls(**{name: _number(value, hints[name]) for name, value in values.items()})
    except ValueError as error:
        raise ValueError(f"{what}: {error}" if what.startswith("config") else str(error)) from None


def _number(value: Any, hint: Any) -> Any:
    """Python's number of this type, so that equal experiments print the same: 2 as 2.0, where a float is meant."""
    value = value.item() if isinstance(value, np.generic) else value
    wanted = [without_range(h) for h in (typing.get_args(hint) if typing.get_origin(hint) in UNIONS else (hint,))]
    whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if whole and float in wanted and int not in wanted else value


def _check_names(what: str, given: Iterable[str], known: Collection[str]) -> None:
    for name in given:
        if name not in known:
            raise unknown(what, str(name), known)


def unknown(what: str, name: str, known: Collection[str], value: str = "VALUE", rest: str = "") -> ValueError:
    """The error about a field that a section, as `config.model`, does not have.

    value: what it was to be set to. rest: how the path went on after it, ".router.K", for instance.
    """
    if (new := RENAMED.get(f"{what}.{name}".removeprefix("config."))) is not None:
        flag = typed(f"{what}.{new}{rest}".removeprefix("config."), value)
        return ValueError(f"{what}.{name} is {what}.{new} since moe_jax 0.3; {flag}.")
    return ValueError(f"{what} has no field {quoted(name)}{advice(what, name, known, value, rest)}")


def advice(what: str, name: str, known: Collection[str], value: str, rest: str) -> str:
    """The end of a sentence about an unknown field: the one that its name means here, or in another section."""
    if any(k.lower() == name.lower() for k in known):
        return suggestion(name, known)
    if (here := meant_field(name)) in known:
        path = f"{what}.{here}{rest}".removeprefix("config.")
        return f"; {typed(path, value)}." if what else f"; did you mean {here!r}?"
    target = meant(name) or ELSEWHERE.get(name, "")
    if not target or f"config.{target}" == f"{what}.{name}":
        return suggestion(name, known)
    return f"; {typed(target if '=' in target else target + rest, value)}."


def typed(target: str, value: str) -> str:
    """The flag to type for a path, or for path=text, where {} in the text stands for the value."""
    path, _, form = target.partition("=")
    text = (form or "{}").replace("{}", value)
    return f'say --config.{path}="{text}"' if set(text) & set(" ()'") else f"say --config.{path}={text}"


def suggestion(name: str, known: Collection[str]) -> str:
    """Ends a sentence about an unknown name with what may have been meant."""
    close = [k for k in known if k.lower() == name.lower()] or difflib.get_close_matches(name, known, 1, 0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(known) or 'none'}."


def _check_mesh(mesh: Mapping[str, Any]) -> None:
    _check_names("config.mesh", mesh, AXES)
    for axis, n in mesh.items():
        if not fits(n, Devices) or n == 0:
            raise ValueError(f"config.mesh.{axis}={quoted(n)} must be a number of devices, or -1 for the rest.")
    if list(mesh.values()).count(-1) > 1:
        raise ValueError("config.mesh: only one axis can be -1, the rest of the devices.")


# Fields of versions before 0.3, by path, and their names since.
RENAMED = {
    "model.layout": "moe_layers",
    "model.extra": "dense_after_moe",
    "data.accumulate": "microbatches",
    "run.eval_windows": "eval_sequences",
}
OLD_ATTENTION = ("H", "A", "J", "qk_norm", "window", "position", "rope")  # fields of models before 0.2


def check_version(config: Mapping[str, Any]) -> None:
    """Refuses a config of an earlier version, and says how what is in it is written now."""
    for path, name in RENAMED.items():
        section, old = path.split(".")
        if isinstance(fields := config.get(section), Mapping) and old in fields:
            raise ValueError(f"config.{path} is config.{section}.{name} since moe_jax 0.3; set that instead. {OLD_RUN}")
    model = config.get("model")
    if isinstance(model, Mapping):
        if model.get("remat") == "exchanged":
            raise ValueError(f"config.model.remat='exchanged' is 'save_collectives' since moe_jax 0.3. {OLD_RUN}")
        check_attention(model)


OLD_RUN = "A run that an earlier version has written can be continued by that version only."


def check_attention(model: Mapping[str, Any]) -> None:
    """Refuses a config of before 0.2, whose attention was fields of the model, and says how it is written now."""
    if not (old := [name for name in OLD_ATTENTION if name in model]):
        return
    positions = {
        "rotary": f"Rotary(base={model.get('rope', 10000.0)})",
        "relative": "Relative()",
        "shared": "Relative(shared=True)",
        "sinusoidal": "Sinusoidal()",
    }
    images = model.get("kind") == "ViT"
    usual = {"EncoderDecoder": "shared", "ViT": "learned"}.get(model.get("kind", "LM"), "rotary")
    position = positions.get(model.get("position", usual), "NoPE()")
    fields = {name: model[name] for name in OLD_ATTENTION if model.get(name) not in (None, "none")}
    words = [f"{name}={value!r}" for name, value in fields.items() if name not in ("position", "rope")]
    words += [f"position={position}", *["bias=True"] * images]
    raise ValueError(
        f"config.model.{old[0]} is a field of the attention since moe_jax 0.2; set config.model.attention="
        f'"MHA({", ".join(words)})" instead. {OLD_RUN}'
    )


def _check_objective(exp: Experiment) -> None:
    """Refuses an objective whose batches the model does not take."""
    model, objective = exp.model, exp.data.objective
    if model.batch_kind != objective.batch_kind:
        fits = [c.__name__ + "()" for c in OBJECTIVES if c.batch_kind == model.batch_kind]
        raise ValueError(
            f"config.model.kind={kind_of(model)!r} takes {model.batch_kind}, but config.data.objective={objective} "
            f"makes {objective.batch_kind}; use {' or '.join(fits)} as objective, or another kind of model."
        )


def _check_batch(exp: Experiment) -> None:
    """Refuses a batch that does not divide over the mesh, microbatches and routing groups."""
    mesh, data, model = dict(exp.mesh), exp.data, exp.model
    sizes = {axis: max(n, 1) for axis, n in mesh.items()}  # the rest may turn out to be one device
    shards = math.prod(sizes[axis] for axis in TOKEN_AXES)
    if data.B % (shards * data.microbatches):
        raise ValueError(
            f"config.data.B={data.B} sequences do not spread evenly over {shards} devices in "
            f"{data.microbatches} microbatch(es); make B a multiple of {shards * data.microbatches}, or change mesh."
        )
    cuts = {"D": (model.D, list(RULES["D"]))}
    for i, part in enumerate(model.attention):
        where = f"attention[{i}]" if len(model.attention) > 1 else "attention"
        cuts |= {f"{where}.{letter}": (n, list(RULES[letter])) for letter, n in part.sizes.items() if letter in RULES}
    for stack in model.stacks():
        dense = (sub for layer in layer_counts(model, stack) for sub in layer if sub.kind == "dense")
        cuts |= {f"{'moe' if sub.part is model.moe else sub.name}.F": (sub.part.F, ["tensor"]) for sub in dense}
    check_divides({f"config.model.{name}": cut for name, cut in cuts.items()}, sizes, "config.")
    for part in model.attention:
        part.check_tensor(sizes.get("tensor", 1))
    if model.routed is None:
        return
    check_mesh(model.routed, sizes, model.D, "config.")
    for stack in model.stacks(data.shapes(1)):
        B = data.B // data.microbatches // shards
        try:
            stack.moe.group(B, stack.L, training=True)
        except ValueError as error:
            raise ValueError(
                f"config.model.moe.S={model.moe.S} does not divide the {B * stack.L} tokens that a device sees at once "
                f"(B={data.B} x L={stack.L} over {shards} devices in {data.microbatches} microbatch(es)); "
                "make it one that does, or None for one sequence."
            ) from error
