"""Configs: text becomes typed experiments and back without loss, and the numbers they promise are told."""

import ast
import dataclasses
import math
import pathlib
import re
import runpy

import jax
import jax.numpy as jnp
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_jax.attention import MHA, MLA, Linear, Llama3, NoPE, Relative, Rotary, Sinusoidal, YaRN
from moe_jax.config import (
    COMPONENTS,
    KINDS,
    NESTED,
    SECTIONS,
    DataConfig,
    Experiment,
    build,
    dense_baseline,
    parse,
    plain,
)
from moe_jax.core import dims
from moe_jax.costs import flops, parameters
from moe_jax.data import (
    Bytes,
    Classification,
    Corpus,
    Digits,
    Folder,
    NextToken,
    Parallel,
    SentencePiece,
    SpanCorruption,
    Tfds,
    TfdsImages,
    TfdsPairs,
    ToyTranslation,
    Translation,
)
from moe_jax.dispatch import Gather, Scatter
from moe_jax.experts import GLU, MLP
from moe_jax.losses import Adaptive, RouterZ
from moe_jax.models import LM, LMConfig
from moe_jax.models.pattern import repeats, sparse_layers
from moe_jax.moe import MoEConfig
from moe_jax.optim import WSD, Adafactor, AdamW, Constant, Cosine, InverseSqrt, OptimConfig
from moe_jax.routers import Switch, TopK
from tests import cases
from tests.cases_attention import ATTENTIONS

CONFIGS = {p.stem: p for p in sorted(pathlib.Path("configs").glob("*.py")) if p.name != "__init__.py"}
COMPONENT_CASES = (
    MHA(2, 4, J=1, position=Rotary(base=1e6, fraction=0.5), qk_norm="head", window=3, sinks=True, gate="head"),
    MLA(2, A=4, U=2, O=4, W=6, position=Rotary(scaling=YaRN(4.0, 64))),
    Rotary(base=100.0),
    Linear(2.0),
    Llama3(8.0, original=64),
    YaRN(4.0, 64, truncate=False),
    Relative(shared=True),
    Sinusoidal(),
    NoPE(),
    *cases.ROUTERS,
    *cases.SLOT_ROUTERS,
    *cases.GATING,
    *cases.EXPERTS,
    *cases.DISPATCHERS,
    Gather(),
    *cases.EXCHANGES,
    *cases.LOSSES,
    AdamW(b2=0.99),
    Adafactor(momentum=0.9, relative=False),
    Constant(peak=0.1),
    InverseSqrt(peak=1e-5, warmup=7),
    Cosine(peak=0.1, floor=0.0),
    WSD(peak=0.1, decay=3),
    Corpus(megabytes=0.5),
    Folder(path="a 'quoted' path/ü"),
    Tfds(name="c4", data_dir=None),
    Bytes(),
    SentencePiece(V=300),
    NextToken(),
    SpanCorruption(density=0.2),
    Translation(source=SentencePiece(V=300)),
    Classification(),
    Digits(),
    TfdsImages("imagenet2012", V=1000),
    ToyTranslation(languages=2),
    Parallel("pairs"),
    TfdsPairs("wmt19_translate/de-en", source="de", target="en"),
)
quick = settings(deadline=None, max_examples=4)


def put(config: dict, path: str, text: str) -> None:
    """Sets a field to the Python value that a text writes, or to the text."""
    *sections, name = path.split(".")
    for section in sections:
        config = config.setdefault(section, {})
    try:
        config[name] = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        config[name] = text


def values(name: str) -> dict:
    return runpy.run_path(str(CONFIGS[name]))["get_config"]().to_dict()


def experiment(name: str) -> Experiment:
    return build(values(name))


# ---- text to experiment, and back


def test_configs_are_there():
    assert {"glam_nano", "dense_nano", "switch_nano", "mixtral_nano", "glam_pod"} <= set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_an_experiment_survives_json_and_hashes(name):
    exp = experiment(name)
    again = Experiment.from_json(exp.to_json())
    assert again == exp
    assert hash(again) == hash(exp)
    assert {exp: 1}[again] == 1
    assert again.to_json() == exp.to_json()


def test_what_differs_is_not_equal():
    exp = experiment("glam_nano")
    other = dataclasses.replace(exp, optim=dataclasses.replace(exp.optim, clip=2.0))
    assert Experiment.from_json(other.to_json()) == other != exp


def test_lists_are_tuples():
    given_values = {**values("glam_nano"), "optim": {"no_decay": ["D", "EF"]}}
    assert build(given_values).optim.no_decay == ("D", "EF")
    assert build(given_values) == build({**given_values, "optim": {"no_decay": ("D", "EF")}})
    hash(build(given_values))


def test_every_component_is_tried():
    assert {type(c) for c in COMPONENT_CASES} == set(COMPONENTS.values())
    assert {c for kinds in KINDS.values() for c in kinds} | set(NESTED) >= set(COMPONENTS.values())


@pytest.mark.parametrize("component", COMPONENT_CASES, ids=repr)
def test_a_component_prints_as_its_own_source(component):
    assert parse(repr(component)) == component
    assert parse(f"  {component!r}\n") == component
    assert plain(component) == repr(component)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("MHA(H=4, A=7)", "make them even"),
        ("MHA(H=4, A=8, J=3)", "J=3 heads of keys and values do not divide H=4"),
        ("MHA(H=4, A=8, window=0)", "window=0"),
        ("MHA(H=4, A=8, qk_norm='some')", "use one of 'none', 'head', 'all'"),
        ("MHA(H=4, A=8, position=TopK(K=2))", "is no position; use one of Rotary()"),
        ("MHA(H=4, A=8, position=Rotary(scaling=YaRN(4.0)))", "original"),
        ("MHA(H=4, A=8, position=Rotary(scaling=TopK(K=2)))", "scaling"),
        ("MLA(H=4, A=8, U=4, O=8, W=8, position=Relative())", "use Rotary() or NoPE()"),
        ("MLA(H=4, A=8, U=3, O=8, W=8)", "make them even"),
    ],
)
def test_an_attention_that_cannot_be_is_one_clear_line(text, words):
    """Errors of a component inside a component too."""
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        build({"model": {"D": 8, "N": 2, "moe_layers": "none", "attention": text}})
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("config.model.attention: ")


def test_every_attention_in_turn_fits_the_mesh():
    """The first as well as the last; a latent's ranks are cut by fsdp."""
    first, last = "MHA(H=3, A=4)", "MHA(H=4, A=4)"
    for attention, words in (
        ((first, last), r"attention\[0\].H=3 does not spread evenly over config.mesh.tensor=2"),
        ((last, first), r"attention\[1\].H=3 does not spread evenly over config.mesh.tensor=2"),
        ("MLA(H=4, A=4, U=2, O=4, W=7)", r"attention.W=7 does not spread evenly over config.mesh.fsdp=2"),
    ):
        model = {"D": 8, "N": 2, "moe_layers": "none", "attention": attention}
        with pytest.raises(ValueError, match=words):
            build({"model": model, "mesh": {"tensor": 2, "fsdp": 2}, "data": {"B": 8}})


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"H": 4, "A": 24, "position": "relative"}, "MHA(H=4, A=24, position=Relative())"),
        (
            {"H": 4, "A": 8, "J": 2, "rope": 1e6, "qk_norm": "head"},
            "MHA(H=4, A=8, J=2, qk_norm='head', position=Rotary(base=1000000.0))",
        ),
        ({"kind": "EncoderDecoder", "H": 2, "A": 8}, "MHA(H=2, A=8, position=Relative(shared=True))"),
        ({"kind": "ViT", "H": 2, "A": 8}, "MHA(H=2, A=8, position=NoPE(), bias=True)"),
    ],
)
def test_a_config_of_before_is_told_what_to_write(old, new):
    """Fields of attention were the model's in 0.1; the sentence says the version, and its advice is a component."""
    with pytest.raises(ValueError, match=r"since moe_jax 0\.2") as caught:
        build({"model": {"D": 8, "N": 2, "moe_layers": "none", **old}})
    (advice,) = re.findall(r'config.model.attention="(.*)" instead', str(caught.value))
    assert advice == new
    assert repr(parse(advice)) == repr(parse(new))


def test_arguments_by_position_and_by_name():
    assert parse("TopK(3, normalize=False)") == TopK(K=3, normalize=False) == parse("TopK(normalize=False, K=3)")
    assert parse("Adaptive(RouterZ(0.1), 0.2)") == Adaptive(RouterZ(0.1), target=0.2)
    assert parse("Scatter(None)") == Scatter(capacity_factor=None) != parse("Scatter()")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("TopK(K='2')", "must be a whole number"),
        ("TopK(K=2.0)", "must be a whole number"),
        ("TopK(K=True)", "must be a whole number"),
        ("Scatter(capacity_factor=1e999)", "must be a number in (0, inf) or None"),
        ("Scatter(capacity_factor='1')", "must be a number in (0, inf) or None"),
        ("GLU(F=4, activation=None)", "must be a string"),
        ("MLP(F=4, bias=1)", "must be True or False"),
        ("MLP()", "MLP needs F"),
        ("TopK(k=2)", "did you mean 'K'"),
        ("TopK(normalise=False)", "did you mean 'normalize'"),
        ("TopK(2, 'softmax', True, 3)", "has 4 arguments; TopK takes K, score, normalize"),
        ("Adaptive(LoadBalance(0.1), 0.2, loss=3)", "gives an argument twice"),
        ("Adaptive(Balance(0.1))", "plain values"),
        ("Adaptive(TopK(K=2))", "wraps another loss"),
        ("TopK(2, K=3)", "gives an argument twice"),
        ("TopK(K=2, K=3)", "gives an argument twice"),
        ("TopK(**{'K': 3})", "has no argument"),
        ("TopK(*[3])", "plain values"),
        ("TopK(K=1 + 1)", "plain values"),
        ("TopK(K=__import__('os').getpid())", "plain values"),
        ("TopK", "is not a call"),
        ("TopK(K=2", "is not a component"),
        ("TopK(K=2); TopK(K=2)", "is not a component"),
        ("moe.TopK(K=2)", "is not a component"),
        ("(lambda: 1)()", "is not a component"),
        ("__import__('os')", "is unknown"),
        ("eval('1')", "is unknown"),
        ("", "is not a component"),
        ("TopK\0()", "is not a component"),
        ("(" * 10_000, "is not a component"),
        ("topk(K=2)", "did you mean 'TopK'"),
        ("Top_K(K=2)", "did you mean 'TopK'"),
    ],
)
def test_malformed_components_are_refused(text, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        parse(text)


def test_nothing_in_a_component_is_run(tmp_path):
    witness = tmp_path / "witness"
    for text in (f"open({str(witness)!r}, 'w')", f"TopK(K=open({str(witness)!r}, 'w'))", "TopK(K=[exit()])"):
        with pytest.raises(ValueError, match=r"unknown|plain values"):
            parse(text)
    assert not witness.exists()


@pytest.mark.parametrize("field", KINDS)
def test_a_component_of_another_kind_is_refused(field):
    """A router where an optimizer belongs, and so on, is found when the experiment is built."""
    stranger = "AdamW()" if field != "optimizer" else "Switch()"
    path = next(p for p, section in SECTIONS.items() if field in {f.name for f in dataclasses.fields(section)})
    for value in (stranger, 5):
        config = values("glam_nano")
        put(config, f"{path}.{field}", str(value))
        with pytest.raises(ValueError, match=rf"config\.{path}\.{field}\b.*(cannot stand here|must be one of)"):
            build(config)


def test_a_whole_number_for_a_float_is_that_float():
    assert build({**values("glam_nano"), "optim": {"clip": 2}}).to_json().count('"clip": 2.0') == 1
    assert parse("Scatter(capacity_factor=2)").capacity_factor.is_integer()
    assert type(parse("TopK(K=2)").K) is int


# ---- what a config promises


def without_router(model, batch) -> int:
    cost = flops(model, batch)
    return cost.forward - cost.kinds["router"]


@pytest.mark.parametrize("name", ["glam_nano", "mixtral_nano", "switch_nano"])
@pytest.mark.parametrize("shared", [0, 24])
def test_the_dense_twin_costs_the_same(name, shared):
    exp = experiment(name)
    moe = exp.model.moe
    moe = dataclasses.replace(moe, shared=dataclasses.replace(moe.experts, F=shared) if shared else None)
    model = dataclasses.replace(exp.model, moe=moe)
    twin, batch = model.dense_baseline(), exp.data.shapes(1)
    assert flops(twin, batch).forward == without_router(model, batch) < flops(model, batch).forward
    assert parameters(twin).total < parameters(model).total
    assert twin.moe == dataclasses.replace(moe.experts, F=moe.router.K * moe.experts.F + shared)


@quick
@given(K=st.integers(1, 4), F=st.integers(1, 40), shared=st.integers(0, 40), glu=st.booleans())
@example(K=1, F=1, shared=1, glu=True)
def test_the_dense_twin_costs_the_same_for_any_size(K, F, shared, glu):
    expert = GLU if glu else MLP
    moe = MoEConfig(
        E=4, router=TopK(K=K, normalize=False), experts=expert(F=F), shared=expert(F=shared) if shared else None
    )
    model = LMConfig(V=11, D=6, N=1, attention=MHA(1, 2), moe=moe, moe_layers="all", remat="none")
    batch = DataConfig(L=8).shapes(1)
    assert flops(model.dense_baseline(), batch).forward == without_router(model, batch)


def test_a_twin_needs_one_kind_of_expert():
    model = experiment("glam_nano").model
    mixed = dataclasses.replace(model, moe=dataclasses.replace(model.moe, shared=GLU(F=8)))
    with pytest.raises(ValueError, match="of another kind"):
        mixed.dense_baseline()


def test_the_twin_of_a_config_is_a_config():
    twin = build(dense_baseline(runpy.run_path(str(CONFIGS["glam_nano"]))["get_config"]()))
    exp = experiment("glam_nano")
    assert twin == dataclasses.replace(exp, model=exp.model.dense_baseline()) == experiment("dense_nano")
    assert twin.model.moe == MLP(F=2 * 192)


@pytest.mark.law(10)
def test_the_parameters_of_glam_at_scale():
    """GLaM 0.1B/64E (arXiv:2112.06905, table 4: 1.9B in all, 145M active) with a vocabulary of 32,000."""
    count = parameters(experiment("glam_pod").model)
    assert (count.total, count.active) == (1_907_612_928, 152_296_704)
    assert count.kinds["router"] == (6 * 64 * 768, 6 * 64 * 768)


# ---- layouts


@pytest.mark.parametrize(
    ("moe_layers", "N", "chosen"),
    [
        ("every 2", 4, {1, 3}),
        ("every 2", 5, {1, 3}),
        ("every 1", 3, {0, 1, 2}),
        ("first 1", 3, {0}),
        ("last 2", 3, {1, 2}),
        ("all", 2, {0, 1}),
        ("none", 2, set()),
        ("0,2", 4, {0, 2}),
        ("3", 4, {3}),
        ("(0, 1)", 4, {0, 1}),
    ],
)
def test_moe_layers_chooses_the_sparse_layers(moe_layers, N, chosen):
    assert [i in sparse_layers(moe_layers, N) for i in range(N)] == [i in chosen for i in range(N)]


@pytest.mark.parametrize(
    "moe_layers", ["every 0", "every 5", "first", "every two", "", "odd", "4", "-1", "0;1", "all 2"]
)
def test_other_layouts_are_refused(moe_layers):
    with pytest.raises(ValueError, match=r"is not a choice of layers|names layers"):
        sparse_layers(moe_layers, 4)


def test_repeated_layers_are_found():
    D, S = False, True
    assert repeats((D, S, D, S)) == [((D, S), 2)]
    assert repeats((S, S, S)) == [((S,), 3)]
    assert repeats((D, D, S, D, D, S)) == [((D, D, S), 2)]
    assert repeats((D, D, S)) == [((D,), 2), ((S,), 1)]
    assert repeats((S,)) == [((S,), 1)]
    assert repeats((D, S)) == [((D, S), 1)]


@given(st.lists(st.booleans(), min_size=1, max_size=12).map(tuple))
def test_stacks_are_the_layers(sparse):
    found = repeats(sparse)
    assert sum((block * n for block, n in found), ()) == sparse
    assert all(n >= 1 and block for block, n in found)


# ---- optimization


@pytest.mark.parametrize(
    ("schedule", "told"),
    [
        (Constant(peak=0.5, warmup=2), {0: 0.25, 1: 0.5, 2: 0.5, 12: 0.5}),
        (Constant(peak=0.5), {0: 0.5, 12: 0.5}),
        (InverseSqrt(peak=2.0, warmup=4), {0: 0.5, 3: 2.0, 4: 2.0, 16: 1.0, 64: 0.5}),
        (Cosine(peak=1.0, warmup=4, floor=0.1), {0: 0.25, 3: 1.0, 4: 1.0, 8: 0.55, 12: 0.1, 20: 0.1}),
        (Cosine(peak=1.0, floor=0.0), {0: 1.0, 6: 0.5, 12: 0.0}),
        (WSD(peak=1.0, warmup=2, decay=4), {0: 0.5, 1: 1.0, 8: 1.0, 9: 0.75, 10: 0.5, 12: 0.0}),
        (WSD(peak=1.0, warmup=2, decay=4, floor=0.5), {8: 1.0, 10: 0.75, 12: 0.5, 20: 0.5}),
        (WSD(peak=1.0, warmup=2), {0: 0.5, 12: 1.0}),
    ],
    ids=repr,
)
def test_schedules_have_their_rates(schedule, told):
    rate = schedule(12)
    assert {step: float(rate(jnp.int32(step))) for step in told} == pytest.approx(told, abs=1e-7)


def test_matrices_decay_and_vectors_do_not():
    """By the suffix of the name; on glam_nano, every name but the embedding's."""
    exp = experiment("glam_nano")
    tree = jax.eval_shape(LM(exp.model).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    found = {}
    for path, decayed in jax.tree.leaves_with_path(exp.optim.decayed(tree)):
        found.setdefault(decayed, set()).add(path[-1].key)
    assert found[True] - {"embed_VD"} == {
        *("query_DHA", "key_DJA", "value_DJA", "out_HAD"),
        *("gate_DF", "up_DF", "down_FD"),
        *("router_gate_DE", "up_EDF", "down_EFD"),
    }
    assert found[False] - {"embed_VD"} == {"scale_D", "bias_PH"}


def test_no_component_decays_more_than_matrices():
    """Neither scalars nor vectors, of each expert or head either, nor tables of positions: of everything registered."""
    parts = (*cases.ROUTERS, *cases.SLOT_ROUTERS, *cases.EXPERTS, *ATTENTIONS)
    names = {name for part in parts for name in part.params} | {"bias_PH"}  # of a part, of a stack
    names |= {"router_scale_", "router_bias_E", "down_EO", "position_LD", "patch_D", "head_V", "embed_VD", "head_DV"}
    assert {"scale_", "sink_H", "bias_PH", "up_EF", "down_ED", "phi_DEC"} < names
    tables = {"HA", "JA", "PH", "LD"}  # of heads, of distances, of places
    matrices = {n for n in names if len(dims.dims_of(n).removeprefix("E")) > 1 and dims.dims_of(n) not in tables}
    decayed = OptimConfig().decayed(dict.fromkeys(names, 0))
    assert {name for name in names if decayed[name]} == matrices
    assert not OptimConfig(no_decay=()).decayed({"router_scale_": 0})["router_scale_"]


def test_biases_do_not_decay():
    names = {"up_EF", "down_ED", "up_EDF", "up_F", "down_D"}
    assert {n for n, decayed in OptimConfig().decayed(dict.fromkeys(names, 0)).items() if decayed} == {"up_EDF"}


# ---- an experiment that cannot be is not built


@pytest.mark.parametrize(
    ("path", "text", "words"),
    [
        ("seed", "-1", "config.seed=-1"),
        ("seed", "1.5", "config.seed=1.5"),
        ("mesh", "8", "config.mesh=8 must be a dict"),
        ("model", "3", "config.model=3 must be a dict"),
        ("model.V", "5", "set config.data.source, config.data.tokenizer"),
        ("model.moe.losses", "(1, 2)", "losses=1 must be one of 'LoadBalance(...)'"),
        ("model.moe.losses", "{'load_balance': 0.01}", "must be one of 'LoadBalance(...)'"),
        ("model.moe.losses", "('Balance(1.0)',)", "Component 'Balance' is unknown"),
        ("optim.clip", "1e999", "must be a number in (0, inf) or None"),
        ("optim.no_decay", "D", "must be a tuple"),
        ("run.max_bad_steps", "0", "config.run.max_bad_steps=0 must be a whole number in [1, 2**31)"),
        ("mesh.data", "0", "or -1 for the rest"),
        ("mesh.data", "True", "or -1 for the rest"),
        ("mesh.data", "2.0", "or -1 for the rest"),
        ("data.microbatches", "0", "config.data.microbatches=0 must be a whole number in"),
        ("data.microbatches", "3", "do not spread evenly"),
    ],
)
def test_impossible_values_are_named(path, text, words):
    config = values("glam_nano")
    put(config, path, text)
    with pytest.raises(ValueError, match=re.escape(words)):
        build(config)


def test_the_mesh_of_a_config_counts_its_devices():
    exp = experiment("glam_nano")
    assert exp.devices == 8 == math.prod(dict(exp.mesh).values())
    assert experiment("glam_pod").devices is None
    assert dataclasses.replace(exp, mesh=(("data", 4),)).devices == 4


@pytest.mark.law(3)
def test_a_router_without_choices_to_make_is_refused():
    config = values("switch_nano")
    assert isinstance(build(config).model.moe.router, Switch)
    put(config, "model.moe.router", "TopK(K=1)")
    with pytest.raises(ValueError, match="never trains its router"):
        build(config)
