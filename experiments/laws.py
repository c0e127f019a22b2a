"""Tests which routings are trainable, causal, and independent of other sequences.

    python -m experiments.laws                          the table of all routers, slot priorities and limits
    python -m experiments.laws --out=docs/routing.md

--out puts the table between the marks <!-- laws --> and <!-- /laws --> of a file, replacing what is there. It takes
about five minutes of one core, with most of XLA's optimizations off. `python -m experiments.audit` checks your
own experiment.
"""

import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from experiments import cli
from moe_jax import audit
from moe_jax.config import parse
from moe_jax.core.capacity import PRIORITIES
from moe_jax.core.traits import traits
from moe_jax.dispatch import Einsum, Gather
from moe_jax.experts import MLP
from moe_jax.files import write_file
from moe_jax.moe import MoEConfig
from moe_jax.routers import MixtureOfDepths

OUT = cli.out("A file with the marks <!-- laws --> and <!-- /laws -->, to put the table between them.")
JSON = cli.as_json()

BEGIN, END = "<!-- laws -->", "<!-- /laws -->"
ROUTERS = (
    *("Switch()", "TopK(K=1, normalize=False)", "TopK(K=2)", "TopK(K=2, score='sigmoid')"),
    *("TopK(K=2, score='sparsemax')", "Top2(second='random')", "Top2(second='always')", "NoisyTopK(K=2)"),
    *("NoisyTopK(K=2, learned=False)", "LossFree(K=2)", "LossFree(K=2, groups=4, limit=2)", "CosineTopK(K=2)"),
    *("TopP(p=0.4, K=4)", "NullExperts(K=4)", "NullExperts(K=4, normalize=True)", "Sampled(K=2)"),
    *("Hierarchical(M=4, outer=2)", "Hierarchical(M=4, outer=2, normalize=True)", "TaskTopK(K=2)"),
    *("Hash(K=1)", "BASELayer()", "Sinkhorn(K=1)", "Sinkhorn(K=2)", "Random(K=2)", "RoundRobin(K=2)"),
    *("ExpertChoice()", "SoftMoE()", "MixtureOfDepths()"),
)
LIMITS = (*PRIORITIES, "none")
L, D, F, TRIALS = 16, 8, 8, 60  # of the layers in the table


class Column(NamedTuple):
    """A law, tried on layers with these limits and groups of this many sequences."""

    title: str
    law: str
    limits: tuple[str, ...] = LIMITS
    sequences: int = 1


COLUMNS = (
    Column("trainable", "trainable"),
    Column("causal: token-major", "causal", ("token-major",)),
    Column("choice-major", "causal", ("choice-major",)),
    Column("probability", "causal", ("probability",)),
    Column("no limit", "causal", ("none",)),
    Column("batch-independent: S = L", "batch_independent"),
    Column("S = 2L", "batch_independent", PRIORITIES, 2),
    Column("S = 2L, no limit", "batch_independent", ("none",), 2),
)


def main() -> None:
    jax.config.update("jax_disable_most_optimizations", True)  # compilation dominates
    record = cli.file("json", JSON.value)
    if OUT.value:
        around(OUT.value)  # raises before anything is tried
    rows = table()
    if not OUT.value:
        print(markdown(rows))
    else:
        before, after = around(OUT.value)
        write_file(pathlib.Path(OUT.value), f"{before}{BEGIN}\n\n{markdown(rows)}\n\n{END}{after}")
    cli.write_json(record, rows)


# ---------------------------------------------------------------- the table


def table() -> list[dict[str, str]]:
    """A row for each router: its constructor call, and an answer for each column by its title."""
    rows = []
    for i, name in enumerate(ROUTERS):
        start = time.monotonic()
        rows.append({"router": f"`{name}`"} | {column.title: cell(name, column) for column in COLUMNS})
        jax.clear_caches()
        print(f"{i + 1}/{len(ROUTERS)} {name} {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return rows


def markdown(rows: list[dict[str, str]]) -> str:
    """Markdown table with a row for each router."""
    titles = ("router", *(column.title for column in COLUMNS))
    lines = [titles, ("---",) * len(titles), *(tuple(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(router: str, column: Column) -> str:
    """Cell of a router and a column: the result all its layers share, or each dispatcher's where they differ."""
    answers = {cfg.dispatch: answer(cfg, column.law) for cfg in layers(parse(router), column)}
    if len(set(answers.values())) > 1:
        return "; ".join(f"`{dispatch}` {text}" for dispatch, text in answers.items())
    return next(iter(answers.values()), "-")


def layers(router: Any, column: Column) -> Iterator[MoEConfig]:
    """Small layers with a router, and every dispatcher of a column; for token choice the definition."""
    dispatches: list[Any] = [Einsum(1.0, limit) for limit in column.limits if limit != "none"]
    if "none" in column.limits:
        dispatches += [*(Einsum(None, priority) for priority in PRIORITIES), Gather()]
    for dispatch in dispatches:
        if traits(router).routing in dispatch.accepts:
            E = 1 if isinstance(router, MixtureOfDepths) else 8
            S = None if column.sequences == 1 else column.sequences * L
            yield MoEConfig(E=E, router=router, experts=MLP(F=F), dispatch=dispatch, S=S)


def answer(cfg: MoEConfig, law: str) -> str:
    """A word or two about a layer; "in training / in evaluation" where they differ."""
    if law == "trainable":
        verdict = audit.trainable(cfg, B=2, L=L, D=D)
        return "yes" if verdict.detail.startswith("all") else verdict.detail
    words = [
        "yes" if getattr(audit, law)(cfg, training, B=2, L=L, D=D, trials=TRIALS).holds else "no"
        for training in (True, False)
    ]
    return words[0] if words[0] == words[1] else " / ".join(words)


def around(name: str) -> tuple[str, str]:
    """Text of a page before and after its table; ValueError where the page has no marker for it."""
    path = pathlib.Path(name)
    if not path.is_file():
        raise ValueError(f"--out={name} is not a file; give one with the marks {BEGIN} and {END}.")
    before, begin, remainder = path.read_text().partition(BEGIN)
    _, end, after = remainder.partition(END)
    if not (begin and end):
        raise ValueError(f"--out={name} has no place for the table; mark it by {BEGIN} and {END}.")
    return before, after


if __name__ == "__main__":
    cli.run(main)
