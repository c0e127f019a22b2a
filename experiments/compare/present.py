"""A comparison for the terminal, as a page and as JSON."""

from collections.abc import Sequence
from typing import Any

import rich.console
import rich.table
import rich.text

from experiments.compare.differences import differences
from experiments.compare.runs import NUMBERS, Group, best
from moe_jax.reporting import page, plots
from moe_jax.reporting.metrics import duration

NONE = "-"


def differing(groups: Sequence[Group]) -> dict[str, list[str]]:
    """The fields in which groups differ, a value for each; seeds only where they tell groups apart."""
    found = differences([group.runs[0].config for group in groups], "")
    fields = {path.removeprefix("."): values for path, values in found.items()}
    seeds = fields.pop("config.seed", None)
    alone = all(len(group.runs) == 1 for group in groups)
    return {**fields, "config.seed": seeds} if seeds and (alone or not fields) else fields


def fields_table(groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of what differs: a row for each field or for each run, whichever are more."""
    fields, names = differing(groups), [group.name for group in groups]
    if len(names) <= len(fields):
        return ["", *names], [[path, *values] for path, values in fields.items()]
    return ["", *fields], [[name, *(values[i] for values in fields.values())] for i, name in enumerate(names)]


def results_table(groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of what the runs came to."""
    lowest, seeds = best(groups), any(len(group.runs) > 1 for group in groups)
    head = ["", *["seeds"] * seeds, "held-out loss", "to the best", "dropped", "load", "parameters"]
    head += ["active", "tokens/s", "steps", "wall time"]
    return head, [[group.name, *[str(len(group.runs))] * seeds, *cells(group, lowest)] for group in groups]


def cells(group: Group, lowest: float | None) -> list[str]:
    loss, error = group.mean("loss"), group.error("loss")
    step, steps = group.runs[0].step, group.runs[0].exp.run.steps
    away = None if loss is None or lowest is None else loss - lowest
    return [
        written("{:.4f}", loss) + ("" if error is None else f" ± {error:.4f}"),
        "best" if away == 0 else written("{:+.4f}", away),
        written("{:.2%}", group.mean("drop_rate")),
        written("{:.2f}", group.mean("load_max_over_mean")),
        f"{group.parameters.total:,}",
        f"{group.parameters.active:,}",
        written("{:,.0f}", group.mean("tokens_per_second")),
        f"{step:,}" if group.finished else f"{step:,} of {steps:,}",
        NONE if (seconds := group.mean("seconds")) is None else duration(seconds),
    ]


def written(form: str, value: float | None) -> str:
    return NONE if value is None else form.format(value)


WORDS = (
    "Held-out loss in nats per token, with nothing dropped; of several seeds the mean ± its standard error. "
    "Dropped: the share of choices without a slot, at the end of training. "
    "Load: busiest expert over the mean. Tokens per second: the median of training."
)


def words(groups: Sequence[Group]) -> list[str]:
    """Sentences to read the tables with."""
    data = {run.data for group in groups for run in group.runs if run.data}
    return ["The runs have different data, so that their losses do not compare."] if len(data) > 1 else []


def terminal(groups: Sequence[Group]) -> list[Any]:
    """Tables of what differs and of the results, for rich to print."""
    shown: list[Any] = []
    for head, rows in (fields_table(groups), results_table(groups)):
        if len(head) == 1:  # nothing differs
            continue
        table = rich.table.Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for number, cell in enumerate(head):
            table.add_column(rich.text.Text(cell), justify="right" if number else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(rich.text.Text, row))
        shown += [table, ""]
    return [*shown, *words(groups)]


def comparison_page(groups: Sequence[Group], notes: Sequence[str]) -> str:
    """The same as a page, with the losses."""
    n = sum(len(group.runs) for group in groups)
    parts = [page.text(sentence) for sentence in [*words(groups), *notes]]
    head, rows = fields_table(groups)
    parts += [page.heading("What differs"), page.table(head, rows)] if len(head) > 1 else []
    parts += [page.heading("Results"), page.text(WORDS), page.table(*results_table(groups))]
    runs = {group.name: [run.records for run in group.runs] for group in groups}
    parts += [page.figure(plots.compared_losses(runs, over), wide=True) for over in ("step", "seconds")]
    return page.page(f"Comparison of {n} run{'' if n == 1 else 's'}", parts)


def numbers(groups: Sequence[Group], notes: Sequence[str]) -> dict[str, Any]:
    """The same as numbers; None for what is not there."""
    lowest, fields = best(groups), differing(groups)
    rows = []
    for i, group in enumerate(groups):
        loss = group.mean("loss")
        rows.append(
            {
                "name": group.name,
                "fields": {path: values[i] for path, values in fields.items()},
                **{name: group.mean(name) for name in NUMBERS},
                "loss_standard_error": group.error("loss"),
                "to_the_best": None if loss is None or lowest is None else loss - lowest,
                "parameters": group.parameters.total,
                "active_parameters": group.parameters.active,
                "step": group.runs[0].step,
                "finished": group.finished,
                "runs": [
                    {"name": run.name, "path": str(run.path), "seed": run.exp.seed, **run.numbers} for run in group.runs
                ],
            }
        )
    return {"rows": rows, "notes": list(notes)}


def say(groups: Sequence[Group], notes: Sequence[str], console: rich.console.Console) -> None:
    """Prints tables and notes."""
    for part in [*terminal(groups), *map(rich.text.Text, notes)]:
        console.print(part, highlight=False)
