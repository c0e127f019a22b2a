"""Law 6: what compiled programs send is what their configs predict, byte for byte.

Tests turn LLVM's optimizations off; those of XLA that combine, move and drop collectives run all the same.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from moe_jax import step as steps
from moe_jax.attention import MHA, MLA, NoPE, Relative, Rotary
from moe_jax.audit.communication import audit, compare_collectives
from moe_jax.audit.hlo import collectives
from moe_jax.config import DataConfig, Experiment, OptimConfig, RunConfig
from moe_jax.core.shard import TOKEN_AXES
from moe_jax.core.traffic import Collective, scheduled
from moe_jax.costs.communication import layer, merged, passes, step
from moe_jax.data import Classification, Digits, SpanCorruption, cross_entropy, terms
from moe_jax.dispatch import Einsum, Gather, Scatter, Sort
from moe_jax.exchanges import EXCHANGES, AllGather, AllToAll, RaggedAllToAll, TwoLevel
from moe_jax.experts import GLU, MLP
from moe_jax.models import EncoderDecoderConfig, LMConfig, ViTConfig
from moe_jax.moe import MoE, MoEConfig
from moe_jax.optim import Adafactor, Constant
from moe_jax.routers import ExpertChoice, RoundRobin, Top2
from tests import cases
from tests.cases import LAYERS, context, mesh_of, shapes_of, sizes_of

pytestmark = pytest.mark.law(6)

# ---------------------------------------------------------------- a layer alone


def wrong(predicted, compiled) -> list[str]:
    """Lists differences: bytes, and the number of collectives where XLA does not combine them."""
    rows = compare_collectives(predicted, compiled)
    counts = [(r.predicted, r.compiled) for r in rows if r.predicted.op != "all-reduce"]
    return [r.detail for r in rows if not r.holds] + [str(pair) for pair in counts if pair[0].count != pair[1].count]


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("einsum", "d8"),
        ("scatter", "f2e2t2"),
        ("dropless", "f2e2t2"),
        ("sort", "d2e4"),
        ("hash", "s2e2t2"),
        ("random", "s2e4"),
        ("top_p", "d2e4"),
        ("depths", "d2f2t2"),
        ("soft", "f2e2t2"),
    ],
)
def test_a_layer_sends_what_is_predicted(name, mesh):
    """A training step of every dispatcher and every exchange; outside of the layer the task's loss is added up."""
    text, sizes = cases.compiled(name, mesh)[1], sizes_of(mesh)
    tokens = tuple(a for a in TOKEN_AXES if a in sizes)
    task = Collective("all-reduce", tokens, math.prod(sizes[a] for a in tokens), 1, 4, "task")
    predicted = layer(LAYERS[name], sizes, cases.B, cases.L, cases.D)
    assert wrong([*predicted, task], collectives(text, mesh_of(mesh))) == []


def slots(name: str) -> int:
    """Numbers in the buffer [E, G*C, D] that one all-to-all moves on d2e4, by hand."""
    G, C = {"scatter": (1, 2), "expert_choice": (2, 2), "soft": (2, 2), "sinkhorn": (2, 2)}[name]
    return LAYERS[name].E * G * C * cases.D


@pytest.mark.parametrize("name", ["scatter", "sinkhorn", "expert_choice", "soft"])
def test_forward_of_a_layer(name):
    """Two all-to-alls, one all-reduce of the statistics, and nothing else: counted by hand."""
    cfg, mesh = LAYERS[name], "d2e4"
    tokens, everywhere = jax.P(("data", "expert")), jax.P()
    f = lambda p, x, m, k, s: MoE(cfg).apply({"params": p}, x, m, k, s)  # noqa: E731
    x, mask = jnp.zeros((cases.B, cases.L, cases.D)), jnp.ones((cases.B, cases.L), bool)
    with context(mesh):
        layout = {n: jax.P("expert") if n in cfg.experts.params else everywhere for n in shapes_of(cfg)}
        apply = jax.jit(f, in_shardings=(layout, tokens, tokens, everywhere, everywhere))
        text = apply.lower(shapes_of(cfg), x, mask, jax.random.key(0), cfg.init_state()).compile().as_text()
    potentials = cfg.E if name == "sinkhorn" else 0
    statistics = 4 * (5 * cfg.E + 6 + cfg.tasks * (cfg.E + 2) + potentials)
    by_hand = [
        Collective("all-reduce", ("data", "expert"), 8, 1, statistics),
        Collective("all-to-all", ("expert",), 4, 2, 2 * 4 * slots(name)),
    ]
    assert merged(collectives(text, mesh_of(mesh))) == by_hand
    assert merged(layer(cfg, sizes_of(mesh), cases.B, cases.L, cases.D, backward=False)) == by_hand


# ---------------------------------------------------------------- a whole train step

MOE = MoEConfig(E=8, router=Top2(), experts=MLP(F=8), dispatch=Scatter(1.25))
BIASES = dataclasses.replace(MOE, experts=MLP(F=8, bias=True), shared=MLP(F=4, bias=True))
MODEL = LMConfig(V=257, D=8, N=4, attention=MHA(4, 4), ffn=GLU(F=8, activation="gelu"), moe=MOE, remat="none")
OPTIM = OptimConfig(schedule=Constant(0.01))
MEANS = Adafactor(smallest=2)
B, L = 16, 8
DATA = DataConfig(L=L, B=B)


def moe(base: MoEConfig = MOE, **changes) -> MoEConfig:
    return dataclasses.replace(base, **changes)


def experiment(
    mesh: str,
    microbatches: int = 1,
    optim: OptimConfig = OPTIM,
    kind: type = LMConfig,
    data: DataConfig = DATA,
    **model,
) -> Experiment:
    fields = {**vars(MODEL), **data.sizes, **model}
    if kind is ViTConfig:
        fields |= {"attention": MHA(4, 4, position=NoPE(), bias=True), "causal": False}
    return Experiment(
        model=kind(**{name: value for name, value in fields.items() if name in kind.__dataclass_fields__}),
        data=dataclasses.replace(data, microbatches=microbatches),
        optim=optim,
        run=RunConfig(steps=6),
        mesh=tuple(sizes_of(mesh).items()),
    )


def optimizer(**changes) -> OptimConfig:
    return dataclasses.replace(OPTIM, **changes)


SLICES = ("slice", "expert")
ONE, TWO = {"moe_layers": "all", "N": 1}, {"moe_layers": "all", "N": 2}  # the smallest model, and one that is a loop
EXPERIMENTS = {
    "interleaved": experiment("d2e4"),
    "save_collectives": experiment(
        "d2e4", remat="save_collectives", optim=optimizer(zero1=True), moe=moe(exchange=AllToAll(chunks=2)), **TWO
    ),
    "full": experiment("d2e4", remat="full", moe=moe(dispatch=Einsum(1.25)), **TWO),
    "biases": experiment(
        "f2e2t2", remat="save_collectives", moe=BIASES, attention=MHA(4, 4, position=Relative()), **TWO
    ),
    "pieces": experiment(
        "f2e2t2", microbatches=2, remat="full", moe=BIASES, ffn=MLP(F=8, bias=True), dtype="bfloat16", tied=False
    ),
    "levels": experiment("s2e2t2", remat="full", moe=moe(exchange=TwoLevel()), **ONE),
    "weights": experiment(
        "f2e2t2",
        microbatches=2,
        remat="full",
        moe=moe(BIASES, exchange=AllGather()),
        optim=optimizer(optimizer=MEANS),
        **ONE,
    ),
    "branches": experiment(
        "s2e4", remat="full", moe=moe(dispatch=Scatter(None), exchange=AllGather(over=SLICES)), **ONE
    ),
    "rows": experiment("t4e2", remat="save_collectives", moe=moe(dispatch=Sort(), exchange=RaggedAllToAll()), **ONE),
    "ids": experiment(
        "d2e4",
        remat="full",
        moe_layers="0,2,3",
        moe=MoEConfig(E=4, router=RoundRobin(), experts=MLP(F=8), dispatch=Scatter(None), losses=()),
    ),
    "slots": experiment("e4t2", remat="full", moe=moe(router=ExpertChoice(), dispatch=Gather()), causal=False, **TWO),
    "sharded": experiment("s2d2f2", optim=optimizer(optimizer=MEANS, zero1=True, clip=None), **ONE),
    "dense": experiment("f8", remat="full", moe_layers="none", moe=None, N=2),
    "data": experiment("d8", moe_layers="none", moe=None, N=1),
    "pairs": experiment(
        "f2e2t2",
        kind=EncoderDecoderConfig,
        data=DataConfig(L=L, B=B, objective=SpanCorruption(sentinels=7)),
        remat="save_collectives",
        moe_layers="every 2",
        attention=MHA(4, 4, position=Relative(shared=True)),
        tied=False,
        dense_after_moe=GLU(F=8),
    ),
    "images": experiment(
        "f2e2t2",
        kind=ViTConfig,
        data=DataConfig(source=Digits(), L=1, B=B, objective=Classification()),
        remat="full",
        image=Digits.image,
        patch=4,
        representation=True,
        moe=BIASES,
        **TWO,
    ),
    "latents": experiment(
        "d2t2f2",
        remat="save_collectives",
        attention=(MLA(4, A=4, U=2, O=6, W=8, Q=6), MLA(4, A=4, U=2, O=4, W=4, gate="head")),
        **TWO,
    ),
    "heads": experiment(
        "d2t2f2",
        remat="full",
        attention=(
            MHA(4, 4, J=2, qk_norm="head", window=3, position=Rotary(base=1e6)),
            MHA(4, 4, sinks=True, gate="head"),
        ),
        **TWO,
    ),
}


def sent(exp: Experiment) -> list[Collective]:
    """By the program of this experiment's train step."""
    program = steps.Program(exp)
    return collectives(program.lower(exp.data.shapes()).compile().as_text(), program.mesh)


@functools.cache
def compiled(name: str) -> list[Collective]:
    return sent(EXPERIMENTS[name])


def predicted(name: str, platform: str = "cpu") -> list[Collective]:
    return step(EXPERIMENTS[name], dict(EXPERIMENTS[name].mesh), platform)


LONG = ("branches", "heads", "ids", "images", "latents", "sharded")  # programs that no other test looks at


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.matrix] if n in LONG else []) for n in EXPERIMENTS]
)
def test_a_training_step_sends_what_is_predicted(name):
    assert wrong(predicted(name), compiled(name)) == []


@pytest.mark.parametrize(("name", "each"), [("interleaved", 4), ("save_collectives", 4 * 2), ("full", 6)])
def test_all_to_alls(name, each):
    """Two there and back, two for gradients, two if they are computed again; twice as many in two chunks."""
    found = merged(c for c in compiled(name) if c.op == "all-to-all")
    assert [(c.axes, c.count) for c in found] == [(("expert",), each * EXPERIMENTS[name].model.n_moe_layers)]


def test_tensor_parallelism_is_one_all_reduce_each_way():
    """Every attention, dense and MoE layer all-reduces [B, L, D]; the MoE weights [B, L, K] come with the second."""
    sums = [c for c in compiled("biases") if c.axes == ("tensor",) and not c.where.startswith("reduce_sum")]
    x, weights, biases = (
        4 * B // 4 * L * 8,
        4 * B // 4 * L * 2,
        4 * 8 * (4 + 1),
    )  # of a shard's experts, and of a shared one
    forward = [c for c in sums if "backward" not in c.where]
    assert [c.bytes // c.count for c in forward] == [x, x]
    assert sum(c.count for c in forward) == 4  # attention, then MoE, in two layers
    assert sum(c.bytes for c in sums) == 2 * (2 * 2 * x + weights + biases)


def test_neither_tokens_nor_logits_are_gathered():
    """Weights alone are: over fsdp, by an exchange that is made of it, or after an update (ZeRO-1)."""
    for name in ("interleaved", "full", "levels", "slots", "data"):
        assert [c for c in compiled(name) if c.op in ("all-gather", "collective-permute")] == []
    for name in ("biases", "pieces", "dense"):
        assert {c.axes for c in compiled(name) if c.op == "all-gather"} == {("fsdp",)}


def test_every_term_is_tried():
    where = {c.where.removesuffix(", again") for name in EXPERIMENTS for c in predicted(name)}
    assert where == {
        *("exchange of MoE layers", "largest load of an expert", "routing statistics", "losses", "tensor parallelism"),
        *("fsdp gather of weights", "fsdp scatter of gradients", "gradients", "gradient norm", "Adafactor's means"),
        *("ZeRO-1 scatter of gradients", "ZeRO-1 gather of parameters"),
    }
    assert {type(e.exchange) for e in EXPERIMENTS.values()} == set(EXCHANGES)


def test_other_platforms():
    """bfloat16 travels as such, and ragged rows are not sent to everybody."""

    def moved(name: str, op: str, axes: tuple[str, ...], platform: str) -> int:
        return sum(c.bytes for c in predicted(name, platform) if (c.op, c.axes) == (op, axes))

    embedding = 4 * 257 * 8  # in float32, but where XLA for TPU changes its type before it travels
    cpu, gpu, tpu = (moved("pieces", "all-gather", ("fsdp",), platform) for platform in ("cpu", "gpu", "tpu"))
    assert cpu - embedding == 2 * (gpu - embedding) > 0
    assert cpu == 2 * tpu
    R, X, D, E = B // 2 * L * 2, 2, 8, 8
    assert moved("rows", "ragged-all-to-all", ("expert",), "tpu") == 4 * D * 2 * (X * R + R)
    assert moved("rows", "all-gather", ("expert",), "tpu") == 2 * 4 * X * E  # how many rows, and once more
    assert moved("rows", "ragged-all-to-all", ("expert",), "gpu") == 0


# ---------------------------------------------------------------- the audit


def test_the_audit_counts_pass_by_pass():
    """Pass by pass."""
    rows = audit(experiment("d2e4", remat="full", optim=optimizer(zero1=True), **ONE))
    assert [r.detail for r in rows if not r.holds] == []
    rows_there_and_back = {r.part: r.compiled.count for r in rows if r.compiled.op == "all-to-all"}
    assert rows_there_and_back == {"forward": 2, "backward": 4, "step": 6}


def test_a_wrong_collective_is_found(monkeypatch):
    """Logits that are gathered."""

    def gathers(logits_BLV, target_BL, honest=cross_entropy):
        everybody = lax.all_gather(logits_BLV, "data", tiled=True)
        return honest(logits_BLV + 0 * everybody.sum(), target_BL)

    monkeypatch.setattr(terms, "cross_entropy", gathers)
    details = [r.detail for r in compare_collectives(predicted("data"), sent(EXPERIMENTS["data"])) if not r.holds]
    assert any(d.startswith(f"all-gather over data: {4 * B * L * 257} bytes that nothing predicts") for d in details)


def collective(op="all-reduce", bytes=8, where="here", axes=("data",)) -> Collective:
    return Collective(op, axes, 2, 1, bytes, where)


@pytest.mark.parametrize(
    ("predicted", "compiled", "detail"),
    [
        ([collective(), collective()], [collective(bytes=16)], ""),
        ([], [collective(axes=())], ""),
        ([collective(where="losses")], [], "8 bytes are predicted for losses, and the program has none"),
        ([], [collective(where="LM")], "8 bytes that nothing predicts, at LM"),
        ([collective()], [collective(bytes=4)], "8 bytes are predicted for here, and the program has 4, at here"),
        ([collective()], [collective(), collective(axes=("fsdp",))], "all-reduce over fsdp: 8 bytes that nothing"),
        ([collective(axes=("data", "fsdp"))], [], "all-reduce over data x fsdp: "),
    ],
)
def test_a_difference_is_named(predicted, compiled, detail):
    rows = compare_collectives(predicted, compiled)
    details = [r.detail for r in rows if not r.holds]
    assert len(details) == bool(detail)
    assert all(detail in d for d in details)


def test_an_exchange_predicts_itself():
    """One that is written elsewhere is counted by its own method, with the rows that it is given."""

    @dataclasses.dataclass(frozen=True)
    class Pigeons(AllToAll):
        def traffic(self, part, rows, experts):
            assert rows.rows == 8 * rows.slots  # of 8 experts
            return scheduled(part.one("collective-permute", part.here.experts, rows.rows, "pigeons"))

    found = layer(moe(exchange=Pigeons()), {"expert": 2}, B, L, 8)
    (flight,) = [c for c in found if c.where == "pigeons"]
    assert (flight.op, flight.axes, flight.size, flight.count) == ("collective-permute", ("expert",), 2, 1)
    assert not [c for c in found if c.op == "all-to-all"]


def test_passes_add_up():
    exp = EXPERIMENTS["pieces"]
    sizes = dict(exp.mesh)
    assert merged(c for part in passes(exp, sizes) for c in part) == merged(step(exp, sizes))
    assert step(exp, dict.fromkeys(sizes, 1)) == []
