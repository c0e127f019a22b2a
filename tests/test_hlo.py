"""Law 6: what the compiled layer communicates, read from its HLO on a mesh of data 2 x expert 4."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest

from moe_jax.core.routing import capacity
from moe_jax.moe import MoE
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
    f = lambda p, x, m, k: MoE(LAYERS[name]).apply({"params": p}, x, m, k)  # noqa: E731
    x, mask, key = jnp.zeros((B, L, D)), jnp.ones((B, L), bool), jax.random.key(0)
    tokens, everywhere = jax.P(("data", "expert")), jax.P()
    with context(MESH):
        layout = {
            n: jax.P("expert") if n in LAYERS[name].experts.params else everywhere for n in shapes_of(LAYERS[name])
        }
        return (
            jax.jit(f, in_shardings=(layout, tokens, tokens, everywhere))
            .lower(shapes_of(LAYERS[name]), x, mask, key)
            .compile()
            .as_text()
        )


def predicted(name: str) -> int:
    """Bytes of the buffer [E, G*C, D] that one all-to-all moves."""
    cfg = LAYERS[name]
    S = cfg.S or L
    G = B * L // S // math.prod(MESH)
    return cfg.E * G * capacity(S, cfg.router.K, cfg.E, cfg.dispatch.capacity_factor) * D * 4


@pytest.mark.parametrize("name", ["einsum", "scatter"])
def test_forward(name):
    """Two all-to-alls of the predicted size, one all-reduce of the statistics, and nothing else."""
    sizes = {op: collectives(forward(name), op) for op in COLLECTIVES}
    statistics = 4 * (2 * LAYERS[name].E + 4)
    assert sizes.pop("all-to-all") == [predicted(name)] * 2
    assert sizes.pop("all-reduce") == [statistics]
    assert not any(sizes.values()), sizes


@pytest.mark.parametrize("name", ["einsum", "scatter"])
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
