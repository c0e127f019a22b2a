"""Bytes that the layers of a model keep for their backward pass on one device, by arithmetic on shapes."""

import math
from typing import Any, NamedTuple

from moe_jax.attention.layer import is_attention_matrix
from moe_jax.core import dims
from moe_jax.core.groups import Padded
from moe_jax.exchanges import AllGather, RaggedAllToAll
from moe_jax.experts import GLU
from moe_jax.models import Model
from moe_jax.models.pattern import RepeatedLayers, StackShape, Sublayer
from moe_jax.moe import MoEConfig

FLOAT = 4
LANES = 128


class DeviceShare(NamedTuple):
    """One device's share of a batch, and of every layer."""

    B: int  # sequences of a microbatch
    width: int  # bytes of a number that is computed with
    tensor: int  # shards of heads and hidden units
    experts: int  # shards of experts


class Residuals(NamedTuple):
    """Residuals of a layer's forward pass for its backward pass, as XLA for TPU keeps them.

    Within a block that is computed again, much is fused with what uses it; what is kept from one pass to the other is
    written down as it was differentiated.
    """

    inputs: int  # bytes of a number of [T, D]: a layer's input, and its norm
    logits: int  # arrays [B, H, L, M] in float32, beside the softmax as it is multiplied
    hidden: tuple[int, int]  # arrays [rows, F], of an MLP and of a GLU
    bias: bool  # relative positions [H, L, L] in float32

    @classmethod
    def of(cls, again: bool, width: int) -> "Residuals":
        return cls(2 * width, 2, (2, 2), True) if again else cls(3 * FLOAT + width, 1, (5, 7), False)


class KeptBytes(NamedTuple):
    """Bytes that a block of layers keeps."""

    inside: int  # all that its backward pass needs of its forward pass
    between: int  # what is kept of that where the block is computed again


def block(cfg: Model, stack: StackShape, repeated: RepeatedLayers, on: DeviceShare) -> KeptBytes:
    """Bytes of the layers that a stack repeats."""
    T = on.B * stack.L
    x = on.width * T * cfg.D
    r = Residuals.of(cfg.remat != "none", on.width)
    inside, exchanged = 0, 0
    subs = [sub for _, sub in repeated.parts()]
    for sub in subs:
        inside += r.inputs * T * cfg.D
        if sub.kind == "attention":
            inside += attention_residuals(sub, stack, r, on)
        elif sub.kind == "moe":
            rows = RowCounts.of(sub.part, T, stack.L, on)
            inside += moe_residuals(sub.part, T, cfg.D, rows, r, on)
            exchanged += on.width * cfg.D * (rows.sent + rows.received) if on.experts > 1 else 0
        else:
            inside += dense_residuals(sub.part, T, r, on)
    summed = x * (len(subs) - 1) if on.tensor > 1 else 0  # nothing needs the last one again
    return KeptBytes(inside, {"none": inside, "full": x, "save_collectives": x + exchanged + summed}[cfg.remat])


def attention_residuals(sub: Sublayer, stack: StackShape, r: Residuals, on: DeviceShare) -> int:
    """Bytes of what matrices give and the heads' outputs; of scores, and of their softmax."""
    part, L, M = sub.part, stack.L, stack.M if sub.memory else stack.L
    sizes = {letter: n / on.tensor if letter in "HJ" else n for letter, n in part.sizes.items()}
    numbers = 0.0
    for letters, tokens in (
        (dims.dims_of(n), M if n in part.of_memory else L) for n in part.params if is_attention_matrix(n)
    ):
        inner = letters[:-1] if letters.endswith("D") else letters[1:]  # outputs of heads, or of the matrix
        numbers += tokens * math.prod(sizes[c] for c in inner)
    scores = (r.logits * FLOAT + on.width) * on.B * sizes["H"] * L * M
    bias = FLOAT * sizes["H"] * L * M if r.bias and has_table(part.params) else 0
    return int(on.width * on.B * numbers + scores + bias)


def has_table(names: tuple[str, ...]) -> bool:
    """Says whether there is a table of relative positions among these parameters."""
    return any(dims.dims_of(name) == "PH" for name in names)


def biases(repeated: RepeatedLayers, L: int, n: int, on: DeviceShare) -> int:
    """T5's relative positions [L, L, H] when their gradient is added to the table, of n layers at once.

    Heads are last there, and TPUs fill the last dimension of an array up to 128 numbers.
    """
    attentions = [sub.part for _, sub in repeated.parts() if sub.kind == "attention"]
    tables = [part.sizes["H"] for part in attentions if has_table(part.params + part.stack_params)]
    if not tables:
        return 0
    H = math.ceil(max(tables) / on.tensor)
    return FLOAT * L * L * (n * LANES * math.ceil(H / LANES) + 2 * H)


def dense_residuals(expert: Any, rows: int, r: Residuals, on: DeviceShare) -> int:
    """Hidden units before and after what is not linear."""
    return r.hidden[isinstance(expert, GLU)] * on.width * rows * expert.F // on.tensor


class RowCounts(NamedTuple):
    """Rows for experts, of the tokens of one device."""

    sent: int
    received: int  # those of all devices for the experts of this one, or the room for them
    masks: int  # numbers in masks of who goes where

    @classmethod
    def of(cls, cfg: MoEConfig, T: int, L: int, on: DeviceShare) -> "RowCounts":
        """T tokens in sequences of L."""
        S, K, E = min(cfg.group(cfg.sequences(L), L, training=True), T), cfg.router.K, cfg.E
        if cfg.dispatch.layout is not Padded:
            sent = received = T * K
            if isinstance(cfg.exchange, RaggedAllToAll) and on.experts > 1:
                most = on.experts * sent
                received = most if cfg.exchange.buffer is None else min(most, math.ceil(cfg.exchange.buffer * sent))
            return cls(sent, received, 0)
        C = cfg.dispatch.slots(S, K, E)
        masks = 2 * T * E * C if type(cfg.dispatch).__name__ == "Einsum" else 0
        return cls(T // S * E * C, T // S * E * C, masks)


def moe_residuals(cfg: MoEConfig, T: int, D: int, rows: RowCounts, r: Residuals, on: DeviceShare) -> int:
    """Rows on their way and back, hidden units, and what each token gets."""
    hidden = dense_residuals(cfg.experts, rows.received, r, on)
    travelling = rows.sent + rows.received if on.experts > 1 and not isinstance(cfg.exchange, AllGather) else 0
    shared = dense_residuals(cfg.shared, T, r, on) if cfg.shared is not None else 0
    moved = D * (rows.sent + rows.received + travelling + T * cfg.router.K)
    return hidden + shared + on.width * (moved + rows.masks)
