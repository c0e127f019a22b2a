"""Small instances of every attention, position and scaling, the situations they are put in, and numbers for all."""

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.attention import MHA, MLA, Linear, Llama3, NoPE, Order, Relative, Rotary, Sees, Sinusoidal, YaRN
from moe_jax.core import dims
from tests import oracle_attention

H, D, B, L = 4, 16, 8, 12
mha, mla = partial(MHA, H, 8), partial(MLA, H, A=6, U=4, O=8, W=12)
SLOWED = YaRN(4.0, 64, beta_fast=4.0, beta_slow=0.5, truncate=False)
DEEPSEEK = YaRN(4.0, 64, beta_fast=8.0, mscale=0.7, mscale_all_dim=0.9)

ATTENTIONS = (
    mha(),
    mha(J=2, position=Rotary(scaling=SLOWED), window=3, bias=True, sinks=True),  # gpt-oss
    mha(J=2, position=Rotary(100.0, fraction=0.5), qk_norm="head", gate="head"),
    mha(position=Rotary(100.0, scaling=Llama3(4.0, original=16)), qk_norm="all"),
    mha(position=Rotary(scaling=Linear(2.0)), gate="element", scale=0.5),
    mha(J=2, position=Relative(), scale=1.0, sinks=True),
    mha(position=Relative(shared=True), window=5),
    mha(position=Sinusoidal(), qk_norm="head", bias=True),
    mha(position=NoPE(), qk_norm="head", window=L + 8),
    mla(),
    mla(Q=8),
    mla(Q=8, position=Rotary(100.0, scaling=DEEPSEEK), gate="head"),
    mla(position=NoPE(), gate="element", window=3),
    MLA(H, A=2, U=6, O=2, W=10, Q=8, window=5, scale=0.3),
)
# Lengths of the documents of a row; what is left is padding.
PACKED = ((12,), (5, 7), (4, 4, 4), (7,), (3, 6), (1, 11), (), (2, 8))


def layout(rows: tuple[tuple[int, ...], ...], front: tuple[int, ...] = (), L: int = L) -> tuple[np.ndarray, np.ndarray]:
    """Segments and positions of rows of documents, one after another, after so many padded places."""
    segment, position = np.zeros((2, len(rows), L), int)
    for b, lengths in enumerate(rows):
        at = front[b] if front else 0
        for i, n in enumerate(lengths):
            segment[b, at : at + n], position[b, at : at + n] = i + 1, np.arange(n)
            at += n
    return segment, position


def numbers(part: Any) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Parameters of a layer and of its stack: none is zero, scales are near 1, scores are of size 1."""
    sizes, rng = {**part.sizes, "D": D}, np.random.default_rng(0)

    def draw(name: str) -> jax.Array:
        shape = dims.shape_of(dims.dims_of(name), sizes)
        x = rng.standard_normal(shape).astype(np.float32)
        if name.startswith("scale"):
            x = 1 + 0.3 * x
        elif len(shape) > 1 and name != "bias_PH":
            x /= np.sqrt(shape[0])
        return jnp.asarray(x)

    return {name: draw(name) for name in part.params}, {name: draw(name) for name in part.stack_params}


def short(part: Any) -> str:
    """A component as it is written, without what is usual."""
    if not dataclasses.is_dataclass(part):
        return repr(part)
    given = {f.name: getattr(part, f.name) for f in dataclasses.fields(part) if getattr(part, f.name) != f.default}
    return f"{type(part).__name__}({', '.join(f'{name}={short(value)}' for name, value in given.items())})"


def tokens(seed: int = 1, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape or (B, L, D)).astype(np.float32)


@cache
def compiled(part: Any) -> Callable:
    """One function of arrays, compiled for each shape and order: (params, x, sees, cache) -> (y, cache)."""
    return jax.jit(lambda params, x, sees, cache=None: part(params, x, sees, cache=cache))


def run(part: Any, x: np.ndarray, segment: np.ndarray, position: np.ndarray, order: Order = Order.CAUSAL) -> np.ndarray:
    """Outputs without a mesh or a cache."""
    params, shared = numbers(part)
    return np.asarray(compiled(part)(params, x, Sees(jnp.array(segment), jnp.array(position), order, shared=shared))[0])


def expected(part: Any, x: np.ndarray, tokens: oracle_attention.Tokens, memory: np.ndarray | None = None) -> np.ndarray:
    params, shared = numbers(part)
    return oracle_attention.attention(part, {**params, **shared}, x, tokens, memory)
