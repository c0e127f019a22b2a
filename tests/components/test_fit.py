"""A model that cannot fit is refused by arithmetic, at once, with the figure; one that fits is not."""

import dataclasses
import time

import pytest

from configs import glam_nano
from experiments import cli, plan, train
from moe_jax.config import Experiment, build
from moe_jax.costs import fit, flops, parameters
from moe_jax.costs.memory import memory
from moe_jax.models import pattern
from moe_jax.models.pattern import layer_counts
from tests import programs
from tests.laws.test_training_step import EXP

GiB = 2**30


def changed(*overrides: str) -> Experiment:
    return build(cli.overridden(glam_nano.get_config().to_dict(), [f"--config.{word}" for word in overrides]))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.N=1000000000", "parameters alone take"),
        ("model.D=1000000000", "its 14,118,000,000,256 parameters alone take 6.4 TiB on each of 8 devices, where"),
        ("model.moe.E=1000000000", "parameters alone take"),
        ("model.moe.experts=MLP(F=1000000000)", "parameters alone take"),
        ("model.attention=MHA(H=1000000000, A=24)", "parameters alone take"),
        ("data.L=1000000000", "the activations of a step alone take"),
        ("data.B=2000000000", "the activations of a step alone take"),
    ],
)
def test_absurd_sizes_are_refused_at_once(override, words):
    """The experiment itself is built as fast, so that it can be printed."""
    began = time.process_time()
    exp = changed(override)
    with pytest.raises(ValueError, match="The model cannot fit: ") as caught:
        fit.check_fits(exp, dict(exp.mesh), 3.0 * GiB)
    assert words in str(caught.value)
    assert "where there are 3.0 GiB; make it" in str(caught.value)
    assert "say --force to try it" in str(caught.value)
    assert time.process_time() - began < 10


def test_what_fits_nowhere_is_refused_by_every_program():
    """The largest slice has 9,216 chips of 192 GiB; published models are far below."""
    error = programs.call(plan, "--config=glam_pod", "--topology=v5e:4x4", "--config.model.N=1000000000").error
    assert "The model fits nowhere: its parameters alone take" in error
    assert "9,216 chips of tpu7x, has 1.7 PiB" in error
    fit.check_size(changed("model.moe.E=100000"))


def test_the_figures_are_those_of_the_arithmetic():
    """From one byte to the next: parameters over all devices, and the largest phase of a step."""
    sizes = dict(EXP.mesh)
    needed, floor = memory(EXP, sizes).total, 4 * parameters(EXP.model).total // 8
    fit.check_fits(EXP, sizes, float(needed))
    for room, words in (
        (needed - 1, f"takes {fit.size_words(needed)} on each of 8 devices"),
        (floor - 1, "alone take"),
    ):
        with pytest.raises(ValueError, match=words):
            fit.check_fits(EXP, sizes, float(room))
    assert [fit.size_words(n) for n in (0.0, 1023.0, 1024.0, 3.0 * GiB, 2.0**50)] == [
        "0.0 B",
        "1,023.0 B",
        "1.0 KiB",
        "3.0 GiB",
        "1.0 PiB",
    ]


def test_a_small_model_is_not_traced(monkeypatch):
    exp = changed()
    monkeypatch.setattr(fit, "memory", lambda *_: pytest.fail("traced"))
    fit.check_fits(exp, dict(exp.mesh), 1.0 * GiB)


def test_memory_of_a_device(monkeypatch, tmp_path):
    """A CPU's devices share the machine's, or what a container may use of it."""
    assert GiB < fit.host_memory() < 2**50
    assert fit.device_memory() * 8 == fit.host_memory()
    (tmp_path / "memory.max").write_text("1073741824\n")
    monkeypatch.setattr(fit, "CGROUPS", (str(tmp_path / "none"), str(tmp_path / "memory.max")))
    assert fit.host_memory() == GiB
    (tmp_path / "memory.max").write_text("max\n")
    assert fit.host_memory() > GiB


@pytest.mark.parametrize("moe_layers", ["every 3", "first 2", "last 3", "all", "none", "0,7"])
def test_layers_are_counted_as_if_one_by_one(moe_layers, monkeypatch):
    """Deep ones by some of them: exactly where they are periodic."""
    model = dataclasses.replace(EXP.model, N=12, moe_layers=moe_layers, attention=EXP.model.attention * 2)
    (stack,) = model.stacks()
    one_by_one = [model.sublayers(stack, i) for i in range(12)]
    assert layer_counts(model, stack) == {layer: one_by_one.count(layer) for layer in one_by_one}
    whole = parameters(model).total, flops(model, EXP.data.shapes(1)).forward
    monkeypatch.setattr(pattern, "DEEP", 6)
    assert sum(layer_counts(model, stack).values()) in (11, 12)
    if moe_layers in ("every 3", "all", "none"):
        model = dataclasses.replace(model, attention=model.attention[:1])
        assert (parameters(model).total, flops(model, EXP.data.shapes(1)).forward) == whole
    assert (model.routed is None) == (moe_layers == "none")


def test_the_program_refuses_it_and_can_be_forced(tmp_path, monkeypatch):
    """Before anything is written; `run` is reached only with --force."""
    given = ["--config=configs/glam_nano.py", "--config.model.N=1000000000", f"--workdir={tmp_path / 'run'}"]
    error = programs.call(train, *given).error
    assert error.startswith("The model cannot fit: its 665,408,000,024,768 parameters alone take 302.6 TiB on each")
    assert not (tmp_path / "run").exists()
    reached = []
    monkeypatch.setattr(train, "run", lambda exp, *_: reached.append(exp.model.N))
    assert programs.call(train, *given, "--force").code == 0
    assert reached == [10**9]
    assert "too many for one process" in programs.call(train, *given[:1], given[2], "--devices=1000000000").error
