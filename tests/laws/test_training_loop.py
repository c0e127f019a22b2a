"""The training loop: exact resumption, divergence, and what its records say."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from moe_jax.config import OptimConfig, RunConfig
from moe_jax.costs import chips, flops
from moe_jax.data import Folder
from moe_jax.optim import AdamW, Constant
from moe_jax.train import TrainingDiverged, train
from tests.laws.test_training_step import EXP


def experiment(text, **changes):
    run = {k: changes.pop(k) for k in list(changes) if k in RunConfig.__dataclass_fields__}
    data = dataclasses.replace(EXP.data, source=Folder(str(text)))
    return dataclasses.replace(EXP, data=data, run=dataclasses.replace(EXP.run, **run), **changes)


def losses(records):
    return {r["step"]: r["loss"] for r in records if r["kind"] == "train"}


@pytest.mark.law(9)
def test_resume_is_exact(text, tmp_path):
    """Law 9: interrupted = uninterrupted, bit for bit on the same mesh, and to rounding on another."""
    exp, data = experiment(text), tmp_path / "data"
    whole = list(train(exp, tmp_path / "whole", data))
    assert [r["kind"] for r in whole] == ["start", *["train"] * 3, "eval", *["train"] * 3, "eval", "end"]

    for record in train(exp, tmp_path / "cut", data):
        if record["kind"] == "eval" and record["step"] == 3:
            break  # the generator is closed here, as by an interruption
    rest = list(train(exp, tmp_path / "cut", data))
    assert rest[0]["step"] == 3
    assert losses(rest) == {step: loss for step, loss in losses(whole).items() if step > 3}
    evals = [[r["loss"] for r in run if r["kind"] == "eval"][-1] for run in (whole, rest)]
    assert evals[0] == evals[1]

    (tmp_path / "cut" / "checkpoints" / "6").rename(tmp_path / "six")
    moved = list(train(experiment(text, mesh=(("data", 8), ("expert", 1))), tmp_path / "cut", data))
    assert moved[0]["step"] == 3
    np.testing.assert_allclose(losses(moved)[6], losses(whole)[6], rtol=1e-4)


def test_divergence_stops_and_keeps_nothing_that_broke(text, tmp_path):
    """A learning rate of 1e30 is never finite again: training stops, says so, and its parameters are not restored."""
    exp = experiment(
        text, steps=50, eval_every=50, save_every=1, max_bad_steps=3, optim=OptimConfig(AdamW(), Constant(1e30), None)
    )
    records = []
    with pytest.raises(TrainingDiverged, match="3 steps in a row"):
        records.extend(train(exp, tmp_path / "run", tmp_path / "data"))
    assert (records[-1]["kind"], records[-1].get("diverged")) == ("end", True)
    assert records[-1]["good"] is None
    assert list((tmp_path / "run" / "checkpoints").glob("*")) == []


@pytest.mark.law(8)
def test_records_say_everything(text, tmp_path, monkeypatch):
    """Law 8: drop rate per layer in every record; evaluation dropless, the limited loss beside it; by domain."""
    monkeypatch.setattr(chips, "peak", lambda kind: 1e6 if kind == "cpu" else None)
    exp = experiment(text, steps=2, eval_every=2)
    with jax.debug_nans(True):  # as JAX_DEBUG_NANS=1, with which a NaN is looked for: a healthy run has none
        records = list(train(exp, None, tmp_path))
    step, held_out = records[1], records[-2]
    assert {"loss", "bits_per_byte", "grad_norm", "learning_rate", "tokens_per_second", "skipped"} <= set(step)
    work = 2 * flops(exp.model, exp.data.shapes(1)).training * exp.data.B
    seconds = work / step["flops_per_second"]
    tokens = step["tokens_per_second"] * seconds / (exp.data.B * exp.data.L)
    assert 1.5 < tokens < 2.001  # of two steps, but for what is no target
    np.testing.assert_allclose(step["mfu"], step["flops_per_second"] / (8 * 1e6), rtol=1e-9)
    moe = step["moe"]
    assert moe["layer"] == [1]
    assert "agreement" not in moe  # no layer before it
    assert {"load", "load_cv", "dead_experts", "drop_rate", "router_entropy", "load_balance", "router_z"} <= set(moe)
    assert len(moe["load"][0]) == 4
    np.testing.assert_allclose(sum(moe["load"][0]), 1, rtol=1e-5)
    assert 0 < step["drop_rate"] < 1
    assert held_out["moe"]["drop_rate"] == [0.0]
    assert held_out["drop_rate_capacity"] > 0
    assert held_out["loss"] != held_out["loss_capacity"]
    np.testing.assert_allclose(held_out["bits_per_byte"], held_out["loss"] / math.log(2), rtol=1e-6)
    assert len(held_out["loss_by_domain"]) == 1
    end = records[-1]
    assert end["energy"]["seconds"] == end["seconds"]
    assert end["energy"]["kwh"] > 0
    assert end["energy"]["basis"].startswith("estimate for ")
