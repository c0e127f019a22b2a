"""The costs of GLaM 64B/64E on 1,024 chips in docs/parallelism.md are those that are predicted."""

import dataclasses
import re
from pathlib import Path

import pytest

from moe_jax import GLU, MLP, LMConfig, LoadBalance, MoEConfig, Scatter, Top2
from moe_jax.attention import MHA, Relative
from moe_jax.audit.placement import placement
from moe_jax.config import DataConfig, Experiment, OptimConfig, parse
from moe_jax.costs.communication import step
from moe_jax.optim import Adafactor, Constant

PAGE = Path(__file__).parents[2] / "docs" / "parallelism.md"
HEAD = "mesh|changed|parameters|optimizer|weights|gradients|exchange|tensor|in all"
GLAM = Experiment(  # arXiv:2112.06905, table 4, with one sequence a chip
    LMConfig(
        V=256_000,
        D=8192,
        N=64,
        attention=MHA(128, 128, position=Relative()),
        ffn=GLU(F=32_768, activation="gelu"),
        moe=MoEConfig(E=64, router=Top2(), experts=MLP(F=32_768), dispatch=Scatter(1.25), losses=(LoadBalance(0.01),)),
        moe_layers="every 2",
        remat="save_collectives",
        dtype="bfloat16",
    ),
    DataConfig(L=1024, B=1024),
    OptimConfig(Adafactor(), Constant(0.01)),
)


def experiment(mesh: str, changed: str) -> Experiment:
    """Experiment of a row of the table: `fsdp=16 x expert=64`, and fields that are set besides."""
    model, optim = GLAM.model, GLAM.optim
    for name, text in re.findall(r"`(\w+)=([^`]+)`", changed):
        if name in ("dispatch", "exchange"):
            model = dataclasses.replace(model, moe=dataclasses.replace(model.moe, **{name: parse(text)}))
        elif name == "zero1":
            optim = dataclasses.replace(optim, zero1=text == "True")
        else:
            model = dataclasses.replace(model, **{name: text.strip("'")})
    sizes = tuple((axis, int(n)) for axis, n in re.findall(r"(\w+)=(\d+)", mesh))
    return dataclasses.replace(GLAM, model=model, optim=optim, mesh=sizes)


def row(mesh: str, changed: str) -> list[str]:
    """Row of GiB: what a device holds, and sends in a step."""
    exp = experiment(mesh, changed)
    placed, sent = placement(exp), dict.fromkeys(("weights", "gradients", "exchange", "tensor", "in all"), 0.0)
    for c in step(exp, dict(exp.mesh), "tpu"):
        kinds = {"fsdp gather": "weights", "ZeRO-1 gather": "weights", "fsdp scatter": "gradients", "tensor": "tensor"}
        kinds |= {"ZeRO-1 scatter": "gradients", "gradients": "gradients", "exchange": "exchange"}
        kind = next((kind for start, kind in kinds.items() if c.where.startswith(start)), None)
        sent["in all"] += c.wire
        if kind:
            sent[kind] += c.wire
    held = [sum(p.device_bytes for p in placed), sum(p.optimizer_bytes for p in placed)]
    return [f"{n / 2**30:,.1f}" for n in (*held, *sent.values())]


def table() -> list[list[str]]:
    lines = PAGE.read_text().partition("<!-- glam -->")[2].partition("<!-- /glam -->")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert cells[0] == HEAD.split("|")
    return cells[2:]


@pytest.mark.parametrize("said", table(), ids=lambda cells: f"{cells[0]} {cells[1]}".strip())
def test_the_table_is_true(said):
    assert said[2:] == row(*said[:2])


def test_the_table_shows_every_exchange():
    text = PAGE.read_text().partition("<!-- glam -->")[2].partition("<!-- /glam -->")[0]
    assert len(table()) >= 7
    for word in ("RaggedAllToAll()", "AllGather()", "TwoLevel()", "zero1=True", "tensor=", "slice="):
        assert word in text
