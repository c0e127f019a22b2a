"""Law 6: what the compiled layer communicates, read from its HLO on a mesh of data 2 x expert 4."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest

from moe_jax.core.capacity import capacity
from moe_jax.moe import MoE
from moe_jax.routers import ExpertChoice, SoftMoE
from tests.cases import LAYERS, B, D, L, compiled, context, shapes_of

MESH = (2, 4)
BYTES = {"f32": 4, "s32": 4, "u32": 4, "pred": 1}
COLLECTIVES = (
    "all-to-all",
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "collective-permute",
    "ragged-all-to-all",
)


def collectives(text: str, opcode: str) -> list[int]:
    """Bytes that each instruction of this opcode yields on a device."""
    text = re.sub(r"/\*.*?\*/", "", text)
    found = re.findall(rf" = ([^=\n]*?) {opcode}(?:-start)?\(", text)
    shape = re.compile(r"(\w+)\[([\d,]*)\]")
    return [sum(BYTES[t] * math.prod(map(int, filter(None, n.split(",")))) for t, n in shape.findall(f)) for f in found]


@functools.cache
def forward(name: str) -> str:
    """The compiled text of the layer's output and auxiliary loss."""
    cfg = LAYERS[name]
    f = lambda p, x, m, k, s: MoE(cfg).apply({"params": p}, x, m, k, s)  # noqa: E731
    x, mask, key = jnp.zeros((B, L, D)), jnp.ones((B, L), bool), jax.random.key(0)
    tokens, everywhere = jax.P(("data", "expert")), jax.P()
    with context(MESH):
        layout = {n: jax.P("expert") if n in cfg.experts.params else everywhere for n in shapes_of(cfg)}
        step = jax.jit(f, in_shardings=(layout, tokens, tokens, everywhere, everywhere))
        return step.lower(shapes_of(cfg), x, mask, key, cfg.init_state()).compile().as_text()


def predicted(name: str) -> int:
    """Bytes of the buffer [E, G*C, D] that one all-to-all moves."""
    cfg = LAYERS[name]
    S = cfg.S or L
    G = B * L // S // math.prod(MESH)
    if isinstance(cfg.router, SoftMoE):
        C = cfg.router.C
    elif isinstance(cfg.router, ExpertChoice):
        C = capacity(S, 1, cfg.E, cfg.router.capacity_factor)
    else:
        C = capacity(S, cfg.router.K, cfg.E, cfg.dispatch.capacity_factor)
    return cfg.E * G * C * D * 4


@pytest.mark.parametrize("name", ["einsum", "scatter", "loss_free", "sinkhorn", "expert_choice", "soft"])
def test_forward(name):
    """Two all-to-alls of the predicted size, one all-reduce of the statistics, and nothing else."""
    sizes = {op: collectives(forward(name), op) for op in COLLECTIVES}
    E, M = LAYERS[name].E, LAYERS[name].tasks
    statistics = 4 * (5 * E + 7 + M * (E + 2) + (E if name == "sinkhorn" else 0))  # its potentials besides
    assert sizes.pop("all-to-all") == [predicted(name)] * 2
    assert sizes.pop("all-reduce") == [statistics]
    assert not any(sizes.values()), sizes


@pytest.mark.parametrize("name", ["einsum", "scatter", "loss_free", "sinkhorn", "expert_choice", "soft"])
def test_training_step(name):
    """Two more all-to-alls of the same size in the backward pass; tokens and logits are never gathered."""
    text = compiled(name, MESH)[1]
    assert collectives(text, "all-to-all") == [predicted(name)] * 4
    for op in ("all-gather", "reduce-scatter", "collective-permute", "ragged-all-to-all"):
        assert collectives(text, op) == []


@pytest.mark.parametrize("name", ["einsum", "scatter", "dropless", "sort"])
def test_data_parallelism_exchanges_no_tokens(name):
    """Without experts spread over shards there is no all-to-all at all."""
    text = compiled(name, (8, 1))[1]
    for op in COLLECTIVES:
        assert op == "all-reduce" or collectives(text, op) == []


def test_the_reader_sees_collectives():
    """HLO as XLA prints it: tuples with index comments, names that look like opcodes."""
    line = "%all_to_all.27 = (f32[2,3]{1,0}, /*index=5*/f32[2,3]{1,0}) all-to-all(%all-reduce.1, %x), foo=1"
    assert collectives(line, "all-to-all") == [48]
    assert collectives(line, "all-reduce") == []
