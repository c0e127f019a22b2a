"""An objective has its loss: training and evaluation add up what it says, on every mesh."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.attention import MHA
from moe_jax.audit import meshes, samples
from moe_jax.config import DataConfig, Experiment, OptimConfig, RunConfig
from moe_jax.data import Folder, NextToken, Terms, predictions
from moe_jax.experts import GLU
from moe_jax.models import LMConfig
from moe_jax.optim import Constant
from moe_jax.train import train


@dataclasses.dataclass(frozen=True)
class Apart:
    """Next tokens, and all rows of the whole batch pushed apart: a term that compares rows across shards."""

    weight: float = 1.0
    batch_kind: ClassVar = "tokens"
    targets: ClassVar = staticmethod(NextToken.targets)
    sizes, shapes, prepare = NextToken.sizes, NextToken.shapes, NextToken.prepare

    def terms(self, logits_BLV: Any, batch: Any, here: Any) -> Terms:
        told = predictions(logits_BLV, batch, here)
        own_BV = logits_BLV.mean(1)
        all_BV = here.gather(own_BV, here.tokens)
        alike_B = jax.nn.logsumexp(own_BV @ all_BV.T, axis=1)
        first_BL = jnp.arange(logits_BLV.shape[1]) == 0
        nats_BL = told.nats_BL + self.weight * first_BL[None] * alike_B[:, None]
        return told._replace(nats_BL=nats_BL, others={"alike": alike_B})


MODEL = LMConfig(V=257, D=8, N=1, attention=MHA(2, 4), ffn=GLU(F=8), moe_layers="none", remat="none")


def experiment(objective: Any, mesh: dict[str, int], **data: Any) -> Experiment:
    whole = DataConfig(L=8, B=16, objective=objective, **data)
    run = RunConfig(steps=2, log_every=1, eval_every=2, eval_sequences=16)
    return Experiment(MODEL, whole, OptimConfig(schedule=Constant(0.01)), run, tuple(mesh.items()))


@pytest.mark.law(1)
def test_rows_are_compared_across_shards():
    """Loss, gradients, evaluation and further numbers of a loss that sees the whole batch are one device's."""
    exp = experiment(Apart(), {"data": 2, "fsdp": 2, "tensor": 2})
    state, batch = meshes.start(exp), samples.sample(exp)
    one, many = (meshes.run_on(e, state, batch, jax.devices()) for e in (meshes.on_one_device(exp), exp))
    assert {name: v.detail for name, v in meshes.compare_with_one_device(one, many, state).items() if not v.holds} == {}
    usual = meshes.run_on(meshes.on_one_device(experiment(NextToken(), {})), state, batch, jax.devices())
    own_BV = np.asarray(one.logits_BLV, np.float64).mean(1)
    alike = np.log(np.exp(own_BV @ own_BV.T).sum(1)).sum()
    np.testing.assert_allclose(one.metrics.others["alike"], alike / one.metrics.targets, rtol=1e-5)
    np.testing.assert_allclose(one.metrics.loss - usual.metrics.loss, alike / one.metrics.targets, rtol=1e-4)
    np.testing.assert_allclose(one.evaluated.others["alike"], alike, rtol=1e-5)
    assert usual.metrics.others == {}


def test_further_numbers_are_in_every_record(tmp_path):
    """As means over targets, in training and in evaluation."""
    (tmp_path / "text").mkdir()
    for n in range(40):
        (tmp_path / "text" / f"{n}.txt").write_text(f"some words, {n} of them, are not many " * 4)
    exp = experiment(Apart(0.0), {"data": 8}, source=Folder(str(tmp_path / "text")))
    records = {r["kind"]: r for r in train(exp, data_dir=tmp_path / "data")}
    assert list(records["train"]["terms"]) == list(records["eval"]["terms"]) == ["alike"]
    plain = {
        r["kind"]: r
        for r in train(experiment(NextToken(), {"data": 8}, source=exp.data.source), data_dir=tmp_path / "data")
    }
    assert "terms" not in plain["train"]
    assert records["train"]["loss"] == plain["train"]["loss"]
