"""The collectives that a compiled program executes, read from its text: XLA's for CPU, GPU and TPU.

Backends write collectives in different ways: replica groups have four notations, asynchronous collectives three, and
only some backends note the trip count of a loop. Sends, receives, and communication inside custom calls are not read.
"""

import ast
import functools
import math
import re
from typing import NamedTuple

import jax
import numpy as np

from moe_jax.core.traffic import Collective

OPCODES = {
    *("all-to-all", "all-reduce", "all-gather", "reduce-scatter"),
    *("collective-permute", "collective-broadcast", "ragged-all-to-all"),
}

# Wrappers that JAX puts around the names of modules.
WRAPPERS = re.compile(
    r"|p?jit\(.*|while|body|cond|branch_\d+_fun|closed_call|eval_jaxpr|checkpoint|rematted_computation|remat\d?"
    r"|shard_map|custom_[jv][jv]p_call|core_call|.*->.*"
)
COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+)(?: .*)? \{$")
INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)")
GROUPS = re.compile(
    r"(?:replica_groups|source_target_pairs)="
    r"(\{\{.*?\}\}|\[.*?\]<=\[.*?\](?:T\([\d,]*\))?|mesh\[.*?\](?:, device_ids=\(.*?\))? \{.*?\}|[^\s,]+)"
)
IOTA = re.compile(r"\[([\d,]*)\]<=\[([\d,]*)\](?:T\(([\d,]*)\))?")
NAMED = re.compile(r"mesh\[(.*?)\](?:, device_ids=\((?:\[([\d,]*)\](?:T\(([\d,]*)\))?|([\d,]*))\))? \{(.*?)\}")
CALLS = re.compile(r"\b(?:calls|\w+_computations?)=(\{[^}]*\}|%?[\w.-]+)")
TRIPS = re.compile(r"known_trip_count\W+n\W+(\d+)")
CHAIN = re.compile(r"channel_id=(\d+).*\bchain_id=\W*(\w+)")
SHAPE = re.compile(r"([a-z]+)(\d*)\w*\[([^\]]*)\]")


class Instruction(NamedTuple):
    """One line of a program."""

    name: str
    op: str
    result: str  # type of the result
    rest: str  # operands and attributes
    root: bool  # whether its result is that of the computation


Computation = dict[str, Instruction]  # by name, in the order of the text


def collectives(text: str, mesh: jax.sharding.Mesh) -> list[Collective]:
    """Collectives that one device executes of `compiled.as_text()`, in order, one item for each in the text.

    A loop counts as often as it runs, a conditional by the branch that moves most. mesh: the mesh that the program was
    compiled for, with its devices in order. ValueError for another mesh, for a text that is not HLO, and for a loop
    that communicates an unknown number of times.
    """
    header = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", text[: text.find("\n")])
    if header and (devices := math.prod(map(int, header))) != mesh.size:
        raise ValueError(f"the program is for {devices} devices, the mesh has {mesh.size}; give the program's own.")
    entry, computations = parse_module(text)

    @functools.cache
    def run(name: str) -> list[Collective]:
        return [c for i in computations[name].values() for c in execute(i, computations[name])]

    def execute(i: Instruction, around: Computation) -> list[Collective]:
        op = i.op.removesuffix("-start")
        if op in OPCODES:
            return [to_collective(i, mesh)]
        if op.endswith(("-done", "-update")):  # counted at the start
            return []
        if op == "while":
            body, condition = attribute(i, "body"), attribute(i, "condition")
            if not run(body) and not run(condition):
                return []
            times = trips(i, around, computations[body], computations[condition])
            return [repeated(c, times) for c in run(body)] + [repeated(c, times + 1) for c in run(condition)]
        if op == "conditional":
            return max(map(run, called(i)), key=lambda branch: sum(c.bytes for c in branch))
        return called_collectives(i, [c for name in called(i) for c in run(name)])

    return run(entry)


def repeated(c: Collective, times: int) -> Collective:
    """Repeats a collective `times` times."""
    return c._replace(count=times * c.count, bytes=times * c.bytes)


def called_collectives(i: Instruction, found: list[Collective]) -> list[Collective]:
    """Collectives that a call or fusion executes; they inherit its location if they have none.

    On TPU a fusion of an all-reduce with a slice per device is a reduce-scatter.
    """
    if i.op == "fusion" and [c.op for c in found] == ["all-reduce"] and found[0].size > 1:
        kept = total(byte_sizes(i.result))
        if kept * found[0].size == found[0].bytes:
            found = [found[0]._replace(op="reduce-scatter", bytes=kept)]
    return [c if c.where else c._replace(where=location(i)) for c in found]


def trips(loop: Instruction, around: Computation, body: Computation, condition: Computation) -> int:
    """Trip count of a loop."""
    known = TRIPS.search(loop.rest)
    times = int(known[1]) if known else steps(loop, around, body, condition)
    if times is None:
        raise ValueError(
            f"the loop {loop.name} ({location(loop)}) communicates, and the program does not tell how often it runs; "
            "make it a scan, or a fori_loop between constants."
        )
    return times


def steps(loop: Instruction, around: Computation, body: Computation, condition: Computation) -> int | None:
    """Trip count of a loop that adds a constant to a counter below a limit; TPU programs have no other record."""
    test = root(condition)
    if test.op != "compare" or "direction=LT" not in test.rest:
        return None
    counter, limit = (origin(condition, name) for name in operands(test))
    if counter.op != "get-tuple-element":
        return None
    index = attribute(counter, "index")
    first = element(around, operands(loop)[0], int(index))
    after = element(body, root(body).name, int(index))
    added = [origin(body, name) for name in operands(after)]
    bounds = [n for i in (first, limit) if (n := constant_value(i)) is not None]
    by = [n for i in added if (n := constant_value(i)) is not None]
    counts = after.op == "add" and index in [attribute(i, "index") for i in added]
    if not counts or len(bounds) != 2 or len(by) != 1 or by[0] < 1:
        return None
    return max(0, math.ceil((bounds[1] - bounds[0]) / by[0]))


# ---------------------------------------------------------------- the text


def parse_module(text: str) -> tuple[str, dict[str, Computation]]:
    """The name of the entry, and all computations by name."""
    entry = ""
    computations: dict[str, Computation] = {}
    current: Computation = {}
    chains: set[tuple[str, ...]] = set()
    for line in re.sub(r"/\*index=\d+\*/", "", text).splitlines():
        if not line.startswith(" "):
            if (head := COMPUTATION.match(line)) and not line.startswith("HloModule"):
                current = computations[head[2]] = {}
                entry = head[2] if head[1] else entry
        elif (found := INSTRUCTION.match(line)) and not continues_collective(found[4], found[5], chains):
            root, name, result, op, rest = found.groups()
            current[name] = Instruction(name, op, result, rest, bool(root))
    if not entry:
        raise ValueError("the text has no ENTRY, so it is not a compiled program's HLO; give compiled.as_text().")
    return entry, computations


def continues_collective(op: str, rest: str, chains: set) -> bool:
    """Tells whether an instruction continues a collective that has begun: TPU splits and fuses them."""
    chain = CHAIN.search(rest) if op in OPCODES else None
    if chain is None:
        return False
    known = chain.groups() in chains  # channel and chain
    chains.add(chain.groups())
    return known


def location(i: Instruction) -> str:
    """The modules of an instruction, and whether it is part of the backward pass or of recomputation.

    "LM/stack_0/moe_1 backward"; outside of modules the name of the operation; up to two, joined by " + ", where XLA has
    combined several.
    """
    named = re.search(r'\bop_name="([^"]*)"', i.rest)
    name = named[1] if named else ""
    combined = re.fullmatch(r"(.*/)?\((.*)\)", name)
    paths = [(combined[1] or "") + part for part in combined[2].split(":")] if combined else [name]
    modules = list(dict.fromkeys(map(short_path, paths)))
    return " + ".join(modules[:2] + [f"{len(modules) - 2} more"] * (len(modules) > 2))


def short_path(path: str) -> str:
    """Name of an operation without the wrappers that JAX adds."""
    *parts, op = path.split("/")
    inner = [re.sub(r"^(?:(?:jvp|transpose|vmap)\()*(.*?)\)*$", r"\1", p) for p in parts]
    modules = [p for p in inner if not WRAPPERS.fullmatch(p)]
    recomputed, backward = "rematted_computation" in path, "transpose(" in path
    return "/".join(modules or [op]) + (" recomputed" if recomputed else " backward" if backward else "")


def attribute(i: Instruction, name: str) -> str:
    """Value of an instruction's attribute, without a leading %."""
    found = re.search(rf"\b{name}=%?([\w.-]+)", i.rest)
    return found[1] if found else ""


def called(i: Instruction) -> list[str]:
    """Computations that an instruction runs once, without reducers and comparators."""
    if i.op.removesuffix("-start") == "call":
        return [attribute(i, "to_apply")]
    return [name for names in CALLS.findall(i.rest) for name in re.findall(r"[\w.-]+", names)]


def root(computation: Computation) -> Instruction:
    """Root instruction of a computation."""
    return next(i for i in computation.values() if i.root)


def operands(i: Instruction) -> list[str]:
    """Names of an instruction's operands."""
    return re.findall(r"%([\w.-]+)", i.rest.split(")")[0])


def origin(computation: Computation, name: str) -> Instruction:
    """Instruction that the named one copies."""
    i = computation[name]
    while i.op in ("copy", "copy-start", "copy-done", "bitcast"):
        i = computation[operands(i)[0]]
    return i


def element(computation: Computation, name: str, index: int) -> Instruction:
    """Element of a tuple at this index; the tuple itself, if it was built elsewhere."""
    made = origin(computation, name)
    return origin(computation, operands(made)[index]) if made.op == "tuple" else made


def constant_value(i: Instruction) -> int | None:
    """Value of a constant integer."""
    value = re.match(r"(-?\d+)\)", i.rest) if i.op == "constant" else None
    return int(value[1]) if value else None


def byte_sizes(result: str) -> int | tuple:
    """Bytes of an array, or nested bytes of a tuple's elements."""

    def size(shape: re.Match) -> str:
        kind, bits, dims = shape.groups()
        width = 8 if kind == "pred" else int(bits or 0)  # HLO tokens have none
        return str(-(-math.prod(map(int, re.findall(r"\d+", dims))) * width // 8))

    return ast.literal_eval(SHAPE.sub(size, re.sub(r"\{[^{}]*\}", "", result)))


def total(tree: int | tuple) -> int:
    """Sum of a nested tuple."""
    return tree if isinstance(tree, int) else sum(map(total, tree))


def to_collective(i: Instruction, mesh: jax.sharding.Mesh) -> Collective:
    """Reads one execution of a collective."""
    op, result = i.op.removesuffix("-start"), byte_sizes(i.result)
    if op != i.op and op != "all-reduce":  # a start holds operands, results and context
        result = result[1]  # type: ignore[index]
    written = GROUPS.search(i.rest)
    axes, size = span(written[1] if written else "{}", op == "collective-permute", tuple(mesh.shape.items()))
    return Collective(op, axes, size, 1, total(result), location(i))


# ---------------------------------------------------------------- replica groups


@functools.lru_cache(maxsize=1024)
def span(written: str, pairs: bool, mesh: tuple[tuple[str, int], ...]) -> tuple[tuple[str, ...], int]:
    """Mesh axes along which the members of a group differ, and the size of groups; for permutes, of the axes."""
    names, shape = zip(*mesh, strict=True)
    devices = math.prod(shape)
    together = [] if pairs and written == "{}" else groups(written, devices)
    if max((g.max() for g in together), default=0) >= devices:
        raise ValueError(f"replica groups {written} are of more than the mesh's {devices} devices; give the program's.")
    varies = {
        name
        for group in together
        for name, at in zip(names, np.unravel_index(group, shape), strict=True)
        if (at != at[0]).any()
    }
    axes = tuple(name for name in names if name in varies)
    return axes, math.prod(dict(mesh)[a] for a in axes) if pairs else max(map(len, together))


def groups(written: str, devices: int) -> list[np.ndarray]:
    """Mesh positions that communicate with one another, from a collective's replica groups or pairs."""
    if written == "{}":
        return [np.arange(devices)]
    if written.startswith("{{"):
        return [np.array(numbers(group)) for group in re.findall(r"\{([\d, ]+)\}", written)]
    if iota := IOTA.fullmatch(written):
        return list(counted(iota[2], iota[3]).reshape(numbers(iota[1])))
    if named := NAMED.fullmatch(written):
        return named_groups(*named.groups())
    raise ValueError(f"replica groups {written} are written in a way that is not known here; moe_jax reads jax 0.12's.")


def named_groups(mesh: str, dims: str | None, order: str | None, ids: str | None, axes: str) -> list[np.ndarray]:
    """Device groups of a mesh notation: mesh['a'=4,'b'=2] {'b'}, or {'a':(2)2}, the second 2 of a as 2 x 2.

    `dims` and `order`, or `ids`, are the devices of the mesh, if they are not in order.
    """
    shape = {name: int(n) for name, n in re.findall(r"'?([^',]+?)'?=(\d+)", mesh)}
    n = math.prod(shape.values())
    devices = np.array(numbers(ids)) if ids else counted(dims or str(n), order).ravel()
    index = dict(zip(shape, np.unravel_index(np.arange(n), tuple(shape.values())), strict=True))
    outside = dict(index)
    for name, before, size in re.findall(r"'?([^',]+?)'?(?::\((\d+)\)(\d+))?(?:,|$)", axes):
        after = shape[name] // (int(before or 1) * int(size or shape[name]))
        outside[name] = outside[name] - index[name] // after % int(size or shape[name]) * after
    group = np.ravel_multi_index(tuple(outside.values()), tuple(shape.values()))
    return [devices[group == g] for g in np.unique(group)]


def counted(dims: str, order: str | None) -> np.ndarray:
    """0, 1, 2, ... in an array of these dimensions, transposed into this order."""
    shape = numbers(dims)
    return np.arange(math.prod(shape)).reshape(shape).transpose(numbers(order) if order else None)


def numbers(text: str) -> list[int]:
    """Parses "0,2,1" as [0, 2, 1]."""
    return [int(n) for n in re.findall(r"\d+", text)]
