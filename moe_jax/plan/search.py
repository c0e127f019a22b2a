"""Search for the fastest mesh, exchange, rematerialisation, number of microbatches and ZeRO stage that fit.

A step without rematerialisation and in one microbatch is the fastest of a mesh. Meshes are tried in the order
of that time, until no other can be faster than what has been found.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from moe_jax.config import Experiment
from moe_jax.costs.headline import mesh_words, short
from moe_jax.costs.memory import Memory, memory
from moe_jax.exchanges import EXCHANGES, TwoLevel
from moe_jax.models.transformer import REMAT
from moe_jax.plan.roofline import Roofline, roofline, state
from moe_jax.plan.topology import Topology, factorizations


class Option(NamedTuple):
    """One way to run it."""

    exp: Experiment
    memory: Memory
    roofline: Roofline

    @property
    def seconds(self) -> float:
        """Seconds by which options are ranked: a step without overlap."""
        return self.roofline.worst

    @property
    def words(self) -> dict[str, str]:
        """Choices of the option, in words."""
        exp = self.exp
        spread = exp.model.routed is not None and dict(exp.mesh)["expert"] > 1
        return {
            "mesh": mesh_words(exp.mesh),
            "exchange": short(exp.exchange) if spread else "-",
            "remat": exp.model.remat,
            "microbatches": str(exp.data.microbatches),
            "zero1": "yes" if exp.optim.zero1 else "no",
        }

    @property
    def flags(self) -> str:
        """Command-line flags that select this option."""
        exp = self.exp
        said = [f"--config.mesh.{axis}={n}" for axis, n in exp.mesh]
        said += [f"--config.model.remat={exp.model.remat}", f"--config.data.microbatches={exp.data.microbatches}"]
        said += [f"--config.optim.zero1={exp.optim.zero1}"]
        if exp.model.routed is not None:
            said.append(f'--config.model.moe.exchange="{short(exp.exchange)}"')
        return " ".join(said)


class Found(NamedTuple):
    """Result of a search: the options that fit, and counts of those that do not."""

    options: list[Option]  # that fit, the fastest first; one for each mesh and exchange
    smallest: Option | None  # what needs least memory, where nothing fits
    meshes: int  # that can be built, with their exchanges and ZeRO stages
    tried: int  # of all options, those whose time and memory were computed
    large: int  # meshes whose state alone is more than a device has
    refused: dict[str, int]  # why others cannot be built, with how many


def search(exp: Experiment, on: Topology, keep: int = 10, say: Callable[[str], None] = lambda text: None) -> Found:
    """The `keep` fastest meshes that fit, each at its best; `say` hears how far it is. The batch stays as it is."""
    refused: Counter[str] = Counter()
    bases = list(buildable(exp, on, refused))
    small = [base for base in bases if at_least(base) <= on.chip.usable]
    say(f"{len(bases)} meshes can be built, {len(small)} of them hold the state")
    bounds: list[tuple[float, int, Experiment]] = []
    for i, base in enumerate(small):
        bounds.append((roofline(base, on).worst, i, base))
        if (i + 1) % 50 == 0:
            say(f"{i + 1} of {len(small)} meshes have a time")
    fitting: dict[tuple, Option] = {}  # by mesh and exchange, its fastest
    tried: list[tuple[int, Experiment]] = []
    for n, (bound, _, base) in enumerate(sorted(bounds)):
        fastest = sorted(option.seconds for option in fitting.values())
        if len(fastest) >= keep and bound >= fastest[keep - 1]:
            break
        if new := fastest_variant(base, on, tried):
            old = fitting.setdefault((new.exp.mesh, new.exp.exchange), new)
            fitting[new.exp.mesh, new.exp.exchange] = min(old, new, key=lambda option: option.seconds)
        if (n + 1) % 10 == 0:
            say(f"{n + 1} of {len(bounds)} meshes tried, {len(fitting)} of them fit")
    options = sorted(fitting.values(), key=lambda option: option.seconds)[:keep]
    least = None if options or not tried else option(min(tried, key=lambda pair: pair[0])[1], on)
    return Found(options, least, len(bases), len(tried), len(bases) - len(small), dict(refused.most_common()))


def option(exp: Experiment, on: Topology) -> Option:
    return Option(exp, memory(exp, dict(exp.mesh)), roofline(exp, on))


def fastest_variant(base: Experiment, on: Topology, tried: list[tuple[int, Experiment]]) -> Option | None:
    """A mesh at its best: for every rematerialisation the fewest microbatches that fit, and the fastest of these.

    What was tried, and the bytes it needs, is added to `tried`.
    """
    best: Option | None = None

    def fits(exp: Experiment) -> bool:
        tried.append((memory(exp, dict(exp.mesh)).total, exp))
        return tried[-1][0] <= on.chip.usable

    for remat in REMAT:
        microbatches = variants(base, remat)
        if best and roofline(microbatches[0], on).worst >= best.seconds:
            continue
        if len(microbatches) > 1 and not fits(microbatches[0]):  # if the smallest microbatches are too large, all are
            microbatches = microbatches[1:] if fits(microbatches[-1]) else []
        if exp := next(filter(fits, microbatches), None):
            new = option(exp, on)
            best = new if best is None or new.seconds < best.seconds else best
    return best


def buildable(exp: Experiment, on: Topology, refused: Counter[str]) -> Iterator[Experiment]:
    """Every mesh with every exchange and ZeRO stage, in one microbatch, computing nothing again; counts refusals."""
    for mesh in factorizations(on.devices, on.slices):
        for exchange in exchanges(exp, mesh):
            for zero1 in (False, True) if mesh["data"] * mesh["expert"] > 1 else (False,):
                try:
                    yield variant(exp, mesh=tuple(mesh.items()), exchange=exchange, zero1=zero1)
                except ValueError as error:
                    refused[reason(error)] += 1


def reason(error: ValueError) -> str:
    """An error's sentence up to what should be done, without its numbers."""
    return re.sub(r"\d+", "n", str(error)).partition(";")[0]


def exchanges(exp: Experiment, mesh: dict[str, int]) -> list[Any]:
    """Exchanges that carry the rows of the dispatcher; the config's own as it is written there."""
    moe = exp.model.routed
    if moe is None:
        return [None]
    if mesh["expert"] == 1 and not (mesh["slice"] > 1 and isinstance(moe.exchange, TwoLevel)):
        return [moe.exchange]
    known = [
        cls for cls in EXCHANGES if moe.dispatch.layout in cls.layouts and (cls is not TwoLevel or mesh["slice"] > 1)
    ]
    return [moe.exchange if cls is type(moe.exchange) else cls() for cls in known]


def variant(exp: Experiment, remat: str = "none", microbatches: int = 1, **changed: Any) -> Experiment:
    """The experiment with these choices; ValueError where they do not go together."""
    model, optim = dataclasses.replace(exp.model, remat=remat), exp.optim
    if changed.get("exchange") is not None:
        model = dataclasses.replace(model, moe=dataclasses.replace(model.moe, exchange=changed["exchange"]))
    if "zero1" in changed:
        optim = dataclasses.replace(optim, zero1=changed["zero1"])
    data = dataclasses.replace(exp.data, microbatches=microbatches)
    return dataclasses.replace(exp, model=model, data=data, optim=optim, mesh=changed.get("mesh", exp.mesh))


def variants(base: Experiment, remat: str) -> list[Experiment]:
    """A mesh with this rematerialisation, in 1, 2, 4, ... microbatches."""
    found = []
    for microbatches in (1 << i for i in range(base.data.B.bit_length())):
        try:
            found.append(variant(base, remat, microbatches))
        except ValueError:  # fewer rows than devices
            break
    return found


def at_least(exp: Experiment) -> int:
    """Bytes that a device holds whatever is computed: parameters, and what the optimizer remembers."""
    return sum(leaf.bytes for leaves in state(exp, dict(exp.mesh)) for leaf in leaves)
