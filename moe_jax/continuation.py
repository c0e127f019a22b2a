"""The rule of what may change between a run and its continuation: of its config some fields, of its data nothing."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from moe_jax.config import Experiment, check_version

# How long, and where it is computed: the same run.
ELSEWHERE = ("run", "mesh", "model.remat", "model.moe.exchange", "optim.zero1")
MAY_CHANGE = (*ELSEWHERE, "optim.schedule", "optim.clip")  # and how fast: the same run, led by hand
SHOWN = 3  # changes in a message
LONGEST = 60  # characters of a value in a message


class Change(NamedTuple):
    """A value of a config, by its path, that a continuation has changed."""

    path: str
    old: Any
    new: Any

    def within(self, paths: Sequence[str]) -> bool:
        """Tells whether it is one of these fields, or a part of one."""
        return any(self.path == path or self.path.startswith(f"{path}.") for path in paths)

    def __str__(self) -> str:
        return f"{self.path or 'config'} was {_short(self.old)}, is {_short(self.new)}"


def changes(old: Any, new: Any, path: str = "") -> Iterator[Change]:
    """Yields the values that differ between two configs, given as plain values (`json.loads` of `to_json`)."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in {**old, **new}:
            yield from changes(old.get(name), new.get(name), f"{path}.{name}".strip("."))
    elif old != new:
        yield Change(path, old, new)


def check_config(
    saved: Mapping[str, Any], exp: Experiment, where: Any, may_change: Sequence[str] = MAY_CHANGE
) -> list[Change]:
    """The changes of a config since a run saved it; ValueError where they make it another run.

    saved: the plain values of the run's config. where: the run, for the message. may_change: paths of fields.
    """
    check_version(saved)
    found = list(changes(saved, json.loads(exp.to_json())))
    if refused := [change for change in found if not change.within(may_change)]:
        raise ValueError(
            f"{where} holds another run ({_listed(refused)}); choose another --workdir, "
            "or delete that run with --overwrite."
        )
    return found


def check_data(saved: Mapping[str, str], found: Mapping[str, str], where: Any) -> None:
    """ValueError where data is not what a run was trained on, by `data_identity` of then and of now.

    What was not recorded, in a run of an earlier version, is not compared.
    """
    differ = [Change(name, digest[:16], found.get(name, "nothing")[:16]) for name, digest in saved.items()]
    if differ := [change for change in differ if saved[change.path] != found.get(change.path)]:
        raise ValueError(
            f"The data is not that of the run in {where} ({_listed(differ)}): files, a data set or the environment "
            "have changed since; restore them, or choose another --workdir for another run."
        )


def _listed(several: Sequence[Change]) -> str:
    more = f"; and {len(several) - SHOWN} more" if len(several) > SHOWN else ""
    return "; ".join(map(str, several[:SHOWN])) + more


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
