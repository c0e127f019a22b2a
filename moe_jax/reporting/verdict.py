"""The verdict on a run: plain sentences that its records prove."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from moe_jax.reporting.metrics import curve, last

Records = list[dict]
Runs = Mapping[str, Records]  # by name, the reported one first
SLOW = 0.5  # of the median speed


def run_verdict(runs: Runs, steps: int | None = None) -> list[str]:
    """Returns sentences on the first of the runs; steps: how many its config asks for. [] without a step."""
    records = next(iter(runs.values()))
    if not last(records, "train") and not last(records, "eval"):
        return []
    sentences = (ending(records, steps), held_out_sentence(runs), drops_and_balance(records), steadiness(records))
    return [sentence for sentence in sentences if sentence]


def ending(records: Records, steps: int | None = None) -> str:
    """Says whether the run is finished, has diverged, or is to go on."""
    end, step = last(records, "end"), max(r["step"] for r in records)
    of = f" of {steps:,}" if steps else ""
    if end.get("diverged"):
        return f"Diverged at step {step:,}{of}: too many steps in a row had no finite loss or gradient."
    if end and (steps is None or step >= steps):
        return f"Finished after {step:,} steps."
    return f"Unfinished: the last record is of step {step:,}{of}."


def held_out_sentence(runs: Runs) -> str:
    """The last held-out loss, against those of the other runs."""
    (_, records), *others = runs.items()
    own = last(records, "eval")
    if not own:
        return "Never evaluated."
    if own.get("loss") is None:
        return f"The held-out loss at step {own['step']:,} is not finite."
    words = f"Held-out loss {own['loss']:.4f} nats per token at step {own['step']:,}"
    steps, losses = curve(records, "loss", "eval")
    if np.nanmin(losses) < own["loss"]:
        best = int(np.nanargmin(losses))
        words += f" (the lowest was {losses[best]:.4f} at step {steps[best]:,})"
    if not others:
        return words + "."
    compared = "; ".join(against(records, name, other) for name, other in others)
    return f"{words}: {compared}. Each is one run; how much seeds differ is not measured here."


def against(records: Records, name: str, other: Records) -> str:
    """The difference of two last held-out losses, where it means something."""
    own, its = last(records, "eval"), last(other, "eval")
    data = [last(r, "start").get("data") for r in (records, other)]
    if its.get("loss") is None:
        return f"{name} has no held-out loss"
    if None not in data and data[0] != data[1]:
        return f"{name} has other data, so that losses are not compared"
    at = "" if its["step"] == own["step"] else f" at its step {its['step']:,}"
    difference = own["loss"] - its["loss"]
    if f"{difference:.4f}".lstrip("-") == "0.0000":
        return f"equal to {name}{at} in four decimals"
    better = "better" if difference < 0 else "worse"
    return f"{abs(difference):.4f} {better} than {name} ({its['loss']:.4f}{at})"


def drops_and_balance(records: Records) -> str:
    """Drops and balance in training; "" of a run without MoE layers."""
    moe, words = last(records, "train").get("moe") or {}, []
    if (rate := mean_rate(records)) is not None:
        now = last(records, "train").get("drop_rate")
        end = "" if now is None else f", {now:.2%} at the end"
        words.append(
            f"{rate:.2%} of the assignments in training were dropped{end}" if rate else "No assignment dropped"
        )
    if finite := [ratio for ratio in moe.get("load_max_over_mean", ()) if ratio is not None]:
        words.append(f"the busiest expert has {max(finite):.2f} times the mean load of its layer")
    if "dead_experts" in moe and "load" in moe:
        dead, every = int(np.sum(moe["dead_experts"])), sum(map(len, moe["load"]))
        words.append(f"{dead or 'none'} of {every} experts {'is' if dead == 1 else 'are'} dead")
    return "; ".join(words) + "." if words else ""


def mean_rate(records: Records) -> float | None:
    """The drop rate of a whole run: of its records, each weighted by its steps; None where none has one."""
    steps, rates = curve(records, "drop_rate")
    weights = np.diff(steps, prepend=0)
    known = np.isfinite(rates) & (weights > 0)
    return float(np.average(rates[known], weights=weights[known])) if known.any() else None


def steadiness(records: Records) -> str:
    """Updates that were skipped, and records of slow steps."""
    train: dict[str, Any] = last(records, "train")
    words = []
    if (skipped := train.get("skipped")) is not None:
        words.append(f"{skipped:,} of {train['step']:,} steps skipped" if skipped else "No step skipped")
    speeds = curve(records, "tokens_per_second")[1][1:]  # the first compiles
    speeds = speeds[np.isfinite(speeds)]
    if len(speeds) and (slow := int((speeds < SLOW * np.median(speeds)).sum())):
        words.append(f"{slow:,} of {len(speeds):,} log intervals below half the median speed")
    return "; ".join(words) + "." if words else ""
