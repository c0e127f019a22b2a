"""A field is set by its path, into components too; what is no field is answered by what to type instead."""

import copy
import dataclasses
import itertools
import json
import re
import sys

import pytest
from absl.testing import flagsaver

from experiments import audit, cli, plan, train
from experiments.bench import steps
from moe_jax.attention import MHA, MLA, Linear, Relative, Rotary, YaRN
from moe_jax.config import RENAMED, SECTIONS, Experiment, build, parse, plain
from moe_jax.dispatch import Scatter
from moe_jax.losses import Adaptive, LoadBalance, RouterZ
from moe_jax.models import MODELS
from moe_jax.optim import AdamW, Cosine
from moe_jax.overrides import override
from moe_jax.routers import TopK
from moe_jax.words import MEANINGS, WORDS, meant
from tests import cases, cases_attention
from tests.programs import call

VALUES = {
    "mesh": {"data": 2},
    "model": {
        "D": 8,
        "N": 2,
        "attention": "MHA(H=2, A=4)",
        "moe_layers": "all",
        "remat": "none",
        "moe": {
            "E": 4,
            "router": "TopK(K=2)",
            "shared": "MLP(F=8)",
            "experts": "MLP(F=4)",
            "dispatch": "Scatter(1.5)",
            "gating": ("Jitter(0.1)",),
            "losses": ("LoadBalance(0.01)", "RouterZ(0.001)"),
        },
    },
}
DENSE = {"model": {"D": 8, "N": 2, "attention": "MHA(H=2, A=4)", "moe_layers": "none"}}
BROKEN = {"model": {"moe": {"router": "TopK(K=5)"}}, "mesh": {"data": 3}}  # each of them is wrong


def merged(values: dict, more: dict) -> dict:
    """Nested values with others in their place."""
    inside = {k: merged(values.get(k, {}), v) if isinstance(v, dict) else v for k, v in more.items()}
    return {**values, **inside}


def field(exp: Experiment, path: str):
    """The value that an experiment has at the end of a path."""
    found = exp
    if path == "model.kind":
        return next(name for name, cls in MODELS.items() if type(exp.model) is cls)
    for name in path.split("."):
        found = dict(found) if path.startswith("mesh") and found is exp.mesh else found
        if isinstance(found, dict):
            found = found[name]
        elif isinstance(found, tuple):
            named = {type(part).__name__: part for part in found}
            found = found[int(name)] if name.isdecimal() else named[name] if name in named else getattr(found[0], name)
        else:
            found = getattr(found, name)
    return found


def built(*given: tuple[str, str], values: dict = VALUES) -> Experiment:
    return build(override(values, given))


# ---- a path goes on into components


@pytest.mark.parametrize(
    ("path", "text", "whole", "component"),
    [
        ("optim.schedule.peak", "0.5", "optim.schedule", Cosine(peak=0.5, warmup=100)),  # a default, not in the file
        ("optim.optimizer.weight_decay", "0", "optim.optimizer", AdamW(weight_decay=0.0)),
        ("model.moe.router.K", "3", "model.moe.router", TopK(K=3)),
        ("model.moe.router.score", "sigmoid", "model.moe.router", TopK(K=2, score="sigmoid")),
        ("model.moe.router.normalize", "false", "model.moe.router", TopK(K=2, normalize=False)),
        ("model.moe.dispatch.capacity_factor", "1", "model.moe.dispatch", Scatter(1.0)),
        ("model.moe.dispatch.capacity_factor", "None", "model.moe.dispatch", Scatter(None)),
        ("model.attention.H", "4", "model.attention", (MHA(4, 4),)),
        ("model.attention.0.H", "4", "model.attention", (MHA(4, 4),)),
        ("model.attention.position.base", "500", "model.attention", (MHA(2, 4, position=Rotary(base=500.0)),)),
        ("model.attention.position", "Relative()", "model.attention", (MHA(2, 4, position=Relative()),)),
        (
            "model.attention.position.scaling",
            "Linear(2)",
            "model.attention",
            (MHA(2, 4, position=Rotary(scaling=Linear(2.0))),),
        ),
        ("model.moe.losses.0.weight", "0.02", "model.moe.losses", (LoadBalance(0.02), RouterZ(0.001))),
        ("model.moe.losses.RouterZ.weight", "0.02", "model.moe.losses", (LoadBalance(0.01), RouterZ(0.02))),
        ("model.moe.losses.1", "RouterZ(0.5)", "model.moe.losses", (LoadBalance(0.01), RouterZ(0.5))),
        (
            "model.moe.losses",
            "(Adaptive(LoadBalance(0.5)), RouterZ(0.5))",
            "model.moe.losses",
            (Adaptive(LoadBalance(0.5)), RouterZ(0.5)),
        ),
    ],
)
def test_a_field_of_a_component_is_set(path, text, whole, component):
    """As the component written by hand; nothing else changes."""
    exp, usual = built((path, text)), build(VALUES)
    assert field(exp, whole) == component != field(usual, whole)
    assert exp == built((whole, repr(component)))


def test_attentions_in_turn_have_numbers():
    values = merged(VALUES, {"model": {"attention": ("MHA(H=2, A=4)", "MHA(H=2, A=8)")}})
    assert built(("model.attention.1.H", "4"), values=values).model.attention == (MHA(2, 4), MHA(4, 8))
    with pytest.raises(ValueError, match=r"no entry 'H'; there are 0: MHA\(H=2, A=4\), 1: MHA\(H=2, A=8\)"):
        built(("model.attention.H", "4"), values=values)


def test_an_expert_in_place_of_a_layer_has_fields():
    values = merged(VALUES, {"model": {"moe": "MLP(F=4)"}})
    assert built(("model.moe.F", "8"), values=values).model.moe.F == 8
    with pytest.raises(ValueError, match=r"config.model.moe=MLP\(...\) has no field 'E'"):
        built(("model.moe.E", "8"), values=values)


def test_a_layer_may_begin_with_a_flag():
    assert built(("model.moe.E", "4"), ("model.moe_layers", "all"), values=DENSE).model.moe.E == 4


COMPONENTS = (
    *(cases.ROUTERS + cases.SLOT_ROUTERS + cases.GATING + cases.EXPERTS + cases.DISPATCHERS + cases.EXCHANGES),
    *(cases.LOSSES + cases_attention.ATTENTIONS),
)
PLACES = {
    **dict.fromkeys(map(type, cases.ROUTERS + cases.SLOT_ROUTERS), "model.moe.router"),
    **dict.fromkeys(map(type, cases.GATING), "model.moe.gating"),
    **dict.fromkeys(map(type, cases.EXPERTS), "model.moe.experts"),
    **dict.fromkeys(map(type, cases.DISPATCHERS), "model.moe.dispatch"),
    **dict.fromkeys(map(type, cases.EXCHANGES), "model.moe.exchange"),
    **dict.fromkeys(map(type, cases.LOSSES), "model.moe.losses"),
    **dict.fromkeys(map(type, cases_attention.ATTENTIONS), "model.attention"),
}


def outcome(make) -> str:
    """A component as it prints, or what its constructor says."""
    try:
        return repr(make())
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("component", COMPONENTS, ids=repr)
def test_every_number_of_a_component_is_set_by_its_path(component):
    """The component with the new number, or the sentence of its constructor where it refuses it."""
    *section, name = PLACES[type(component)].split(".")
    numbers = {f.name: getattr(component, f.name) for f in dataclasses.fields(component)}
    numbers = {n: v for n, v in numbers.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    for (number, value), change in itertools.product(numbers.items(), (lambda v: 2 * v, lambda v: v + 1, lambda v: -v)):
        values = {name: repr(component)}
        for part in reversed(section):
            values = {part: values}
        new = override(values, [(f"{'.'.join(section)}.{name}.{number}", repr(change(value)))])
        for part in section:
            new = new[part]
        (text,) = new[name] if isinstance(new[name], tuple) else (new[name],)
        changed = {number: change(value)}
        assert outcome(lambda: parse(text)) == outcome(lambda: dataclasses.replace(component, **changed))  # noqa: B023


def test_the_whole_goes_before_its_fields_in_any_order():
    given = [("model.moe.router.K", "3"), ("model.moe.router", "TopK(K=1)"), ("model.moe.router.score", "sigmoid")]
    for order in itertools.permutations(given):
        assert built(*order).model.moe.router == TopK(K=3, score="sigmoid")
    scaled = [
        ("model.attention.position.scaling.original", "64"),
        ("model.attention.position.scaling", "YaRN(2.0)"),
        ("model.attention", "MLA(H=2, A=4, U=2, O=4, W=4)"),
    ]
    for order in itertools.permutations(scaled):
        position = Rotary(scaling=YaRN(2.0, original=64))
        assert built(*order).model.attention == (MLA(2, 4, U=2, O=4, W=4, position=position),)
    assert built(("run.steps", "5"), ("run.steps", "6")).run.steps == 6


def test_what_is_given_stays_as_it_is():
    values = copy.deepcopy(VALUES)
    override(values, [("model.moe.losses.0.weight", "0.5"), ("model.moe.router.K", "3"), ("optim.schedule.peak", "1")])
    assert values == VALUES


# ---- fields that a file leaves out


@pytest.mark.parametrize("kind", MODELS)
def test_every_field_may_be_set_where_a_file_leaves_it_out(kind):
    """The default as a flag changes nothing."""
    position = {"LM": "Rotary()", "EncoderDecoder": "Relative(shared=True)", "ViT": "NoPE()"}[kind]
    objective = {"LM": "NextToken()", "EncoderDecoder": "SpanCorruption()", "ViT": "Classification()"}[kind]
    source = {"ViT": "Digits()"}.get(kind, "Corpus()")
    values = {
        "model": {"D": 8, "N": 2, "attention": f"MHA(H=2, A=4, position={position})", "moe": {"E": 4}},
        "data": {"source": source},
    }
    usual = [("model.kind", kind), ("data.objective", objective)]
    usual += [("data.L", "1"), ("model.patch", "2")] if kind == "ViT" else []
    exp = built(*usual, values=values)
    assert type(exp.model) is MODELS[kind]
    sizes = set(exp.data.sizes)
    for path, section in {**SECTIONS, "model": MODELS[kind]}.items():
        if not path:
            continue
        for f in dataclasses.fields(section):
            if f.name in sizes or f"{path}.{f.name}" in SECTIONS:
                continue
            text = plain(field(exp, f"{path}.{f.name}"))
            assert built(*usual, (f"{path}.{f.name}", str(text)), values=values) == exp, f.name


def test_a_kind_that_the_file_does_not_spell(tmp_path):
    file = tmp_path / "file.py"
    file.write_text(f"def get_config():\n    return {DENSE!r}\n")
    found = call(train, f"--config={file}", "--config.model.kind=LM", "--config.run.keep_best=0", "--print_config")
    assert json.loads(found.out)["run"]["keep_best"] == 0
    assert "takes images" in call(train, f"--config={file}", "--config.model.kind=ViT", "--config.model.patch=2",
                                  "--config.model.attention.position=NoPE()").error  # fmt: skip


# ---- a wrong file is mended by a flag


@pytest.fixture
def broken(tmp_path) -> list[str]:
    """A file that is wrong twice, and the flags that mend it."""
    file = tmp_path / "broken.py"
    file.write_text(f"def get_config():\n    return {merged(VALUES, BROKEN)!r}\n")
    return [f"--config={file}", "--config.model.moe.router.K=2", "--config.mesh.data=4"]


@pytest.mark.parametrize(
    ("program", "more"),
    [(train, ["--print_config"]), (plan, ["--topology=v5e:2x2", "--analytic"]), (audit, ["--placement"])],
)
def test_a_wrong_file_is_mended_by_flags(program, more, broken, monkeypatch):
    """In every program, which checks the config once, with all flags."""
    monkeypatch.setattr(plan, "planned", lambda exp, *_: print(exp.mesh))
    for missing in broken[1:]:
        flags = [flag for flag in broken if flag != missing]
        assert call(program, *flags, *more).code == 2, missing
    outcome = call(program, *broken, *more)
    assert outcome.code == 0, outcome


def test_the_mesh_of_the_benchmark_mends_a_file(broken, monkeypatch):
    file, router, _ = broken
    monkeypatch.setattr(sys, "argv", ["steps", file, router, "--mesh=data=2"])
    with flagsaver.flagsaver():
        cli.parse(sys.argv, steps.main)
        exp, _ = steps.experiments()
    assert {axis: n for axis, n in exp.mesh if n > 1} == {"data": 2}


@pytest.mark.parametrize(
    ("wrong", "mended"),
    [
        ({"model": {"attention": "MHA(H=2, A=3)"}}, ("model.attention.A", "4")),
        ({"model": {"moe": {"losses": ("LoadBalance(-1)", "RouterZ(0.1)")}}}, ("model.moe.losses.0.weight", "0.1")),
        ({"model": {"moe": {"losses": ("Balance(1)", "RouterZ(0.1)")}}}, ("model.moe.losses.0", "LoadBalance(0.1)")),
        ({"model": {"moe": {"router": "TopKK()"}}}, ("model.moe.router", "TopK()")),
        ({"model": {"kind": "GPT"}}, ("model.kind", "LM")),
        ({"model": {"moe": {"E": "four"}}}, ("model.moe.E", "4")),
        ({"run": {"steps": 0}}, ("run.steps", "1")),
    ],
)
def test_what_is_wrong_in_a_file_is_mended_by_one_flag(wrong, mended):
    values = merged(VALUES, wrong)
    with pytest.raises(ValueError, match=r"."):
        build(values)
    assert isinstance(built(mended, values=values), Experiment)


# ---- what cannot be


@pytest.mark.parametrize(
    ("path", "text", "words"),
    [
        ("model.moe.router.K", "abc", "config.model.moe.router.K='abc' must be a whole number."),
        ("model.moe.router.K", "2.0", "config.model.moe.router.K=2.0 must be a whole number."),
        ("model.moe.router.normalize", "no", "config.model.moe.router.normalize='no' must be True or False."),
        ("model.moe.dispatch.capacity_factor", "big", "capacity_factor='big' must be a number or None."),
        (
            "model.moe.router.scores",
            "x",
            "no field 'scores'; did you mean 'score'? TopK takes K, score, normalize.",
        ),
        (
            "model.moe.router.zzz",
            "x",
            "config.model.moe.router=TopK(...) has no field 'zzz'; there are K, score, nor",
        ),
        ("model.moe.router.temperature", "2", "'temperature' is a field of Sampled. TopK takes K, score, normalize."),
        ("model.moe.dispatch.x", "2", "config.model.moe.dispatch=Scatter(...) has no field 'x'"),
        ("model.moe.router.K.x", "2", "config.model.moe.router.K is 2 and has no field 'x'; set it as a whole too."),
        ("model.attention.position.scaling.factor", "2", "scaling is not set and has no field 'factor'"),
        ("model.attention.position", "Rotary", "config.model.attention.position: 'Rotary' is not a call; write"),
        ("model.attention.position", "Linear(2)", "is no position; use one of Rotary()"),
        ("model.moe.losses.2.weight", "2", "no entry '2'; there are 0: LoadBalance(0.01), 1: RouterZ(0.001)."),
        ("model.moe.losses.weight", "2", "config.model.moe.losses has no entry 'weight'; there are 0: LoadBalance"),
        ("model.moe.losses.Load.weight", "2", "config.model.moe.losses has no entry 'Load'; there are 0: LoadBala"),
        (
            "model.dense_after_moe.F",
            "2",
            "config.model.dense_after_moe is not set and has no field 'F'; set it too, to one of 'MLP(...)'",
        ),
        ("model", "2", "config.model has the fields kind, V, D"),
        ("data.B.x", "2", "config.data.B=32 has no fields; set it as a whole."),
        ("mesh.data.x", "2", "config.mesh.data=2 has no fields; set it as a whole."),
        ("model.V", "2", "config.model.V=2 is the data's to say; set config.data.source"),
    ],
)
def test_a_path_that_leads_nowhere(path, text, words):
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        built((path, text))
    assert "\n" not in str(caught.value)


def test_entries_of_one_kind_have_numbers_only():
    losses = ("model.moe.losses", "(LoadBalance(0.1), LoadBalance(0.2))")
    with pytest.raises(ValueError, match="several entries 'LoadBalance'; say which by its number"):
        built(losses, ("model.moe.losses.LoadBalance.weight", "1"))
    assert [loss.weight for loss in built(losses, ("model.moe.losses.1.weight", "1")).model.moe.losses] == [0.1, 1.0]


# ---- words of the field


@pytest.mark.parametrize("target", MEANINGS)
def test_every_word_leads_to_a_field(target):
    """The field is there in a built config, and takes what the word says."""
    path, _, form = target.partition("=")
    values = VALUES
    if path == "model.patch":
        values = merged(values, {"model": {"kind": "ViT", "attention": "MHA(H=2, A=4, position=NoPE())", "patch": 2}})
        values = merged(values, {"data": {"source": "Digits()", "objective": "Classification()", "L": 1}})
    exp = build(values)
    text = form.format("300" if "V=" in form else "0.2") or str(plain(field(exp, path)))
    again = built((path, text), values=values)
    assert form or again == exp
    assert not form or plain(field(again, path)) != plain(field(exp, path))


@pytest.mark.parametrize(
    ("path", "text", "typed"),
    [
        ("model.num_experts", "8", "model.moe.E=8"),
        ("model.moe.num_experts", "8", "model.moe.E=8"),
        ("n_experts", "8", "model.moe.E=8"),
        ("model.numLocalExperts", "8", "model.moe.E=8"),
        ("model.d_model", "16", "model.D=16"),
        ("model.num_heads", "4", "model.attention.H=4"),
        ("model.attention.num_heads", "4", "model.attention.H=4"),
        ("model.head_dim", "8", "model.attention.A=8"),
        ("model.intermediate_size", "8", "model.moe.experts.F=8"),
        ("model.vocab_size", "300", 'data.tokenizer="SentencePiece(V=300)"'),
        ("model.seq_len", "8", "data.L=8"),
        ("run.batch_size", "8", "data.B=8"),
        ("model.moe.top_k", "3", "model.moe.router.K=3"),
        ("model.moe.router.top_k", "3", "model.moe.router.K=3"),
        ("model.moe.capacity_factor", "2.0", "model.moe.dispatch.capacity_factor=2.0"),
        ("optim.lr", "0.1", "optim.schedule.peak=0.1"),
        ("optim.schedule.learning_rate", "0.1", "optim.schedule.peak=0.1"),
        ("optim.weight_decay", "0.2", "optim.optimizer.weight_decay=0.2"),
        ("run.warmup_steps", "5", "optim.schedule.warmup=5"),
        ("model.dropout", "0.1", 'model.moe.gating="ExpertDropout(0.1)"'),
        ("model.num_kv_heads", "1", "model.attention.J=1"),
        ("model.rope_theta", "5000", "model.attention.position.base=5000"),
        ("model.attention.rope_theta", "5000", "model.attention.position.base=5000"),
        ("max_steps", "5", "run.steps=5"),
        ("model.moe.aux_loss_coef", "0.1", "model.moe.losses.LoadBalance.weight=0.1"),
        ("model.moe.losses.z_loss", "0.1", "model.moe.losses.RouterZ.weight=0.1"),
        ("model.bf16", "True", "model.dtype=bfloat16"),
        ("data.grad_accum", "2", "data.microbatches=2"),
        ("optimizer.weight_decay", "0.2", "optim.optimizer.weight_decay=0.2"),  # a section's name is left out
        ("model.steps", "5", "run.steps=5"),  # another section's field
    ],
)
def test_a_word_of_the_field_is_answered_by_the_flag_to_type(path, text, typed):
    """The flag can be typed as it stands there."""
    with pytest.raises(ValueError, match=f"say --config.{re.escape(typed)}") as caught:
        built((path, text))
    assert str(caught.value).endswith(f"say --config.{typed}.") or "takes" in str(caught.value)
    target, _, value = typed.partition("=")
    assert built((target, value.strip('"'))) != build(VALUES)


def test_words_are_told_apart():
    assert len(WORDS) == sum(len(words.split()) for words in MEANINGS.values()), "each word stands once"
    assert meant("Num-Experts") == meant("n_experts") == "model.moe.E"
    assert meant("fish") == ""


def test_a_word_is_understood_in_a_file_and_as_a_flag_without_a_path():
    with pytest.raises(ValueError, match=r"no field 'num_layers'; say --config\.model\.N=VALUE"):
        build(merged(VALUES, {"model": {"num_layers": 2}}))
    with pytest.raises(ValueError, match="TopK has no argument 'top_k'; did you mean 'K'"):
        build(merged(VALUES, {"model": {"moe": {"router": "TopK(top_k=2)"}}}))
    error = call(train, "--config=configs/glam_nano.py", "--batch_size=8").error
    assert error == "There is no flag --batch_size; say --config.data.B=8."


def test_help_shows_paths_into_components():
    for program in (train, plan, audit):
        assert "--config.model.moe.router.K=4" in call(program, "--help").out


# ---- names of earlier versions


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_name_of_an_earlier_version_is_answered_by_the_new_one(old, new):
    """In a flag by what to type, in a file and in a run's config.json by a sentence."""
    section, _, name = old.partition(".")
    with pytest.raises(ValueError, match=rf"say --config\.{section}\.{new}=3\.$"):
        built((old, "3"))
    assert field(build(VALUES), f"{section}.{new}") != "missing"
    with pytest.raises(ValueError, match=rf"config\.{section}\.{new} since"):
        build(merged(VALUES, {section: {name: 3}}))
    saved = json.loads(build(VALUES).to_json())
    saved[section][name] = saved[section].pop(new)
    with pytest.raises(ValueError, match=rf"config\.{section}\.{new} since"):
        Experiment.from_json(json.dumps(saved))


def test_a_value_of_an_earlier_version_is_answered_by_the_new_one():
    with pytest.raises(ValueError, match="remat='exchanged' is 'save_collectives' since"):
        built(("model.remat", "exchanged"))
