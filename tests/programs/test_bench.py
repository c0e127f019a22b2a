"""The benchmarks measure what they say, their records are compared, and every program answers. No time is asserted."""

import copy
import dataclasses
import itertools
import json
import sys
import xml.etree.ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import experiments.bench.__main__ as bench
from experiments import cli
from experiments.bench import huggingface, peers, record, stages, steps, timing, watch, work
from experiments.bench.layers import Placement, baseline_inputs, batched_passes, drawn, layer_inputs, layer_passes
from experiments.bench.shapes import QUICK, QUICK_GLU, SHAPES, masks_bytes
from experiments.bench.tokens import ROUTINGS
from experiments.cli import load
from moe_jax.config import build
from moe_jax.core.groups import Dense
from moe_jax.core.kernels.by_expert import size_buckets
from moe_jax.core.routing import position_in_expert
from moe_jax.dispatch import Einsum, Scatter, Sort
from moe_jax.moe import MoEConfig
from tests import programs
from tests.cases import close

TINY = """
from ml_collections import ConfigDict

def get_config():
    config = ConfigDict()
    config.mesh = {{"data": 8}}
    config.model = {{"D": 8, "N": 1, "attention": "MHA(1, 4)", "ffn": "MLP(F=4)", "moe_layers": "all", "remat": "none"}}
    config.model.moe = {{"E": 4, "router": "TopK(K=2)", "experts": "MLP(F=4)", "dispatch": "Scatter(1.5)", "S": 8}}
    config.data = {{"source": "Folder(path={texts!r})", "L": 8, "B": 8}}
    config.run = {{"steps": 2, "log_every": 2, "eval_sequences": 8}}
    return config
"""


# ---- what is measured


@pytest.mark.parametrize("name", ["coarse-k1", "qwen3", "growth-512"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_tokens_are_routed_as_they_say(name, routing):
    """By the router itself, from its logits."""
    shape = dataclasses.replace(SHAPES[name], T=1024)
    tokens, cfg = ROUTINGS[routing](shape), shape.layer(Sort())
    x_GSD = jnp.asarray(tokens.x_TD).reshape(-1, shape.L, shape.D)
    routed = jax.jit(cfg.router)({"gate_DE": jnp.asarray(tokens.gate_DE)}, x_GSD, jnp.ones(x_GSD.shape[:2], bool))
    expert_TK = np.sort(np.asarray(routed.expert_GSK).reshape(shape.T, shape.K))
    same = (expert_TK == np.sort(tokens.expert_TK)).all(1)
    assert same.mean() > (0.999 if routing == "real" else 1 - 1e-9)  # a last choice may be a matter of rounding
    rows_E = np.bincount(expert_TK.ravel(), minlength=shape.E)
    if routing == "balanced":
        assert (tokens.count_GE(shape.L) == shape.L * shape.K / shape.E).all()
        assert tokens.load == 1
    if routing == "skewed":
        assert rows_E[0] == min(shape.T, shape.T * shape.K // 2)
        assert rows_E[1:].max() - rows_E[1:].min() <= 1
    if routing == "real":
        assert 1.1 < tokens.load < 12
        assert tokens.load == pytest.approx(rows_E.max() / rows_E.mean(), rel=0.01)


@pytest.mark.parametrize("shape", [*SHAPES.values(), QUICK_GLU], ids=lambda shape: shape.name)
def test_dense_baselines_have_the_active_flops(shape):
    cfg = shape.layer(Sort())
    active = shape.K * shape.experts.F
    assert (type(shape.dense_baseline), shape.dense_baseline.F) == (type(shape.experts), active)
    assert cfg.losses == MoEConfig(E=8).losses
    assert shape.T % shape.L == 0
    count_GE = np.full((shape.T // shape.L, shape.E), shape.L * shape.K // shape.E)
    flops = work.work(cfg, shape, count_GE, "gpu")["flops"]
    matrices = 3 if "gate_EDF" in shape.experts.params else 2
    assert flops["done"] == flops["useful"] == flops["baseline"] == 2 * matrices * shape.T * shape.D * active


def test_published_ratios():
    assert SHAPES["mixtral"].experts.F / SHAPES["mixtral"].D == 14336 / 4096
    assert SHAPES["qwen3"].experts.F / SHAPES["qwen3"].D == 768 / 2048
    sizes = [(s.T * s.K, s.D, s.experts) for s in SHAPES.values() if s.name.startswith("growth")]
    assert len(sizes) == 3
    assert len(set(sizes)) == 1


def test_dense_baseline_parameters():
    params, x_TD = baseline_inputs(QUICK_GLU, Placement())
    shapes = {name: w.shape for name, w in params.items()}
    assert shapes == {"gate_EDF": (32, 32), "up_EDF": (32, 32), "down_EFD": (32, 32)}
    assert x_TD.shape == (64, 32)
    assert float(drawn({"up_EDF": (4, 64, 64)})["up_EDF"].std()) == pytest.approx(1 / 8, rel=0.05)


def test_matmuls_alone_are_the_experts():
    """Equally many rows for each expert, all of the dense layer's work; each has its own matrices, with gradients."""
    passes, (params, x_ECD) = batched_passes(QUICK_GLU)
    assert x_ECD.shape == (QUICK_GLU.E, QUICK_GLU.T * QUICK_GLU.K // QUICK_GLU.E, QUICK_GLU.D)
    y_ECD = passes.forward.run(params, x_ECD)
    for e in range(QUICK_GLU.E):
        close(y_ECD[e], QUICK_GLU.experts({name: w[e] for name, w in params.items()}, x_ECD[e], Dense()))
    _, (gradients, _) = passes.both.run(params, x_ECD)
    assert all(np.abs(w).max((1, 2)).min() > 0 for w in jax.tree.leaves(jax.device_get(gradients)))


def test_a_layer_drops_what_is_said():
    """Kept choices, by the layer itself; its outputs, its loss, its statistics and its gradients are all there."""
    cfg, tokens = QUICK.layer(Einsum(1.25)), ROUTINGS["skewed"](QUICK)
    inputs = layer_inputs(cfg, QUICK, tokens, Placement())
    passes = layer_passes(cfg, Placement(), *inputs)
    y_BLD, loss, stats = passes.forward.run(*inputs)
    kept = work.work(cfg, QUICK, tokens.count_GE(QUICK.L), "cpu")["kept"]
    assert float(stats.kept) == kept * QUICK.T * QUICK.K < QUICK.T * QUICK.K
    assert float(loss) > 0.02  # all auxiliary losses: balanced routing would have 0.01 of the balancing loss alone
    (value, _), (params, x_BLD) = passes.both.run(*inputs)
    assert float(value) == pytest.approx(float((y_BLD**2).mean() + loss), rel=1e-5)
    assert set(params) == {"router_gate_DE", "up_EDF", "down_EFD"}
    assert x_BLD.shape == (8, 8, 32)


def test_computed_rows_follow_the_dispatcher():
    """Slots where all are computed, rungs where rows lie back to back, and just the rows in a grouped matmul."""
    count_GE, S, D = np.array([[8, 0, 1, 7], [8, 4, 0, 4]]), 8, 2**20  # K=2, four experts, C=5
    layer = lambda dispatch: MoEConfig(E=4, dispatch=dispatch)  # noqa: E731
    done = lambda dispatch, *where: work.rows_done(layer(dispatch), count_GE, S, D, *where)  # noqa: E731
    assert done(Einsum(1.25), "cpu") == done(Scatter(1.25), "gpu") == done(Scatter(1.25), "cpu", True) == 4 * 2 * 5
    assert done(Scatter(None), "gpu") == 4 * 2 * 8
    assert done(Sort(), "gpu") == 32
    rung = lambda n: min(C for C in size_buckets(32, 4, D) if C >= n)  # noqa: E731
    most = size_buckets(32, 4, D)[-1]
    assert 16 <= most
    assert done(Sort(), "cpu") == rung(16) + rung(4) + rung(1) + rung(11)
    assert done(Scatter(1.25), "cpu") == rung(10) + rung(4) + rung(1) + rung(9)
    all_to_one = np.array([[8, 0, 0, 0]] * 2 * most)  # more rows than the largest rung, as ladders go up to 2 R / E
    some = work.rows_done(MoEConfig(E=4, dispatch=Sort()), all_to_one, S, D, "cpu")
    assert 16 * most <= some < 16 * most + size_buckets(32 * most, 4, D)[-1]
    many_GE = 25 * count_GE
    parts = [work.rows_done(layer(Sort()), part, 25 * S, D, "cpu") for part in np.split(many_GE, 2)]
    two_shards = work.rows_done(layer(Sort()), many_GE, 25 * S, D, "cpu", False, 2)
    assert two_shards == sum(parts) != work.rows_done(layer(Sort()), many_GE, 25 * S, D, "cpu")
    assert work.kept(layer(Scatter(1.25)), count_GE, S).tolist() == [[5, 0, 1, 5], [5, 4, 0, 4]]
    assert masks_bytes(QUICK, 3) == 2 * 4 * 64 * 8 * 3


def test_calls_take_turns():
    seen, wait = [], itertools.count()
    calls = [lambda: seen.append("layer"), lambda: seen.append("dense")]
    times = timing.in_turn(calls, 3)
    assert times.shape == (3, 2)
    assert seen == ["layer", "dense", "dense", "layer", "layer", "dense", "dense", "layer"]
    slow = timing.in_turn([lambda: next(wait)], 50, patience=0)
    assert (len(slow), next(wait)) == (timing.LEAST, timing.LEAST + 1), "one turn warms up"


def test_ratios_are_of_pairs():
    found = timing.compare(np.array([[2.0, 1.0], [3.0, 2.0], [40.0, 10.0], [9.0, 3.0], [5.0, 2.0]]))
    assert found["layer_ms"] == [3, 5, 9]
    assert found["dense_ms"] == [2, 2, 3]
    assert found["tau"] == 2.5
    assert found["tau_spread"] == [2, 3]


# ---- the table, the record and the plot


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A table of one tiny layer, by two dispatchers, with its stages."""
    folder = tmp_path_factory.mktemp("bench")
    flags = ["--quick", "--routing=real,skewed", "--dispatch=Einsum(1.25),Sort()", "--stages"]
    outcome = programs.call(bench, *flags, f"--json={folder / 'a.json'}", f"--out={folder / 'a.svg'}")
    assert outcome.code == 0, outcome
    return folder, outcome


def cells_of(text):
    """Cells of Markdown tables."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]


def test_the_table_has_every_measurement(measured):
    cells = cells_of(measured[1].out)
    assert [row[:3] for row in cells[2:6]] == [
        ["quick", routing, f"`{dispatch}`"] for dispatch in ("Einsum(1.25)", "Sort()") for routing in ("real", "skewed")
    ]
    assert {len(row) for row in cells[:6]} == {len(bench.present.HEADS)}
    stages = [row[3:] for row in cells[8:]]
    assert len(stages) == 4
    for route, dispatch, exchange, experts, combine, layer in stages:
        assert exchange == "-"
        assert all(len(cell.split(" / ")) == 2 for cell in (route, dispatch, experts, combine, layer))


def test_the_record_has_every_measurement(measured):
    folder, _ = measured
    saved = record.load(folder / "a.json")
    assert saved["machine"] == record.machine()
    assert len(saved["rows"]) == 4
    for row in saved["rows"]:
        assert row["kept"] < 1 or row["dispatch"] == "Sort()"
        for what in record.PASSES:
            low, high = row[what]["tau_spread"]
            assert 0 < low <= row[what]["tau"] <= high
            assert row[what]["layer_ms"] == sorted(row[what]["layer_ms"])
        assert min(row["temp_bytes"].values()) > 0
        assert len(row["compile_seconds"]["layer"]) == 2
        assert set(row["batched"]) == set(record.PASSES)
    cli.write_json(folder / "again.json", record.facts(saved["rows"]))
    assert record.load(folder / "again.json") == saved
    cli.write_json(folder / "nan.json", record.facts([{**saved["rows"][0], "load": float("nan")}]))
    assert record.load(folder / "nan.json")["rows"][0]["load"] is None


def test_the_plot_names_what_it_shows(measured):
    picture = (measured[0] / "a.svg").read_text()
    xml.etree.ElementTree.fromstring(picture)
    for words in ("Sort()", "Einsum(1.25)", "skewed, forward and backward", "dense baseline"):
        assert words in picture


def test_a_record_is_compared_with(measured):
    """In the program; the layer that ran is the one that is looked for."""
    path = measured[0] / "a.json"
    flags = ["--quick", "--routing=real,balanced", "--dispatch=Einsum(1.25)"]
    outcome = programs.call(bench, *flags, f"--against={path}")
    assert outcome.code == 0, outcome
    assert f"1 of 2 rows are in {path}" in outcome.out.splitlines()[-1]
    assert "another" not in outcome.out


def test_what_has_become_slower_is_told(measured):
    """Six per cent are, four are not; and so is what is faster."""
    old = record.load(measured[0] / "a.json")["rows"]
    new = copy.deepcopy(old)
    for row, factor in zip(new, (1.04, 0.5, 1.0, 1.06), strict=True):
        for what in record.PASSES:
            row[what]["tau"] *= factor
    new[3]["forward"]["tau"] = old[3]["forward"]["tau"]
    (line,) = record.worse(new, old)
    assert line.startswith("slower: quick skewed Sort(), forward and backward: ")
    assert line.endswith("(+6.0%)")
    assert record.worse(new, old[:3]) == [], "what was not measured is not compared"
    assert record.worse(old, new) != [], "the other way round, what was twice as fast"
    here = {"machine": {**record.machine(), "cores": -1}, "rows": old}
    assert "old.json was measured with another cores." in record.against(new, "old.json", here)


@pytest.mark.parametrize("dispatch", bench.DISPATCHERS)
def test_stages_of_every_dispatcher(dispatch):
    """Each alone: sending is not in what combines, and what combines gives weighted sums of the rows that are ready."""
    shape, placement = QUICK, Placement()
    cfg, tokens = shape.layer(bench.DISPATCHERS[dispatch]), ROUTINGS["real"](shape)
    inputs = layer_inputs(cfg, shape, tokens, placement)
    found = stages.measure(cfg, shape, tokens, placement, inputs, 2, {})
    assert set(found) == {"route", "dispatch", "experts", "combine"}
    assert all(q[0] <= q[1] <= q[2] for part in found.values() for q in part.values())

    x_GSD, here = inputs[1].reshape(-1, shape.L, shape.D), placement.here(cfg.exchange)
    routing = jax.jit(stages.router(cfg, here))((inputs[0]["router_gate_DE"], x_GSD))[2]
    rows = jnp.ones_like(stages.precomputed_rows(cfg, here, shape, tokens, placement))
    combine = jax.jit(stages.dispatcher(cfg, here, stages.PrecomputedRows))
    y_GSD = combine((jnp.full_like(x_GSD, jnp.nan), rows, routing.weight_GSK), routing)
    kept_GSK = position_in_expert(routing) < stages.slots(cfg, tokens.count_GE(shape.L), shape.L)
    np.testing.assert_allclose(y_GSD[..., 0], (routing.weight_GSK * kept_GSK).sum(-1), rtol=1e-5)


def test_layers_on_a_mesh():
    flags = ["--quick", "--stages", "--routing=skewed", "--dispatch=Scatter(1.0)", "--mesh=data=2,expert=4"]
    outcome = programs.call(bench, *flags)
    assert outcome.code == 0, outcome
    stages = outcome.out.splitlines()[-1].split("|")[4:9]
    assert "-" not in [cell.strip() for cell in stages], "rows travel"


def bad_records(folder):
    (folder / "text.json").write_text("no json")
    (folder / "other.json").write_text(
        json.dumps({"format": record.FORMAT, "machine": {}, "rows": [{"shape": "fine"}]})
    )
    return folder


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--shapes=mixtrall"], ["--shapes names 'mixtrall'", "did you mean 'mixtral'?"]),
        (["--routing=odd"], ["--routing names 'odd'", "balanced, real, skewed"]),
        (["--dispatch=Sorted"], ["--dispatch names 'Sorted'"]),
        (["--shapes=gpu-a"], ["gpu-a is for a GPU", "growth-512"]),
        (["--repeats=0"], ["--repeats=0 must be at least 1"]),
        (["--mesh=data=two"], ["--mesh=data=two", "write data=2,expert=4"]),
        (["--mesh=rows=2"], ["slice, data, fsdp, expert, tensor"]),
        (["--mesh=data=8", "--dispatch=Sort()", "--quick", "--shapes=fine,"], ["names ''"]),
        (["--json={folder}/none/a.json"], ["there is no folder"]),
        (["--json={folder}"], ["is a folder; give a file"]),
        (["--out={folder}/a.gif"], ["end it in .png or .svg"]),
        (["--against={folder}/none.json"], ["There is no record", "--json has written"]),
        (["--against={folder}/text.json"], ["text.json is not a record"]),
        (["--against={folder}/other.json"], ["other.json is not a record"]),
    ],
)
def test_a_mistake_is_one_line(flags, words, tmp_path):
    folder = bad_records(tmp_path)
    outcome = programs.call(bench, *(flag.format(folder=folder) for flag in flags))
    assert outcome.out == ""
    assert len(outcome.err.splitlines()) == 1
    for word in words:
        assert word in outcome.error


# ---- whole steps


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The flags of an experiment on a few texts."""
    root = tmp_path_factory.mktemp("steps")
    (root / "texts").mkdir()
    for i in range(12):
        (root / "texts" / f"{i}.txt").write_text(f"text number {i}, " * 20)
    (root / "tiny.py").write_text(TINY.format(texts=str(root / "texts")))
    return [f"--config={root / 'tiny.py'}", f"--data_dir={root / 'data'}"]


def test_steps_of_a_config_and_its_dense_baseline(tiny, tmp_path):
    flags = ["--bursts=2", "--burst=1", "--train_steps=0", "--config.model.moe.E=8"]
    outcome = programs.call(steps, *tiny, *flags, f"--json={tmp_path / 'steps.json'}")
    assert outcome.code == 0, outcome
    cells = cells_of(outcome.out)
    assert [row[0] for row in cells] == ["", "---", "config", "baseline"]
    assert cells[3][4] == "1.00"
    assert all(float(row[1].replace(",", "")) > 0 for row in cells[2:])
    found = json.loads((tmp_path / "steps.json").read_text())
    rates = [f"{1e3 * one['tokens'] / one['step_ms'][1]:,.0f}" for one in (found["config"], found["baseline"])]
    assert rates == [row[1] for row in cells[2:]]


def test_a_run_is_watched(tiny, tmp_path):
    """A dense one, which compiles faster."""
    exp = build(load(tiny[0].partition("=")[2]))
    exp = dataclasses.replace(exp, model=exp.model.dense_baseline())
    found = steps.outside(exp, tmp_path / "data", steps=6)
    assert min(found.step, found.checkpoint) > 0
    assert min(found) >= 0
    assert 0 < found.share < 1
    (row,) = cells_of(steps.outside_table({"baseline": found}))[2:]
    assert row[-1] == f"**{found.share:.2%}**"


def test_a_wrong_number_of_steps():
    outcome = programs.call(steps, "--train_steps=3")
    assert "--train_steps=3 must be at least 4, or 0 for no run" in outcome.error


def test_where_the_time_of_a_run_goes():
    """Five steps, of which two warm up: one waits for a batch, then one for a checkpoint, then none."""
    clock = watch.Clock(warm=2)
    clock.given, clock.done = [0.0, 8.0, 11.0, 15.0, 15.5], [8.0, 10.0, 12.0, 16.0, 17.0]
    clock.spent = {"data": [(9.0, 10.5)], "checkpoint": [(12.0, 14.0)], "logging": [(15.1, 15.4)]}
    found = watch.summary(clock, save_every=10)
    assert found.step == pytest.approx(1e3)  # 11 to 12, 15 to 16, 16 to 17
    assert found.data == pytest.approx(500 / 3)  # what is after 10, when nothing is computed
    assert found.logging == 0  # meanwhile a step is
    assert found.checkpoint == pytest.approx(200)  # 2 s in ten steps
    assert found.other == pytest.approx(1500 / 3)  # 10.5 to 11, 14 to 15
    assert found.share == pytest.approx(1 - 1000 / (1000 + 500 / 3 + 200 + 500))


# ---- other libraries


def test_without_the_other_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    outcome = programs.call(peers, "--quick")
    assert outcome.error == "torch is not installed, which this comparison needs: pip install torch transformers"
    assert len(outcome.err.splitlines()) == 1
    assert "--shapes names 'fine'" in programs.call(peers, "--shapes=fine").error, "its experts are not gated"


def test_the_fastest_peer_is_compared_with(monkeypatch):
    """Peers that compute the same are found, one that does not is refused."""
    monkeypatch.setattr(peers, "OURS", {"Einsum(1.25)": Einsum(1.25)})
    monkeypatch.setattr(peers, "median_ms", lambda call: call.ms)
    want = {}

    class Peer:
        def __init__(self, ms):
            self.ms = ms

        def __call__(self):
            return want["y"]

    def make(shape, params, x_BLD):
        assert params["up_EDF"].shape == (shape.E, shape.D, shape.experts.F)
        want["y"] = np.asarray(jax.jit(peers.output, static_argnums=0)(shape.layer(Sort()), params, x_BLD)) + off
        yield "slow", (Peer(3), Peer(4))
        yield "mixed", (Peer(1), Peer(9))

    off = 0.0
    row, dense = peers.compared(QUICK_GLU, "real", make, repeats=2)
    assert dense.ours == "dense baseline"
    assert row.peer == ("mixed", "slow")
    assert "(mixed)" in peers.table([row])
    off = 0.5
    with pytest.raises(ValueError, match="slow computes something else, for 100"):
        peers.compared(QUICK_GLU, "real", make, repeats=2)


def test_weights_lie_as_the_other_library_wants_them():
    """[E, 2F, D] with the gate first and [E, D, F] where experts are fused; [F, D] of each where they are not."""
    torch = pytest.importorskip("torch")
    for name, calls in huggingface.peers(torch, QUICK_GLU, *_weights()):
        assert name
        assert calls[0]().shape == (8, 8, 32)


def _weights():
    params, x_BLD, _ = layer_inputs(QUICK_GLU.layer(Sort()), QUICK_GLU, ROUTINGS["real"](QUICK_GLU), Placement())
    return jax.device_get(params), np.asarray(x_BLD)
