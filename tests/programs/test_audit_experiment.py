"""The audit of a whole experiment: what it finds, what it names when something is broken, what it shrinks."""

import dataclasses
import itertools
import json
import math
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import audit as program
from experiments import cli
from moe_jax import GLU, MLP, Einsum, LMConfig, MoEConfig, Scatter, Sort, Top2, TopK, make_mesh
from moe_jax.attention import MHA
from moe_jax.audit import meshes
from moe_jax.audit.dispatchers import dispatchers, fitting_dispatchers
from moe_jax.audit.placement import placement
from moe_jax.audit.shrink import fold, kinds, narrow, shrink
from moe_jax.audit.single_device import loss_of_parts, microbatch_rows
from moe_jax.config import DataConfig, Experiment, OptimConfig
from moe_jax.core.shard import AXES, Shard, hybrid_device_mesh
from moe_jax.core.stats import Stats
from moe_jax.losses import LoadBalance
from moe_jax.optim import Adafactor, Constant
from moe_jax.step import split_microbatches
from tests import programs
from tests.pages import stands_alone

CONFIGS = sorted(p for p in Path("configs").glob("*.py") if p.stem != "__init__")
CONFIG = """
from ml_collections import ConfigDict

def get_config():
    config = ConfigDict()
    config.mesh = {"data": 2, "expert": 2, "tensor": 2}
    config.model = {
        "D": 8, "N": 2, "attention": "MHA(2, 4, position=Relative())", "ffn": "MLP(F=4)", "remat": "none",
        "moe": {"E": 4, "router": "TopK(K=2)", "experts": "MLP(F=4, bias=True)", "dispatch": "Scatter(1.0)"},
    }
    config.data = {"L": 16, "B": 16}
    return config
"""


EXP = Experiment(
    LMConfig(V=257, D=8, N=2, attention=MHA(8, 4), ffn=GLU(F=8), moe=MoEConfig(E=8, experts=MLP(F=8))),
    DataConfig(L=8, B=16),
    OptimConfig(schedule=Constant(0.1)),
)
call = partial(programs.call, program)


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "tiny.py"
    file.write_text(CONFIG)
    return f"--config={file}"


def test_an_experiment_holds(config, monkeypatch, tmp_path):
    """Every law has its line and its figure, a step's communication is predicted, and the page says the same."""
    monkeypatch.setattr(meshes, "MESHES", ({"fsdp": 2, "expert": 2},))
    monkeypatch.setattr("moe_jax.audit.experiment.TRIAL_TOKENS", 1)
    code, out, err = call(config, f"--report={tmp_path / 'audit.html'}", f"--json={tmp_path / 'audit.json'}")
    assert (code, err) == (0, f"written: {tmp_path / 'audit.json'}\n"), out
    said = dict(re.findall(r"^(\S.*?)  +(yes|no|NO) ", out, re.MULTILINE))
    assert not [law for law, held in said.items() if held == "NO"]
    for law in (
        "one routing, every dispatcher, training",
        "routers are trainable, training",
        "causal means causal, evaluation",
        "padding is nowhere, one device",
        "one model, every mesh, data=2 x expert=2 x tensor=2",
        "one model, every mesh, fsdp=2 x expert=2",
        "replicas are replicas, data=2 x expert=2 x tensor=2",
        "communication, step: all-to-all over expert",
        "communication, forward: all-reduce over tensor",
    ):
        assert said[law] == "yes", law
    assert re.search(r"drops [1-9]\d* of \d+", out), "something was dropped, and the same everywhere"
    record = json.loads((tmp_path / "audit.json").read_text())
    assert record["broken"] == 0
    assert {f"{f['law']}, {f['subject']}": f["holds"] for f in record["findings"]} == {
        law: held == "yes" for law, held in said.items() if not law.startswith("communication, ")
    }
    assert any(row["compiled"]["op"] == "all-to-all" and row["holds"] for row in record["communication"])
    page = stands_alone((tmp_path / "audit.html").read_text())
    assert "0 of" in page.said
    assert not any(page.details.values()), "nothing is broken, so nothing is open"
    opened = " ".join(page.details).lower()
    assert all(law.rpartition(", ")[0] in opened for law in said if "communication" not in law)
    assert re.search(r"6\. Communication is accounted for: holds in all \d+ trials", " ".join(page.details))


def test_what_is_broken_is_named(config, monkeypatch):
    """A bias that every shard of hidden units adds: exit code 1, the mesh, the quantity, and how far off."""
    monkeypatch.setattr(meshes, "MESHES", ())
    monkeypatch.setattr("moe_jax.audit.experiment.TRIAL_TOKENS", 1)
    monkeypatch.setattr(Shard, "bias_once", lambda self, name, w: w)
    monkeypatch.setattr(
        meshes, "sharpen_routers", lambda state: jax.tree.map(lambda x: np.asarray(x) + 0.1, jax.device_get(state))
    )
    code, out, _ = call(config, "--stop")
    assert code == 1
    (line,) = [line for line in out.splitlines() if " NO " in line]
    assert line.startswith("one model, every mesh, data=2 x expert=2 x tensor=2")
    assert "NOT outputs" in line
    assert "communication" not in out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "No experiment was given"),
        (["--config=nothing.py"], "no config file"),
        (["--config=configs/glam_nano.py", "--report=no/where.html"], "there is no folder no"),
        (["--config=configs/glam_nano.py", "--law=12"], "--law=12 is no law; the laws are 1 to 11"),
        (["--config=configs/glam_nano.py", "--law=4", "--law=9"], "--law=9 is not in the audit: It takes two runs"),
        (["--config=configs/glam_nano.py", "--devices=0"], "--devices=0: 0 is not a positive integer"),
    ],
)
def test_mistakes_are_one_line(argv, words):
    code, out, err = call(*argv)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert words in err


def test_one_law_is_tried_alone(config):
    code, out, _ = call(config, "--law=11", "--quick")
    assert code == 0
    assert re.search(r"\n1 findings, 0 broken", out)
    assert re.search(r"documents are apart, the whole model +yes +0 of \d+ tokens changed", out)


@pytest.mark.law(11)
def test_attention_across_documents_is_seen(config, monkeypatch):
    """Law 11: every token sees all before it in its row, as in packing without a mask."""

    def row_mask(sees, window=None):
        L = sees.segment_BL.shape[1]
        return jnp.broadcast_to(jnp.tril(jnp.ones((L, L), bool))[None], (*sees.segment_BL.shape, L))

    monkeypatch.setattr("moe_jax.attention.scores.mask", row_mask)
    code, out, _ = call(config, "--law=11")
    assert code == 1
    assert re.search(r"documents are apart, the whole model +NO +[1-9]\d* of \d+ tokens changed", out)


def test_the_meshes_have_all_pairs_of_axes():
    """On eight devices: every pair of axes shares a mesh, and every axis has more than two shards in one."""
    large = [sizes for sizes in meshes.MESHES if math.prod(sizes.values()) == 8]
    pairs = {frozenset(pair) for sizes in large for pair in itertools.combinations(sizes, 2)}
    assert pairs == set(map(frozenset, itertools.combinations(AXES, 2)))
    assert all(max(sizes.get(axis, 1) for sizes in large) > 2 for axis in AXES)
    tiny = dataclasses.replace(EXP, mesh=(("data", 2), ("expert", 4)))
    names = [name for name, _ in meshes.meshes(tiny, jax.devices())]
    assert names[0] == "data=2 x expert=4"
    assert len(names) == len(set(names))
    assert not {"expert=4", "expert=2", "tensor=2", "fsdp=2 x tensor=2"} & set(names), "others have these axes"
    assert [n for n, _ in meshes.meshes(dataclasses.replace(EXP, mesh=()), jax.devices()[:2])] == [
        "expert=2",
        "tensor=2",
    ]


# ---- comparing


def test_losses_of_microbatches_are_told():
    """Their rows are those of a step's microbatches; the mean over them by tokens stands beside the batch's value."""
    model = LMConfig(V=257, D=8, N=1, attention=MHA(1, 4), moe=MoEConfig(E=2, router=TopK(K=2)), moe_layers="all")
    exp = Experiment(model=model, data=DataConfig(L=8, B=6, microbatches=3))
    split_AB = split_microbatches(3, jax.numpy.arange(6))
    assert [np.flatnonzero(rows_B1).tolist() for rows_B1 in microbatch_rows(exp)] == split_AB.tolist()
    shapes = ((1,), (1,), *[(1, 2)] * 5, (1,), (1,), (1,), (1,), (1, 1), (1, 1, 2), (1, 1))
    nothing = Stats(*(np.zeros(shape, np.float32) for shape in shapes))
    collapsed, balanced, whole = (
        nothing._replace(tokens=np.array([n]), choices_E=2 * np.array([[n - b, b]]), probs_E=np.array([[n - b, b]]))
        for n, b in ((30.0, 0.0), (10.0, 5.0), (40.0, 5.0))
    )
    # (30 * 2 + 10 * 1) / 40; 2 * ((35 / 40)^2 + (5 / 40)^2)
    assert loss_of_parts(LoadBalance(), exp, whole, [collapsed, balanced, nothing]) == "LoadBalance 1.75 for 1.562"


def test_the_worst_difference_is_named():
    """Relative to the largest number of an array; NaN and infinity on one side only are as bad as can be."""
    one = {"a": np.array([1.0, 100.0]), "b": {"c": np.array([2.0, np.nan])}}
    assert meshes.worst(one, one).error == 0
    found = meshes.worst(one, {"a": np.array([1.0, 101.0]), "b": {"c": np.array([2.1, np.nan])}})
    assert found.where == "b/c"
    np.testing.assert_allclose(found.error, 0.05)
    for bad in (np.nan, np.inf):
        assert meshes.worst(one, {**one, "a": np.array([bad, 100.0])}).error > 1e300
    assert not meshes.at_most(1e-5, meshes.Worst(math.inf, "b/c")).holds
    assert "in b/c" in meshes.at_most(1e-5, meshes.Worst(1.0, "b/c")).detail


class Forgetful(Scatter):
    """A dispatcher that loses the first token of every group."""

    def __call__(self, x_GSD, *rest):
        y_GSD, kept = super().__call__(x_GSD, *rest)
        return y_GSD.at[:, 0].set(0), kept


class Silent(Scatter):
    """One that does not say what it drops."""

    def __call__(self, x_GSD, *rest):
        y_GSD, kept = super().__call__(x_GSD, *rest)
        return y_GSD, kept | True


@pytest.mark.parametrize(("other", "words"), [(Forgetful, "other outputs than"), (Silent, "drops others than")])
def test_a_dispatcher_that_differs_is_named(monkeypatch, other, words):
    cfg = MoEConfig(E=4, router=TopK(K=2), experts=MLP(F=4), dispatch=Scatter(0.5))
    holds, detail = dispatchers(cfg)
    assert holds
    assert re.fullmatch(r"Einsum\(\), Scatter\(\); [1-9]\d* of 128 choices dropped", detail)
    monkeypatch.setattr("moe_jax.audit.dispatchers.Scatter", other)
    holds, detail = dispatchers(cfg)
    assert not holds
    assert f"{other.__name__}() " in detail
    assert words in detail


def test_all_dispatchers_that_fit_are_compared():
    cfg = MoEConfig(E=4, router=Top2(), dispatch=Sort())
    assert [type(d).__name__ for d in fitting_dispatchers(cfg)] == ["Einsum", "Scatter", "Sort"]
    limited = dataclasses.replace(cfg, dispatch=Scatter(2.0, "probability", "vmoe"))
    assert fitting_dispatchers(limited) == [Einsum(2.0, "probability", "vmoe"), Scatter(2.0, "probability", "vmoe")]


# ---- shrinking, placing


@pytest.mark.parametrize("file", CONFIGS, ids=lambda p: p.stem)
def test_every_config_can_be_shrunk(file):
    """To eight devices, with its routing, its kinds of layers and its rules as they are, and small."""
    from moe_jax.config import build

    exp = build(cli.load(str(file)))
    small, said = shrink(exp, 8)
    assert math.prod(n for _, n in small.mesh) <= 8
    assert kinds(small.model) == kinds(narrow(exp.model, exp.data.shapes(1), small.data.shapes(1)))
    assert small.optim.optimizer == exp.optim.optimizer
    if exp.model.n_moe_layers:
        mine, theirs = small.model.moe, exp.model.moe
        assert (mine.E, mine.router, mine.dispatch, mine.losses) == (
            theirs.E,
            theirs.router,
            theirs.dispatch,
            theirs.losses,
        )
    assert small.model.D * small.model.V <= 2**14
    assert len(said) == len(set(said)) > 3
    assert list(meshes.meshes(small, jax.devices())), "there is a mesh to try it on"


@pytest.mark.parametrize(
    ("mesh", "devices", "folded"),
    [
        ({"data": 2, "expert": 4}, 8, {"data": 2, "expert": 4}),
        ({"data": 4, "expert": 64}, 8, {"data": 2, "expert": 4}),
        ({"data": -1, "expert": 4}, 8, {"data": 2, "expert": 4}),
        ({"data": 3, "expert": 4}, 8, {"data": 3, "expert": 2}),
        ({"fsdp": 8, "tensor": 8}, 4, {"fsdp": 2, "tensor": 2}),
    ],
)
def test_a_mesh_is_folded_onto_fewer_devices(mesh, devices, folded):
    assert fold(mesh, devices) == folded


MODEL = LMConfig(
    V=257,
    D=16,
    N=2,
    attention=MHA(2, 4),
    ffn=GLU(F=8),
    moe=MoEConfig(E=8, experts=MLP(F=8, bias=True)),
    moe_layers="every 2",
)


@pytest.mark.parametrize(
    ("mesh", "optim", "name", "mine", "beside"),
    [  # bytes on a device: float32, two moments beside (AdamW)
        ({"data": 8}, OptimConfig(), "up_EDF", 8 * 16 * 8 * 4, 2 * 8 * 16 * 8 * 4),
        ({"expert": 4, "data": 2}, OptimConfig(), "up_EDF", 2 * 16 * 8 * 4, 2 * 2 * 16 * 8 * 4),
        ({"expert": 4, "data": 2}, OptimConfig(zero1=True), "up_EDF", 2 * 16 * 8 * 4, 2 * 2 * 8 * 8 * 4),
        ({"expert": 4, "data": 2}, OptimConfig(zero1=True), "up_DF", 16 * 8 * 4, 2 * 2 * 8 * 4),
        ({"expert": 2, "fsdp": 2, "tensor": 2}, OptimConfig(), "up_EDF", 4 * 8 * 4 * 4, 2 * 4 * 8 * 4 * 4),
        ({"fsdp": 8}, OptimConfig(), "scale_D", 16 * 4, 2 * 16 * 4),
        ({"expert": 8}, OptimConfig(), "gate_DE", 16 * 8 * 4, 2 * 16 * 8 * 4),
        # row and column sums of [8, 16, 8], without the longest and the second longest axis, and a placeholder
        ({"data": 8}, OptimConfig(Adafactor(smallest=4)), "up_EDF", 8 * 16 * 8 * 4, (8 * 8 + 8 * 16 + 1) * 4),
        ({"expert": 4}, OptimConfig(Adafactor(smallest=4)), "up_EDF", 2 * 16 * 8 * 4, (2 * 8 + 2 * 16 + 1) * 4),
    ],
)
def test_what_a_device_holds(mesh, optim, name, mine, beside):
    optim = dataclasses.replace(optim, schedule=Constant(0.1))
    placed = placement(Experiment(MODEL, DataConfig(L=8, B=16), optim, mesh=tuple(mesh.items())))
    (found,) = {(p.device_bytes, p.optimizer_bytes) for p in placed if p.name.endswith(name)} - {None}
    assert found == (mine, beside)


def test_the_table_of_placement(config):
    code, out, _ = call(config, "--placement")
    assert code == 0
    assert re.search(r"stack_0/moe_1/up_EDF +1x4x8x4 +-, expert, -, tensor +128 +256\n", out)
    total = [int(n.replace(",", "")) for n in out.splitlines()[-1].split()[-2:]]
    rows = [line.split()[-2:] for line in out.splitlines()[1:-1]]
    assert total == [sum(int(row[i].replace(",", "")) for row in rows) for i in (0, 1)]


# ---- slices


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device of a pod of several slices."""

    id: int
    slice_index: int
    platform: str = "a pod"
    process_index: int = 0
    device_kind: str = "chip"


def test_a_mesh_over_slices():
    """The first axis goes over slices, whatever the order of devices; another size is refused."""
    pod = [Chip(i, i % 2) for i in range(8)]
    grid = hybrid_device_mesh(pod, (2, 1, 1, 4, 1))
    assert grid.shape == (2, 1, 1, 4, 1)
    assert [[d.slice_index for d in part.flat] for part in grid] == [[0] * 4, [1] * 4]
    with pytest.raises(ValueError, match=r"mesh.slice=1, but the devices are in 2 slices; set mesh.slice=2"):
        make_mesh(pod, data=2, expert=4)
