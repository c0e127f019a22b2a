"""Every number of a config has a range, and no number outside of it is taken, from Python or from a text."""

import dataclasses
import math
import typing
from typing import Annotated, Any

import numpy as np
import pytest

from moe_jax.attention import MHA, NoPE
from moe_jax.config import COMPONENTS, SECTIONS, build, parse
from moe_jax.core.quoted import LONGEST, brief, quoted, shortened
from moe_jax.core.ranges import PositiveInt, Range, check_ranges, fits, in_words, ranged_fields, without_range
from moe_jax.data import Corpus, Translation
from moe_jax.losses import Adaptive, LoadBalance
from moe_jax.models import MODELS
from moe_jax.optim import AdamW

CLASSES = {c.__name__: c for c in (*COMPONENTS.values(), *SECTIONS.values(), *MODELS.values())}
MODEL = {"V": 8, "D": 8, "N": 2, "attention": MHA(2, 4), "moe_layers": "none"}
REQUIRED: dict[str, Any] = {  # values of fields without a default
    **{"H": 2, "A": 4, "U": 2, "O": 2, "W": 2, "F": 8, "V": 300, "E": 4, "factor": 4.0, "original": 4096},
    **{"loss": LoadBalance(), "peak": 0.001, "path": "texts", "name": "c4", "source": "de", "target": "en"},
}
RANGED = [(cls, name) for cls in CLASSES.values() for name in ranged_fields(cls)]


def sample(cls: type) -> Any:
    """A valid one of a class."""
    if cls.__name__ == "Experiment":
        return build({"model": {k: v for k, v in MODEL.items() if k != "V"}})
    if cls in MODELS.values():
        return cls(**{**MODEL, "attention": MHA(2, 4, position=NoPE())})
    required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
    return cls(**{name: REQUIRED[name] for name in (*required, *({"original"} & vars(cls).keys()))})


def unranged(hint: Any) -> bool:
    """Tells whether a type has a number without a range."""
    if typing.get_origin(hint) is Annotated:
        return not any(isinstance(extra, Range) for extra in typing.get_args(hint))
    return hint in (int, float) or any(map(unranged, typing.get_args(hint)))


def range_of(hint: Any) -> tuple[type, Range]:
    """The kind of number, int or float, and the range, in a type."""
    if typing.get_origin(hint) is Annotated:
        return typing.get_args(hint)[:2]
    return next(found for h in typing.get_args(hint) if (found := range_of(h))) if typing.get_args(hint) else ()


def neighbours(kind: type, end: float, closed: bool, outwards: int) -> tuple[float, float]:
    """The last number that a range has at an end, and the first that it has not, as a device has them."""
    if kind is int:
        return (end, end + outwards) if closed else (end - outwards, end)
    far = np.float32(outwards * math.inf)
    if end in (0, math.inf):  # a number that is too small is 0, and a number is never infinite
        inner = np.finfo(np.float32).tiny if end == 0 else np.finfo(np.float32).max
        outer = -1e-30 if closed and end == 0 else float(end)
        return (float(end) if closed else float(inner)), outer
    beside = float(np.nextafter(np.float32(end), far if closed else -far))
    return (float(end), beside) if closed else (beside, float(end))


def inside_and_outside(hint: Any) -> tuple[list[float], list[float]]:
    kind, allowed = range_of(hint)
    low = neighbours(kind, allowed.low, allowed.ends[0] == "[", -1)
    high = neighbours(kind, allowed.high, allowed.ends[1] == "]", 1)
    return [low[0], high[0]], [low[1], high[1], *([math.nan, -math.inf] if kind is float else [10**309])]


def as_field(hint: Any, value: Any, now: Any) -> Any:
    """A value as the field holds it: in a tuple where it holds several."""
    return (value, *now[1:]) if isinstance(now, tuple) else value


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
def test_every_number_has_a_range(cls):
    hints = typing.get_type_hints(cls, include_extras=True)
    assert [f.name for f in dataclasses.fields(cls) if unranged(hints[f.name])] == []


@pytest.mark.parametrize(("cls", "name"), RANGED, ids=lambda value: getattr(value, "__name__", value))
def test_a_number_out_of_range_is_refused(cls, name):
    """A component refuses the value when it is made, in one sentence with class, field, value and range."""
    hint, one = ranged_fields(cls)[name], sample(cls)
    now, (_, allowed) = getattr(one, name), range_of(hint)
    assert fits(now, hint), "the sample's own value"
    inside, outside = inside_and_outside(hint)
    assert all(value in allowed for value in inside)
    if name == "mesh":
        return  # of pairs: tests of config.mesh
    for value in inside:
        assert fits(as_field(hint, value, now), hint), value
    for value in outside:
        assert not fits(as_field(hint, value, now), hint), value
        with pytest.raises(ValueError, match=rf"{name}=") as caught:
            dataclasses.replace(one, **{name: as_field(hint, value, now)})
        assert str(allowed) in str(caught.value)
        assert str(caught.value).count("\n") == 0
        assert len(str(caught.value)) < 250


@pytest.mark.parametrize("cls", COMPONENTS.values(), ids=COMPONENTS)
def test_a_number_out_of_range_is_refused_in_a_text(cls):
    call = repr(sample(cls))
    assert parse(call) == sample(cls)
    for name, hint in ranged_fields(cls).items():
        _, outside = inside_and_outside(hint)
        for value in (v for v in outside if abs(v) < math.inf):
            changed = dict(dataclasses.asdict(sample(cls)) | {name: value})
            text = ", ".join(f"{k}={v!r}" for k, v in changed.items() if not isinstance(v, dict))
            with pytest.raises(ValueError, match=rf"{cls.__name__}\({name}="):
                parse(f"{cls.__name__}({text})")


def test_ranges_are_intervals():
    half = Range(0, 1, "[)")
    assert [x for x in (-1e-9, 0, 0.5, 1 - 1e-9, 1, 2, math.nan) if x in half] == [0, 0.5, 1 - 1e-9]
    assert [x in Range(0, 1, "(]") for x in (0, 1e-9, 1, 1 + 1e-9)] == [False, True, True, False]
    assert 10**400 not in Range(1, 2**31, "[)")
    assert [str(half), str(Range(1, 2**31, "[)")), str(Range(0.02, 1000))] == ["[0, 1)", "[1, 2**31)", "[0.02, 1000]"]
    assert in_words(PositiveInt | None) == "a whole number in [1, 2**31) or None"
    assert in_words(tuple[PositiveInt, ...]) == "a tuple, each entry a whole number in [1, 2**31)"
    assert without_range(PositiveInt) is int


def test_a_number_is_what_it_is_on_a_device():
    """Adam divides by 1 - b1^t and by a root plus eps: in float32 these would be 0."""
    with pytest.raises(ValueError, match=r"^AdamW\(b1=0.999999999\) is 1 in float32, and must be a number in \[0, 1\)"):
        AdamW(b1=1 - 1e-9)
    with pytest.raises(ValueError, match=r"is 0 in float32"):
        AdamW(eps=1e-45)
    with pytest.raises(ValueError, match=r"is inf in float32"):
        AdamW(weight_decay=1e39)
    assert AdamW(b1=1 - 1e-7, eps=2e-38, weight_decay=3e38)


def test_types_and_ranges_are_one_question():
    @dataclasses.dataclass
    class Own:
        n: PositiveInt
        several: tuple[PositiveInt, ...] = ()

    for value in (np.int64(3), 1, 2**31 - 1):
        check_ranges(Own(value))
    for value in (True, 1.0, "1", None, 0, 2**31, 10**5000):
        with pytest.raises(ValueError, match=r"^Own\(n=.*\) must be a whole number in \[1, 2\*\*31\)\.$"):
            check_ranges(Own(value))
    for value in ((0,), (1, 2.0), 1):
        with pytest.raises(ValueError, match=r"a tuple, each entry a whole number"):
            check_ranges(Own(1, value))


def test_a_component_in_a_component_is_of_its_kind():
    """Adaptive of Adaptive would keep two weights in one state; a tokenizer is none of text."""
    for loss in (Adaptive(LoadBalance()), LoadBalance, AdamW(), 0.1):
        with pytest.raises(ValueError, match="wraps another loss"):
            Adaptive(loss)
    for source in (Corpus(), LoadBalance(), "Bytes()"):
        with pytest.raises(ValueError, match="is no tokenizer"):
            Translation(source=source)


# ---- what messages repeat


def nested(depth: int) -> list:
    """Lists in lists."""
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [
        "x" * 5000,
        10**4000,
        10**5000,
        -(10**5000),
        nested(100_000),
        ["y" * 5000] * 500,
        {1: nested(50)},
        b"z" * 999,
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_value_is_quoted_in_a_hundred_characters(value):
    assert 0 < len(quoted(value)) <= LONGEST


def test_short_values_are_quoted_as_they_are():
    for value in (1, -0.5, "it's", (1, "a"), [None], {"a": 1}, LoadBalance()):
        assert quoted(value) == repr(value)
    text = shortened("begin" + 1000 * "-" + "end")
    assert (text[:5], text[-3:], len(text)) == ("begin", "end", LONGEST)
    assert "...(1008 characters)..." in text


def test_a_line_repeats_at_most_a_hundred_characters_of_anything():
    """Words, texts in quotes, and texts that are known to have been given; other sentences are left alone."""
    sentence = "The run's folder isn't there; give another's, or don't: " + "any of these words, " * 20
    assert brief(sentence) == " ".join(sentence.split())
    words = "some words " * 50
    for given in ("w" * 999, repr(words), f"--flag={'v' * 500}", f'"{words}"', repr("it's\\' " * 50)):
        line = brief(f"error: {given} is wrong, the user's;\nsay another's.")
        assert len(line) < 170, line
        assert line.endswith("is wrong, the user's; say another's.")
    assert len(brief(f"There is no file {words}.", [words])) < 140
