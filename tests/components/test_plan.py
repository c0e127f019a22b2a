"""Plans: topologies and how meshes lie on them, the least time of a step, the search, the program."""

import dataclasses
import itertools
import json
import math
from functools import cache, partial
from pathlib import Path

import jax
import pytest

from experiments import cli
from experiments import plan as program
from moe_jax import GLU, MLP, AllGather, Einsum, LMConfig, LoadBalance, MoEConfig, RaggedAllToAll, Scatter, Sort, TopK
from moe_jax.attention import MHA
from moe_jax.config import DataConfig, Experiment, OptimConfig, build
from moe_jax.core.shard import AXES
from moe_jax.core.traffic import Collective
from moe_jax.costs import flops
from moe_jax.costs.chips import CHIPS, chip
from moe_jax.costs.communication import step
from moe_jax.costs.memory import memory
from moe_jax.data import Bytes
from moe_jax.optim import Adafactor, Constant
from moe_jax.plan import compile as compiler
from moe_jax.plan import torus
from moe_jax.plan.plan import Site, plan, plan_to_dict
from moe_jax.plan.roofline import across, expected, roofline, state
from moe_jax.plan.search import exchanges, reason, search, variant
from moe_jax.plan.topology import factorizations, rings, side_lengths, slice_shapes, topology
from moe_jax.plan.torus import Ring
from tests import programs
from tests.pages import stands_alone

call = partial(programs.call, program)
MOE = MoEConfig(E=8, router=TopK(K=2), experts=MLP(F=64), dispatch=Scatter(1.25), losses=(LoadBalance(0.01),))
MODEL = LMConfig(V=Bytes().V, D=32, N=2, attention=MHA(4, 8), ffn=GLU(F=64), moe=MOE, dtype="bfloat16", remat="none")
SMALL = Experiment(MODEL, DataConfig(L=64, B=64), OptimConfig(Adafactor(), Constant(0.01)))
V5E = topology("v5e:2x4")
CONFIG = """
from ml_collections import ConfigDict

PUBLISHED = {{"total": "40K", "active": 2e4, "tokens": 1_000_000, "source": "Some paper, table 1",
             "differs": {{"active": "a test"}}}}

def get_config():
    config = ConfigDict()
    config.mesh = {mesh}
    config.model = {{
        "D": 32, "N": 2, "attention": "MHA(4, 8)", "ffn": "GLU(F=64)", "dtype": "bfloat16", "remat": "none",
        "moe": {{"E": 8, "router": "TopK(K=2)", "experts": "MLP(F=64)", "dispatch": "Scatter(1.25)"}},
    }}
    config.data = {{"L": 64, "B": 64}}
    return config
"""


@pytest.fixture
def config(tmp_path) -> str:
    return write(tmp_path, {"data": -1, "expert": 4})


def write(folder: Path, mesh: dict[str, int]) -> str:
    (folder / "tiny.py").write_text(CONFIG.format(mesh=mesh))
    return f"--config={folder / 'tiny.py'}"


def on(mesh: dict[str, int], exp: Experiment = SMALL) -> Experiment:
    return dataclasses.replace(exp, mesh=tuple(mesh.items()))


def of(exp: Experiment, **changed) -> Experiment:
    """With another MoE layer."""
    moe = dataclasses.replace(exp.model.moe, **changed)
    return dataclasses.replace(exp, model=dataclasses.replace(exp.model, moe=moe))


# ---- topologies


def test_a_topology_is_read_from_its_name():
    """A name is a topology, which says its name."""
    for name, chips, devices in (("v4:8x8x16", 1024, 1024), ("v3:4x4", 16, 32), ("2*v5e:16x16", 512, 512)):
        found = topology(name)
        assert (found.name, found.chips, found.devices) == (name, chips, devices)
    assert topology("1*v4:2x2x1").name == "v4:2x2x1"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v4", ["not a name", "v4:8x8x16"]),
        ("v4:8x8x15", ["no slice of v4 is 8x8x15", "nearest is v4:8x8x16 with 1024 chips"]),
        ("v4:16x8x8", ["nearest is v4:8x8x16"]),
        ("v5e:4x4x4", ["nearest is v5e:8x8"]),
        ("v5e:32x32", ["nearest is v5e:16x16"]),
        ("v5pp:2x2x1", ["did you mean 'v5p'?"]),
        ("h100:8", ["no TPU is called 'h100'", "v4"]),
        ("v4:0x2x2", ["not a shape"]),
        ("v4:2xtwo", ["not a shape"]),
        ("0*v4:2x2x1", ["not a name"]),
        ("two*v4:2x2x1", ["not a name"]),
    ],
)
def test_no_such_topology(name, words):
    with pytest.raises(ValueError, match="Topology") as error:
        topology(name)
    assert all(word in str(error.value) for word in words), error.value


def test_pods_have_their_shapes():
    """A pod is the largest; cubes have ascending sides."""
    for name, most in (("v3", 1024), ("v4", 4096), ("v5e", 256), ("v5p", 6144), ("v6e", 256), ("tpu7x", 9216)):
        found = slice_shapes(chip(name))
        assert max(map(math.prod, found)) == most
        assert all(tuple(sorted(s)) == s for s in found if math.prod(s) > 4)
    assert (8, 8, 16) in slice_shapes(chip("v4"))
    assert (12, 12, 24) in slice_shapes(chip("v4"))


@pytest.mark.parametrize(
    ("mesh", "filled"),
    [
        ({"data": -1, "expert": 4}, {"data": 2, "expert": 4}),
        ({"expert": 8}, {"expert": 8}),
        ({"slice": -1, "fsdp": 8}, {"fsdp": 8}),
    ],
)
def test_meshes_that_fill(mesh, filled):
    assert side_lengths(mesh, V5E) == {axis: filled.get(axis, 1) for axis in AXES}


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        ({"expert": 3}, "set mesh.expert=8"),
        ({"data": 2, "expert": 8}, "set mesh.expert=4"),
        ({"data": -1, "expert": 3}, "set mesh.expert=4"),
        ({}, "Mesh of one device"),
        ({"slice": 2, "expert": 4}, "set mesh.slice=1, or say --topology=2*v5e:2x4"),
    ],
)
def test_meshes_that_do_not(mesh, words):
    """One line, with a mesh that fills the slice."""
    with pytest.raises(ValueError, match="esh") as error:
        side_lengths(mesh, V5E)
    assert words in str(error.value), error.value


def test_every_factorization_comes_once():
    """All of them, each once; slices are not divided."""
    found = factorizations(16, 2)
    assert (
        len({tuple(m.values()) for m in found})
        == len(found)
        == sum(math.prod(m) == 8 for m in itertools.product((1, 2, 4, 8), repeat=4))
    )
    assert all(m["slice"] == 2 and math.prod(m.values()) == 16 for m in found)


# ---- how a mesh lies on the torus


def test_mesh_axes_become_rings():
    """Rings of mesh axes, checked once by JAX's own devices: whole sides, parts of one, every second chip."""
    pod = topology("v4:8x8x16")
    mesh = side_lengths({"fsdp": 4, "expert": 64, "tensor": 4}, pod)
    assert rings(pod, mesh, ("tensor",)) == (Ring(4, 1, False),)
    assert rings(pod, mesh, ("fsdp",)) == (Ring(4, 2, True),)
    assert math.prod(r.chips for r in rings(pod, mesh, ("expert",))) == 64
    assert rings(pod, mesh, ("fsdp", "expert", "tensor")) == (Ring(8, 1, True), Ring(8, 1, True), Ring(16, 1, True))
    small = topology("v5e:4x4")
    assert rings(small, side_lengths({"data": 16}, small), ("data",)) == (Ring(4, 1, False),) * 2  # does not close
    two = topology("tpu7x:2x2x1")  # two devices a chip
    assert rings(two, side_lengths({"data": 4, "tensor": 2}, two), ("tensor",)) == ()


def test_collectives_take_the_time_of_their_links():
    """Times of one byte over one link a second agree with a simulation of the links."""
    assert torus.collective_seconds("all-gather", 6.0, [Ring(4, 1, True)], 1.0) == 3
    assert torus.collective_seconds("all-reduce", 6.0, [Ring(4, 1, False)], 1.0) == 6
    assert torus.collective_seconds("all-gather", 12.0, [Ring(4, 1, True)] * 3, 1.0) == 2
    assert torus.collective_seconds("all-gather", 6.0, [Ring(4, 2, True)], 1.0) == 6  # two groups share the links
    assert torus.collective_seconds("all-reduce", 6.0, [], 1.0) == 0


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("n", [4, 8, 16])
def test_all_to_all_is_limited_by_the_busiest_link(n, closed):
    """Every chip sends an n-th of a byte to all, itself too, the short way; the busiest link carries what is said."""
    link = dict.fromkeys(((i, way) for i in range(n) for way in (1, -1)), 0.0)
    for source, target in itertools.product(range(n), repeat=2):
        there = (target - source) % n if closed else target - source
        ways = [(1, there), (-1, n - there)] if closed else [(1 if there > 0 else -1, abs(there))]
        least = min(hops for _, hops in ways)
        shortest = [(way, hops) for way, hops in ways if hops == least]
        for way, hops in shortest:
            for hop in range(hops):
                link[(source + way * hop) % n, way] += 1 / n / len(shortest)
    assert Ring(n, 1, closed).carried == pytest.approx(max(link.values()))


def test_between_slices():
    """A slice sends what is reduced once, and of an all-to-all what is for other slices."""
    two = topology("2*v5e:2x2")
    reduced = Collective("all-reduce", ("slice", "data"), 8, 1, 800)
    assert across(reduced, reduced.wire, two, 4) == pytest.approx(2 * 800 / 4 / 2)
    sent = Collective("all-to-all", ("slice", "expert"), 8, 1, 800)
    assert across(sent, sent.wire, two, 4) == pytest.approx(400)
    exp = on({"slice": 2, "data": 4})
    slow = {s.what.axes: s.wire / s.seconds for s in roofline(exp, two).sent}
    assert slow["slice", "data"] < two.chip.link


def test_ragged_rows_travel_not_the_room():
    there_and_back = Collective("ragged-all-to-all", ("expert",), 4, 2, 5 * 100)
    assert there_and_back.bytes * expected(there_and_back, RaggedAllToAll(), E=8) == 2 * 100
    assert expected(there_and_back, RaggedAllToAll(buffer=2.0), E=8) == pytest.approx(2 / 3)
    assert expected(there_and_back, RaggedAllToAll(), E=8, distinct=4) == pytest.approx(2 / 3)
    assert expected(there_and_back._replace(op="all-gather"), RaggedAllToAll(), E=8) == 1


# ---- the roofline


@pytest.mark.parametrize("mesh", [{"data": 2, "expert": 4}, {"fsdp": 4, "tensor": 2}])
def test_the_roofline_adds_up_the_predictions(mesh):
    """FLOPs are the model's, bytes of the network are those predicted; MFU is 1 at the speed of the chip."""
    exp = on(mesh)
    line, cost = roofline(exp, V5E), flops(exp.model, exp.data.shapes(1))
    assert line.flops * 8 == cost.training * 64
    assert line.executed / line.flops > 1  # slots that stay empty
    assert line.tokens == 64 * 64
    assert line.mfu(line.flops / V5E.chip.flops) == pytest.approx(1)
    assert line.best == max(line.parts.values()) <= line.worst == sum(line.parts.values())
    wires = sum(c.wire for c in step(exp, dict(exp.mesh), "tpu"))
    assert sum(s.wire for s in line.sent) == pytest.approx(wires)


def test_state_is_what_lies_on_a_device():
    """Parameters and optimizer, as the predicted memory has them."""
    for mesh, zero1 in (({"data": 2, "expert": 4}, True), ({"fsdp": 4, "tensor": 2}, False)):
        exp = on(mesh, dataclasses.replace(SMALL, optim=dataclasses.replace(SMALL.optim, zero1=zero1)))
        params, opt_state = state(exp, dict(exp.mesh))
        needs = memory(exp, dict(exp.mesh))
        assert sum(leaf.bytes for leaf in params) == needs.parameters
        assert sum(leaf.bytes for leaf in opt_state) == needs.optimizer


def test_what_costs_more():
    """Computing again, more pieces, gathered weights and dense masks only ever add."""
    exp = on({"data": 2, "expert": 4})
    plainest = roofline(exp, V5E)
    for dearer in (variant(exp, "full"), variant(exp, "save_collectives"), of(exp, dispatch=Einsum(1.25))):
        assert roofline(dearer, V5E).executed > plainest.executed
    again, gathered = (roofline(other, V5E).memory for other in (variant(exp, "full"), on({"fsdp": 8})))
    assert again["weights"] == pytest.approx(4 / 3 * plainest.memory["weights"])
    assert again["activations"] == pytest.approx(4 / 3 * plainest.memory["activations"])
    assert 1.3 < gathered["weights"] / roofline(on({"data": 8}), V5E).memory["weights"] < 4 / 3  # routers are not
    pieces, once = (roofline(variant(on({"fsdp": 8}), microbatches=a), V5E) for a in (2, 1))
    assert pieces.network > once.network
    assert pieces.memory["weights"] == 2 * once.memory["weights"]
    assert pieces.memory["activations"] == once.memory["activations"]
    apart, together = roofline(of(exp, exchange=AllGather()), V5E), roofline(exp, V5E)
    assert apart.memory["weights"] > together.memory["weights"]
    halves = roofline(on({"data": 2, "expert": 4}), topology("v5e:2x4")._replace(chip=V5E.chip._replace(link=25e9)))
    assert halves.network == pytest.approx(2 * plainest.network)


def test_bytes_of_one_matrix_by_hand():
    """A dense layer and its tied embedding: what a device reads of weights, rows and scores."""
    model = dataclasses.replace(MODEL, moe=None, moe_layers="none", N=1)
    exp = dataclasses.replace(SMALL, model=model, mesh=(("data", 8),))
    V, numbers = MODEL.V, 32 * MODEL.V + 4 * 32 * 32 + 3 * 32 * 64  # embedding, attention, GLU
    line = roofline(exp, V5E)
    assert line.memory["weights"] == 3 * 2 * numbers
    rows = (32 + V) + 4 * (32 + 32) + 3 * (32 + 64)
    assert line.memory["activations"] == 3 * 2 * (64 * 64 / 8) * rows
    assert line.memory["attention scores"] == 3 * (8 + 4) * (64 / 8) * 4 * 64 * 64


# ---- the search


FEW = dataclasses.replace(SMALL, data=dataclasses.replace(SMALL.data, B=4))
SQUARE = topology("v5e:2x2")


@cache
def everything() -> list[tuple[tuple, int, float]]:
    """Every mesh and exchange in every variant, with its bytes and seconds."""
    found = []
    for mesh in factorizations(SQUARE.devices):
        choices = itertools.product(
            exchanges(FEW, mesh), (False, True), ("none", "full", "save_collectives"), (1, 2, 4, 8)
        )
        for exchange, zero1, remat, microbatches in choices:
            try:
                new = variant(FEW, remat, microbatches, mesh=tuple(mesh.items()), exchange=exchange, zero1=zero1)
            except ValueError:
                continue
            found.append(((new.mesh, new.exchange), memory(new, mesh).total, roofline(new, SQUARE).worst))
    return found


@pytest.mark.parametrize("room", [1.0, 0.45])
def test_search_finds_what_brute_force_finds(room):
    """The same meshes, in the same order, with memory to spare and without."""
    usable = int(room * max(needed for _, needed, _ in everything()))
    where = SQUARE._replace(chip=SQUARE.chip._replace(usable=float(usable)))
    fastest: dict[tuple, float] = {}
    for key, needed, seconds in everything():
        if needed <= usable:
            fastest[key] = min(fastest.get(key, math.inf), seconds)
    said: list[str] = []
    found = search(FEW, where, keep=4, say=said.append)
    assert [option.seconds for option in found.options] == pytest.approx(sorted(fastest.values())[:4])
    assert len({(option.exp.mesh, option.exp.exchange) for option in found.options}) == 4
    assert all(option.memory.total <= usable for option in found.options)
    assert room < 1 or found.tried < found.meshes  # it stops where no other mesh can be faster
    assert said


def test_search_says_why_not():
    """Refusals are counted by reason; where nothing fits, the smallest is named."""
    where = V5E._replace(chip=V5E.chip._replace(usable=300_000.0))
    found = search(FEW, where)
    assert not found.options
    assert found.smallest is not None
    assert found.smallest.memory.total > 300_000
    assert any("config.model.attention.H=n does not spread evenly" in why for why in found.refused), found.refused
    nowhere = search(FEW, where._replace(chip=V5E.chip._replace(usable=1000.0)))
    assert nowhere.smallest is None
    assert nowhere.large == nowhere.meshes > 0
    assert reason(ValueError("E=8 of 3; do this 4")) == "E=n of n"


def test_exchanges_fit_the_dispatcher():
    spread = {"slice": 1, "expert": 4}
    assert [type(e).__name__ for e in exchanges(SMALL, spread)] == ["AllToAll", "AllGather"]
    assert [type(e).__name__ for e in exchanges(SMALL, {"slice": 2, "expert": 4})] == [
        "AllToAll",
        "TwoLevel",
        "AllGather",
    ]
    dropless = of(SMALL, dispatch=Sort(), exchange=RaggedAllToAll())
    assert [type(e).__name__ for e in exchanges(dropless, spread)] == ["RaggedAllToAll", "AllGather"]
    assert exchanges(dropless, {"slice": 1, "expert": 1}) == [RaggedAllToAll()]


# ---- a plan, and the program


def fake(exp: Experiment, name: str) -> compiler.Compiled:
    """Report of a compiler on a step that sends exactly what is predicted."""
    sent = step(exp, dict(exp.mesh), "tpu")
    gb = 2**30
    fits = dict(exp.mesh)["fsdp"] == 1
    return compiler.Compiled(
        *(fits, 4 * gb, 3 * gb if fits else 5 * gb, 0 if fits else gb, gb, gb, gb, gb, sent if fits else []),
        *(1e9, 1e-3, [], 1.0, 2.0, gb),
    )


@pytest.fixture
def compiles(monkeypatch):
    monkeypatch.setattr(compiler, "available", lambda: None)
    monkeypatch.setattr(compiler, "compile_step", fake)


def test_plan_and_json(compiles):
    """Everything is in the JSON; a run's figures follow from one another."""
    found = plan(on({"data": 2, "expert": 4}), V5E, Site.of(V5E.chip, watts=200.0, price=2.0), tokens=4096e6)
    assert found.fits
    assert found.rows
    assert all(row.holds for row in found.rows)
    for run in found.runs.values():
        assert run.steps == pytest.approx(1e6)
        assert run.days * 24 * 8 == pytest.approx(run.chip_hours)
        assert run.tokens_per_day * run.days == pytest.approx(4096e6)
        assert run.energy.kwh == pytest.approx(run.chip_hours * 200 * 1.1 / 1000)
        assert run.price == pytest.approx(2 * run.chip_hours)
    text = json.dumps(plan_to_dict(found))
    back = json.loads(text)
    assert Experiment.from_json(back["exp"]) == found.exp
    assert back["parameters"]["total"] == found.parameters.total
    assert back["memory"]["total"] == found.memory.total
    assert back["runs"]["nothing overlapped"]["energy"]["kwh"] == found.runs["nothing overlapped"].energy.kwh
    assert sum(s["seconds"] for s in back["roofline"]["sent"]) == pytest.approx(found.roofline.network)


def test_without_power_nothing_is_said_of_energy():
    found = plan(on({"data": 2, "expert": 4}), V5E, analytic=True)
    assert all(run.energy is None for run in found.runs.values())
    assert found.missing == "not asked for"
    assert plan(on({"data": 4}), topology("v4:2x2x1"), analytic=True).runs["all overlapped"].energy.kwh > 0


def opened(path: Path) -> str:
    return stands_alone(path.read_text()).said


def test_the_program_reports_the_same_everywhere(config, compiles, tmp_path):
    """Text, JSON and page say the same; the published figures are beside the counts; progress is not in the output."""
    files = [f"--json={tmp_path / 'plan.json'}", f"--report={tmp_path / 'plan.html'}"]
    code, out, err = call(config, "--topology=v5e:2x4", "--power=200", "--price=1.5", "--tokens=1e9", *files)
    assert code == 0, err
    assert "v5e:2x4, 8 chips: fits (compiled)." in out
    assert "Some paper, table 1; active: a test" in out
    assert "compiling" in err
    assert "compiling" not in out
    found = json.loads((tmp_path / "plan.json").read_text())
    assert f"{found['parameters']['total']:,}" in out
    assert f"{found['parameters']['total'] / 40_000 - 1:+.1%}" in out
    page = opened(tmp_path / "plan.html")
    for line in out.splitlines():
        assert all(word.strip("()") in page for word in line.split()), line
    assert found["site"]["watts"] == 200


def test_program_without_a_compiler(config, monkeypatch):
    """The arithmetic is said, and what is missing."""
    monkeypatch.setattr(compiler, "available", lambda: "no compiler here: pip install .[tpu]")
    code, out, _ = call(config, "--topology=v4:2x2x2")
    assert code == 0
    assert "The run (1e+06 tokens)" in out  # those that its authors trained on
    assert "no compiler here: pip install .[tpu]" in out
    assert "fits (predicted)" in out
    code, out, _ = call(config, "--topology=v4:2x2x2", "--analytic")
    assert code == 0
    assert "not asked for" in out


def test_program_searches(config, compiles, tmp_path):
    """A table with the fastest first, the best compiled, and what to say to get the first that fits."""
    files = [f"--json={tmp_path / 'found.json'}", f"--report={tmp_path / 'found.html'}"]
    code, out, err = call(config, "--topology=v5e:2x2", "--search", "--best=2", *files)
    assert code == 0, err
    assert "meshes can be built" in err
    assert "compiling option 2 of 2" in err
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["compiled"]) == 2
    best = found["options"][0]
    assert all(best["roofline"]["compute"] > 0 for best in found["options"])
    assert "--config.mesh.expert=" in out.splitlines()[-1]
    assert "does not spread evenly" not in best["exp"]
    assert "3 GiB" in out or "no, 1 GiB too much" in out
    page = opened(tmp_path / "found.html")
    assert "mesh of the config expert=4" in page
    assert out.splitlines()[-1].partition(": ")[2] in page  # the flags of the first


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["No topology", "--topology=v4:4x4x4"]),
        (["--topology=v9:2x2"], ["no TPU is called 'v9'"]),
        (["--topology=v4:3x3x3"], ["no slice of v4", "nearest is v4:2x4x4"]),
        (["--topology=v5e:2x4", "--config.mesh.fsdp=16"], ["does not fill the 8 devices", "set mesh.fsdp=2"]),
        (["--topology=v5e:16x16"], ["config.data.B=64", "multiple of 256"]),
        (["--topology=v5e:2x4", "--config.mesh.slice=2"], ["mesh.slice=1", "2*v5e:2x4"]),
        (["--topology=v5e:2x4", "--pue=0.5"], ["--pue=0.5", "at least 1"]),
        (["--topology=v5e:2x4", "--power=-3"], ["--power=-3", "positive"]),
        (["--topology=v5e:2x4", "--tokens=0"], ["--tokens=0", "positive"]),
        (["--topology=v5e:2x4", "--best=-1"], ["--best=-1"]),
        (["--topology=v5e:2x4", "--json=nowhere/plan.json"], ["no folder nowhere"]),
        (["--topology=v5e:2x4", "--report=nowhere/plan.html"], ["no folder nowhere"]),
    ],
)
def test_a_mistake_is_refused_in_one_line(config, flags, words):
    """One line that says what to do, and exit code 2."""
    error = call(config, *flags).error
    assert all(word in error for word in words), error


def test_nothing_was_started(config):
    """A plan on a laptop touches no device but the CPU."""
    assert call(config, "--topology=v5e:2x4", "--analytic").code == 0
    assert {d.platform for d in jax.devices()} == {"cpu"}


# ---- what docs/planning.md says


PAGE = (Path(__file__).parents[2] / "docs" / "planning.md").read_text()


def test_the_table_of_chips_is_true():
    for c in (c for c in CHIPS if c.dims):
        figures = [f"{c.flops / 1e12:g}", f"{c.hbm / 2**30:g}", f"{c.hbm_rate / 1e9:,.0f}", f"{c.usable / 2**30:g}"]
        figures += [f"{2 * c.dims} of {c.link / 1e9:g}", f"{c.dcn / 1e9:g}", f"{c.watts:g}" if c.watts else ""]
        assert f"| {' | '.join([c.name, *figures])} |" in PAGE


def test_glam_against_what_was_published():
    """574 hours and 213 MWh lie above what overlaps and close to what does not."""
    pod = topology("v4:8x8x16")
    exp = build(cli.load("configs/papers/glam_64b_64e.py"))
    mesh = side_lengths({"fsdp": 16, "expert": 16, "tensor": 4}, pod)
    exp = variant(exp, "full", mesh=tuple(mesh.items()), zero1=True)
    best, worst = plan(exp, pod, tokens=280e9, analytic=True).runs.values()
    said = [f"{24 * run.days:.0f} h, {run.energy.mwh:.0f} MWh" for run in (best, worst)]
    assert f"574 h, 213 MWh | {' | '.join(said)} |" in PAGE
    assert best.days < 574 / 24 < 1.05 * worst.days
