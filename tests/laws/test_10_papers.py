"""Published models have the parameters of their papers: by arithmetic, and in the arrays that the models make."""

import functools
import pathlib
import re
import runpy

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.attention import MHA, MLA, NoPE, Relative, Rotary, Sinusoidal
from moe_jax.config import DataConfig, Experiment, build
from moe_jax.costs import PARAMETER_KINDS, flops, parameters
from moe_jax.data import Classification, Digits, SpanCorruption, ToyTranslation, Translation
from moe_jax.data.tokenizers import SentencePiece
from moe_jax.dispatch import Einsum, Scatter
from moe_jax.experts import GLU, MLP
from moe_jax.models import EncoderDecoderConfig, LMConfig, TransformerConfig, ViTConfig
from moe_jax.moe import MoEConfig
from moe_jax.routers import Hierarchical, LossFree, NoisyTopK, Switch, TaskTopK, TopK

pytestmark = pytest.mark.law(10)

PAPERS = {p.stem: p for p in sorted(pathlib.Path("configs/papers").glob("[!_]*.py"))}
UNITS = {"M": 1e6, "B": 1e9, "T": 1e12}

# Total and active parameters, computed from the papers' hyper-parameters with pencil and paper's formulas.
EXACT = {
    "switch_base": (7_415_217_408, 224_083_200),
    "switch_large": (26_309_291_008, 740_813_824),
    "switch_xxl": (394_675_073_024, 11_147_915_264),
    "switch_c": (1_571_375_798_688, 1_795_152_288),
    "st_moe_32b": (269_104_613_376, 35_062_450_176),
    "gshard_2048e_36l": (619_399_180_288, 1_527_869_440),
    "glam_0_1b_64e": (1_907_612_928, 152_296_704),
    "glam_1_7b_64e": (26_843_658_240, 1_879_160_832),
    "glam_8b_64e": (142_943_227_904, 9_799_241_728),
    "glam_64b_64e": (1_161_756_418_048, 96_604_528_640),
    "glam_137b": (137_702_416_384, 137_702_416_384),  # lingvo prints this one
    "mixtral_8x7b": (46_702_792_704, 12_879_925_248),
    "mixtral_8x22b": (140_630_071_296, 39_161_468_928),
    "olmoe_1b_7b": (6_919_161_856, 1_282_017_280),
    "qwen3_30b_a3b": (30_532_122_624, 3_353_032_704),
    "qwen3_235b_a22b": (235_093_634_560, 22_190_763_520),
    "deepseekmoe_16b": (16_375_728_128, 2_828_650_496),
    "vmoe_h_14": (7_160_836_211, 866_308_211),
    "vmoe_b_16": (978_974_835, 128_937_075),
}
# By kind, where a table of the parts is easily got wrong.
PARTS = {
    "switch_base": {
        **{"attention": 84_934_656, "dense": 56_623_104, "experts": 7_247_757_312, "router": 1_179_648},
        **{"embedding": 24_674_304, "norm": 47_616, "position": 768, "head": 0, "shared": 0},
    },
    "st_moe_32b": {
        **{"attention": 12_079_595_520, "dense": 15_099_494_400, "experts": 241_591_910_400, "router": 3_932_160},
        **{"embedding": 164_495_360, "norm": 686_080, "position": 4096, "head": 164_495_360, "shared": 0},
    },
    "deepseekmoe_16b": {
        **{"attention": 469_762_048, "dense": 67_239_936, "experts": 14_948_499_456, "router": 3_538_944},
        **{"embedding": 209_715_200, "norm": 116_736, "position": 0, "head": 209_715_200, "shared": 467_140_608},
    },
    "vmoe_h_14": {
        **{"attention": 209_879_040, "dense": 209_817_600, "experts": 6_714_163_200, "router": 655_360, "shared": 0},
        **{"embedding": 753_920 + 1280, "norm": 166_400, "position": 328_960, "head": 1_639_680 + 23_430_771},
    },
}


@functools.cache
def module(name: str) -> dict:
    return runpy.run_path(str(PAPERS[name]))


@functools.cache
def experiment(name: str, shape: str = "") -> Experiment:
    return build(module(name)["get_config"](shape))


def made(model: TransformerConfig, data: DataConfig) -> int:
    """Numbers in the arrays that a model is initialised with; none is made."""
    tree = jax.eval_shape(model.init, jax.random.key(0), data.shapes(1))
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def printed(count: int, published: str) -> str:
    """A count as it is published: with as many digits, in its unit."""
    digits, unit = re.fullmatch(r"([\d.]+)([MBT])", published).groups()
    return f"{count / UNITS[unit]:.{len(digits.partition('.')[2])}f}{unit}"


@pytest.mark.parametrize("name", PAPERS)
def test_what_is_counted_is_made(name):
    exp = experiment(name)
    assert parameters(exp.model).total == made(exp.model, exp.data)


@pytest.mark.parametrize("name", EXACT)
def test_parameters_are_counted_exactly(name):
    count = parameters(experiment(name).model)
    assert (count.total, count.active) == EXACT[name]


@pytest.mark.parametrize("name", PARTS)
def test_parameters_of_each_kind_are_counted(name):
    count = parameters(experiment(name).model)
    assert {kind: n.total for kind, n in count.kinds.items()} == PARTS[name]


@pytest.mark.parametrize("name", PAPERS)
def test_parameters_are_the_published(name):
    """The count is printed as its source prints it, or the config says why not; and then it is true."""
    published, count = module(name)["PUBLISHED"], parameters(experiment(name).model)
    assert published["source"]
    differs = published.get("differs", {})
    for what in ("total", "active"):
        if what in published:
            same = printed(getattr(count, what), published[what]) == published[what]
            assert same != (what in differs), f"{what}: {getattr(count, what):,} for {published[what]}"
    assert set(differs) <= set(published)


def test_v_moe_last():
    """The other layouts of V-MoE's table: the last layers of the odd ones."""
    make = runpy.run_path("configs/papers/_vit.py")["vmoe"]
    told = {("B", 16, "9,11"): 393.3e6, ("L", 16, "21,23"): 843.6e6, ("H", 14, "23,25,27,29,31"): 2689e6}
    for (size, patch, layout), total in told.items():
        count = parameters(build(make(size, patch, 0.001, moe_layers=layout)).model)
        assert abs(count.total / total - 1) < 2e-4


@pytest.mark.parametrize("name", PAPERS)
def test_nano_is_the_same_kind_of_model(name):
    """Components, layout and forms are kept; only sizes change, and how many slots there are."""
    exp, small = experiment(name), experiment(name, "nano")
    assert type(exp.model) is type(small.model)
    assert parameters(small.model).total < 2_000_000
    for field in ("tied", "causal", "moe_layers") if exp.model.moe_layers.startswith("every") else ("tied", "causal"):
        assert getattr(small.model, field) == getattr(exp.model, field)
    assert names(small.model) == names(exp.model)
    for mine, theirs in zip(small.model.attention, exp.model.attention, strict=True):
        assert (mine.position, mine.qk_norm, mine.bias) == (theirs.position, theirs.qk_norm, theirs.bias)
        assert (mine.J is None) == (theirs.J is None)
    moe = exp.model.moe
    if exp.model.routed is not None:
        assert small.model.moe.router == moe.router
        assert small.model.moe.losses == moe.losses
        assert type(small.model.moe.dispatch) is type(moe.dispatch)
        assert (small.model.moe.shared is None) == (moe.shared is None)


def names(model) -> set[tuple[str, ...]]:
    """The kinds of layers of a model, by the names of their parts."""
    return {tuple(sub.name for sub in model.sublayers(stack, i)) for stack in model.stacks() for i in range(model.N)}


def test_an_unknown_shape_is_refused():
    with pytest.raises(ValueError, match="use nano"):
        module("mixtral_8x7b")["get_config"]("micro")


# ---- the arithmetic, on any model

EXPERTS_ = st.builds(lambda glu, F: GLU(F=F) if glu else MLP(F=F, bias=bool(F % 2)), st.booleans(), st.integers(1, 9))
ROUTERS_ = st.sampled_from(
    (Switch(), TopK(K=3), LossFree(K=2), NoisyTopK(K=2), Hierarchical(M=2, outer=1, inner=1), TaskTopK(K=2, M=3))
)
LAYERS_ = st.builds(
    lambda router, experts, shared: MoEConfig(E=4, router=router, experts=experts, shared=shared),
    ROUTERS_,
    EXPERTS_,
    st.none() | EXPERTS_,
)
SIZES_ = {"D": st.integers(1, 4).map(lambda n: 2 * n), "N": st.integers(2, 4)}
POSITIONS_ = {
    LMConfig: (Rotary(), Relative(), Relative(shared=True), Sinusoidal(), NoPE()),
    EncoderDecoderConfig: (Rotary(), Relative(shared=True), Sinusoidal(), NoPE()),
    ViTConfig: (NoPE(),),
}
FORMS_ = {
    **{"ffn": EXPERTS_, "moe": LAYERS_ | EXPERTS_, "moe_layers": st.sampled_from(("all", "none", "last 1", "0"))},
    **{"dense_after_moe": st.none() | EXPERTS_, "remat": st.just("none"), "causal": st.just(False)},
}
DATA = {
    LMConfig: DataConfig(L=8),
    EncoderDecoderConfig: DataConfig(ToyTranslation(), L=8, objective=Translation(source=SentencePiece(V=300))),
    ViTConfig: DataConfig(source=Digits(), L=1, objective=Classification()),
}


@settings(deadline=None, max_examples=12)
@given(kind=st.sampled_from(tuple(DATA)), data=st.data(), forms=st.fixed_dictionaries({**SIZES_, **FORMS_}))
def test_any_model_is_counted(kind, data, forms):
    attention = st.builds(
        MHA,
        H=st.just(4),
        A=st.sampled_from((2, 4)),
        J=st.sampled_from((None, 1, 2)),
        position=st.sampled_from(POSITIONS_[kind]),
        qk_norm=st.sampled_from(("none", "head", "all")),
        bias=st.booleans(),
        sinks=st.booleans(),
        gate=st.sampled_from(("none", "head", "element")),
    )
    forms["attention"] = tuple(data.draw(st.lists(attention, min_size=1, max_size=2)))
    forms |= {name: n for name, n in DATA[kind].sizes.items() if name in kind.__dataclass_fields__}
    forms |= (
        {"patch": 4, "representation": data.draw(st.booleans())}
        if kind is ViTConfig
        else {"tied": data.draw(st.booleans())}
    )
    model = kind(**forms)
    count = parameters(model)
    assert count.total == made(model, DATA[kind])
    assert set(count.kinds) == set(PARAMETER_KINDS)
    assert count.active <= count.total


def is_program(value) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def multiplied(jaxpr, times: int = 1) -> int:
    """FLOPs of all matrix multiplications of a jaxpr, loops by their length, of branches the last: any platform's."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            left, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
            total += 2 * times * int(np.prod(out)) * int(np.prod([left[i] for i in contracted]))
        inner = times * eqn.params["length"] if eqn.primitive.name == "scan" else times
        params = eqn.params["branches"][-1:] if eqn.primitive.name == "cond" else list(eqn.params.values())
        for value in jax.tree.leaves(params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
            if hasattr(value, "eqns"):
                total += multiplied(value, inner)
            elif hasattr(value, "jaxpr"):
                total += multiplied(value.jaxpr, inner)
    return total


MOE = MoEConfig(E=4, router=TopK(K=2), experts=GLU(F=6), shared=GLU(F=3), dispatch=Scatter(1.5))
SIZES = {"D": 8, "N": 4, "attention": MHA(4, 2), "ffn": MLP(F=5), "moe": MOE, "remat": "none"}
COUNTED = {
    "decoder": (
        LMConfig,
        DataConfig(L=8),
        {"attention": (MHA(4, 2, J=2, qk_norm="head", gate="head"), MHA(4, 4, J=1, gate="element"))},
    ),
    "t5": (
        EncoderDecoderConfig,
        DataConfig(L=16, objective=SpanCorruption()),
        {"dense_after_moe": GLU(F=7), "tied": False, "attention": MHA(4, 2, position=Relative(shared=True))},
    ),
    "latents": (
        LMConfig,
        DataConfig(L=8),
        {"attention": (MLA(4, A=4, U=2, O=6, W=8, Q=6), MLA(4, A=4, U=2, O=4, W=4, gate="element"))},
    ),
    "dense": (
        LMConfig,
        DataConfig(L=8),
        {"moe_layers": "none", "moe": None, "attention": MHA(4, 2, position=Relative())},
    ),
    "images": (
        ViTConfig,
        DataConfig(source=Digits(), L=1, objective=Classification()),
        {"representation": True, "patch": 2, "attention": MHA(4, 2, position=NoPE(), bias=True)},
    ),
}


@pytest.mark.parametrize("name", COUNTED)
def test_flops_are_those_of_the_program(name):
    """Every dot_general of a traced forward pass, to the unit."""
    kind, data, forms = COUNTED[name]
    fields = {name: n for name, n in data.sizes.items() if name in kind.__dataclass_fields__}
    model = kind(**{**SIZES, **fields, **forms})
    batch = data.shapes(1)
    params = jax.eval_shape(model.init, jax.random.key(0), batch)
    jaxpr = jax.make_jaxpr(model.apply)(params, batch).jaxpr
    cost = flops(model, batch)
    more = sum(of_slots(stack.L) for stack in model.stacks(batch)) * model.n_moe_layers // model.STACKS
    assert multiplied(jaxpr) == cost.forward - cost.kinds.get("experts", 0) + more


def of_slots(L: int) -> int:
    """A MoE layer by hand: ceil(1.5 * 2 * L / 4) slots of each of 4 experts, three matrices of 8 x 6;
    probabilities and entropy, summed for the statistics. The weighted sum of outputs is no matrix multiplication."""
    slots = 4 * min(L, -(-3 * L // 4))
    return 2 * slots * 3 * 8 * 6 + 2 * L * (4 + 1)


def test_flops_are_those_that_xla_counts():
    """FLOPs of a model whose loops have one turn, since XLA counts the body of a loop once."""
    moe = MoEConfig(E=4, router=TopK(K=2), experts=MLP(F=128), dispatch=Einsum(None))
    model = LMConfig(V=64, D=64, N=1, attention=MHA(4, 16), moe=moe, moe_layers="all", remat="none")
    data = DataConfig(L=32)
    batch = data.shapes(1)
    params = jax.eval_shape(model.init, jax.random.key(0), batch)
    counted = jax.jit(model.apply).lower(params, batch).compile().cost_analysis()["flops"]
    cost = flops(model, batch)
    every_expert = cost.kinds["experts"] * 2  # S slots for each of 4 experts, of which a token chooses 2
    masks = 2 * 2 * 32 * 4 * 32 * 64  # dispatch and combine [S, E*C] x [S, D]
    ours = cost.forward - cost.kinds["experts"] + every_expert + masks
    assert ours <= counted < 1.1 * ours
    assert cost.training == 3 * cost.forward


# ---- docs/papers.md


def row(name: str) -> str:
    """Row of the table of published models."""
    published, model = module(name)["PUBLISHED"], experiment(name).model
    count, cost = parameters(model), flops(model, experiment(name).data.shapes(1))
    differs = published.get("differs", {})
    marked = {what: published[what] + "*" * (what in differs) for what in ("total", "active") if what in published}
    told = [marked.get(what, "-") for what in ("total", "active")]
    return (
        f"| `{name}` | {told[0]} | {count.total:,} | {told[1]} | {count.active:,} | {cost.per_token / 1e9:.2f} "
        f"| {published['source']} |"
    )


def test_the_table_of_published_models():
    """`python -m tests.laws.test_10_papers` prints it."""
    text = pathlib.Path("docs/papers.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("| `")] == [row(name) for name in PAPERS]
    for name in PAPERS:
        for what, reason in module(name)["PUBLISHED"].get("differs", {}).items():
            assert f"`{name}`, {what}: {reason}" in text


if __name__ == "__main__":
    print("\n".join(map(row, PAPERS)), end="\n\n")
    for name in PAPERS:
        for what, reason in module(name)["PUBLISHED"].get("differs", {}).items():
            print(f"- `{name}`, {what}: {reason}")
