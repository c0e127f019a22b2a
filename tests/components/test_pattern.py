"""Layers are lists of parts: the model, its counts and its predictions all go by one function that says which."""

import dataclasses

import jax
import numpy as np
import pytest

from moe_jax.attention import MHA, NoPE, Relative
from moe_jax.audit import meshes, samples
from moe_jax.audit.communication import compare_collectives
from moe_jax.audit.hlo import collectives
from moe_jax.config import DataConfig, Experiment, OptimConfig, RunConfig
from moe_jax.costs import flops, parameters
from moe_jax.costs.communication import step
from moe_jax.data import Classification, Digits, SpanCorruption
from moe_jax.dispatch import Scatter
from moe_jax.experts import GLU, MLP
from moe_jax.models import EncoderDecoderConfig, LMConfig, ViTConfig
from moe_jax.models.pattern import Sublayer, blocks, moe_path, moe_paths, params_at, placed_sublayers
from moe_jax.moe import MoEConfig
from moe_jax.optim import Constant
from moe_jax.routers import LossFree
from moe_jax.step import Program
from tests.cases import sizes_of

MOE = MoEConfig(E=4, router=LossFree(K=2), experts=MLP(F=8, bias=True), dispatch=Scatter(1.25))


@dataclasses.dataclass(frozen=True)
class Shortcut(LMConfig):
    """Two attentions and two MoE layers in every layer, a dense branch between them (LongCat-Flash's idea)."""

    def sublayers(self, stack, i):
        attention = self.attention[0]
        return (
            Sublayer("attention", "attention", attention),
            Sublayer("moe", "moe", stack.moe),
            Sublayer("branch", "dense", self.ffn),
            Sublayer("second", "attention", dataclasses.replace(attention, window=None, position=NoPE())),
            Sublayer("again", "moe", stack.moe),
        )


ATTENTION = MHA(4, 4, J=2, window=3, sinks=True, gate="element")
MODEL = Shortcut(V=257, D=8, N=2, attention=ATTENTION, ffn=GLU(F=8), moe=MOE, moe_layers="all", remat="full")


def experiment(mesh: str, model=MODEL) -> Experiment:
    data, optim = DataConfig(L=8, B=16), OptimConfig(schedule=Constant(0.01))
    return Experiment(model, data, optim, RunConfig(steps=3), tuple(sizes_of(mesh).items()))


@pytest.mark.law(1)
def test_any_parts_in_any_order_are_one_model_on_every_mesh():
    """Law 1, with what is random, remembered and dropped in two MoE layers of each layer."""
    exp = experiment("f2e2t2")
    state, batch = meshes.start(exp), samples.sample(exp)
    one, many = (meshes.run_on(e, state, batch, jax.devices()) for e in (meshes.on_one_device(exp), exp))
    found = {name: v.detail for name, v in meshes.compare_with_one_device(one, many, state).items() if not v.holds}
    assert found.keys() <= {"gradients"}, found  # of so many parts, they are rounded a little more
    assert meshes.worst(one.grads, many.grads, least=meshes.largest(one.grads) * meshes.SURE).error < 3e-5
    assert one.expert_NBLK.shape[0] == MODEL.n_moe_layers == 4
    assert one.state.router["bias_E"].shape == (4, 4)
    assert 0 < one.metrics.stats.kept.min() < one.metrics.stats.choices_E.sum(-1).max()
    assert (one.expert_NBLK[0] != one.expert_NBLK[1]).any()


@pytest.mark.law(6)
def test_any_parts_are_predicted():
    """Law 6."""
    exp = experiment("f2e2t2")
    program = Program(exp)
    found = collectives(program.lower(exp.data.shapes()).compile().as_text(), program.mesh)
    rows = compare_collectives(step(exp, dict(exp.mesh)), found)
    assert [row.detail for row in rows if not row.holds] == []


@pytest.mark.law(10)
def test_any_parts_are_counted():
    """Law 10's arithmetic: every parameter; FLOPs kind by kind."""
    params = jax.eval_shape(MODEL.init, jax.random.key(0), DataConfig(L=8).shapes(1))
    assert parameters(MODEL).total == sum(x.size for x in jax.tree.leaves(params))
    usual = LMConfig(**{f.name: getattr(MODEL, f.name) for f in dataclasses.fields(LMConfig)})
    mine, theirs = (flops(cfg, DataConfig(L=8).shapes(1)).kinds for cfg in (MODEL, usual))
    for kind in ("experts", "router", "attention", "scores"):
        assert mine[kind] == 2 * theirs[kind], kind
    assert mine["dense"] == 2 * 2 * 8 * 3 * 8 * 8


def test_layers_repeat_by_their_parts():
    """Attentions in turn make the period of a stack; a layout that does not fit it, runs of equal layers."""
    (block,) = blocks(MODEL, MODEL.stacks()[0])
    assert (len(block.layers), block.n, block.n_moe_layers) == (1, 2, 2)
    assert MODEL.routed_layers == (0, 0, 1, 1)
    wide, narrow = MHA(4, 4), MHA(4, 4, window=2)
    usual = LMConfig(V=8, D=8, N=6, attention=(narrow, narrow, wide), moe=MOE, moe_layers="every 3")
    (block,) = blocks(usual, usual.stacks()[0])
    assert [[sub.name for sub in layer] for layer in block.layers] == [["attention", "ffn"]] * 2 + [
        ["attention", "moe"]
    ]
    assert [layer[0].part.window for layer in block.layers] == [2, 2, None]
    first = dataclasses.replace(usual, moe_layers="last 5", attention=wide)
    assert [(len(b.layers), b.n) for b in blocks(first, first.stacks()[0])] == [(1, 1), (1, 5)]
    assert first.routed_layers == (1, 2, 3, 4, 5)


T5 = MHA(4, 4, position=Relative(shared=True))
LAID = {
    "parts": (MODEL, DataConfig(L=8)),
    "first dense": (LMConfig(V=9, D=8, N=3, attention=MHA(4, 4), moe=MOE, moe_layers="last 2"), DataConfig(L=8)),
    "pairs": (
        EncoderDecoderConfig(V=9, D=8, N=2, attention=T5, moe=MOE, dense_after_moe=MLP(F=4)),
        DataConfig(L=8, objective=SpanCorruption()),
    ),
    "images": (
        ViTConfig(V=9, D=8, N=2, attention=MHA(4, 4, position=NoPE(), bias=True), moe=MOE, image=(8, 8, 1), patch=4),
        DataConfig(source=Digits(), L=1, objective=Classification()),
    ),
}


@pytest.mark.parametrize("name", LAID)
def test_every_parameter_of_every_layer_has_a_path(name):
    """Each number of every stack is found once, by the path of one part or its norm, in the order of the layers."""
    cfg, data = LAID[name]
    shapes = jax.eval_shape(cfg.init, jax.random.key(0), data.shapes(1))
    params = jax.tree.map(lambda x: np.zeros(x.shape, int), shapes)
    parts = placed_sublayers(cfg)
    for part in parts:
        for path in (part.path, part.norm):
            for name, w in params[path.stack][path.module].items():
                w[path.repeat] += 1
                assert params_at(params, path)[name].shape == w.shape[1:]
    stacks = {key: tree for key, tree in params.items() if "stack_" in key}
    assert {int(n) for x in jax.tree.leaves(stacks) for n in np.unique(x)} == {1}
    assert [p.layer for p in parts] == sorted(p.layer for p in parts)
    assert {p.layer for p in parts} == set(range(cfg.N * cfg.STACKS))
    assert [p.path for p in parts if p.sub.kind == "moe"] == moe_paths(cfg)
    with pytest.raises(ValueError, match=f"no MoE layer {cfg.n_moe_layers}; the model has {cfg.n_moe_layers}"):
        moe_path(cfg, cfg.n_moe_layers)
