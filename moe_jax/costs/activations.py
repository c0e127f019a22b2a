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
    width: int  # bytes of a number of the compute type
    tensor: int  # shards of heads and hidden units
    experts: int  # shards of experts


class Residuals(NamedTuple):
    """Residuals of a layer's forward pass for its backward pass, as XLA for TPU keeps them.

    Inside a rematerialised block, XLA fuses many of them with their use; without rematerialisation, all residuals of
    differentiation are stored.
    """

    inputs: int  # bytes per number of [T, D]: a layer's input, and its norm
    logits: int  # arrays [B, H, L, M] in float32, in addition to the softmax in the compute type
    hidden: tuple[int, int]  # arrays [rows, F], of an MLP and of a GLU
    bias: bool  # relative positions [H, L, L] in float32

    @classmethod
    def of(cls, again: bool, width: int) -> "Residuals":
        return cls(2 * width, 2, (2, 2), True) if again else cls(3 * FLOAT + width, 1, (5, 7), False)


class KeptBytes(NamedTuple):
    """Bytes that a block of layers keeps."""

    inside: int  # all residuals of its forward pass
    between: int  # residuals kept where the block is rematerialised


def block(cfg: Model, stack: StackShape, repeated: RepeatedLayers, device: DeviceShare) -> KeptBytes:
    """Bytes that the repeated layers of a stack keep."""
    T = device.B * stack.L
    x = device.width * T * cfg.D
    r = Residuals.of(cfg.remat != "none", device.width)
    inside, exchanged = 0, 0
    subs = [sub for _, sub in repeated.parts()]
    for sub in subs:
        inside += r.inputs * T * cfg.D
        if sub.kind == "attention":
            inside += attention_residuals(sub, stack, r, device)
        elif sub.kind == "moe":
            rows = RowCounts.of(sub.part, T, stack.L, device)
            inside += moe_residuals(sub.part, T, cfg.D, rows, r, device)
            exchanged += device.width * cfg.D * (rows.sent + rows.received) if device.experts > 1 else 0
        else:
            inside += dense_residuals(sub.part, T, r, device)
    summed = x * (len(subs) - 1) if device.tensor > 1 else 0  # the last sum is not needed again
    return KeptBytes(inside, {"none": inside, "full": x, "save_collectives": x + exchanged + summed}[cfg.remat])


def attention_residuals(sub: Sublayer, stack: StackShape, r: Residuals, device: DeviceShare) -> int:
    """Bytes of projections, the heads' outputs, scores and their softmax."""
    part, L, M = sub.part, stack.L, stack.M if sub.memory else stack.L
    sizes = {letter: n / device.tensor if letter in "HJ" else n for letter, n in part.sizes.items()}
    numbers = 0.0
    for letters, tokens in (
        (dims.dims_of(n), M if n in part.of_memory else L) for n in part.params if is_attention_matrix(n)
    ):
        inner = letters[:-1] if letters.endswith("D") else letters[1:]  # outputs of heads, or of the matrix
        numbers += tokens * math.prod(sizes[c] for c in inner)
    scores = (r.logits * FLOAT + device.width) * device.B * sizes["H"] * L * M
    bias = FLOAT * sizes["H"] * L * M if r.bias and has_table(part.params) else 0
    return int(device.width * device.B * numbers + scores + bias)


def has_table(names: tuple[str, ...]) -> bool:
    """Tells whether these parameters include a table of relative positions."""
    return any(dims.dims_of(name) == "PH" for name in names)


def biases(repeated: RepeatedLayers, L: int, n: int, device: DeviceShare) -> int:
    """Bytes of T5's relative positions [L, L, H] while their gradient is added to the table, of n layers at once.

    Heads are the last dimension there, which TPUs pad to a multiple of 128.
    """
    attentions = [sub.part for _, sub in repeated.parts() if sub.kind == "attention"]
    tables = [part.sizes["H"] for part in attentions if has_table(part.params + part.stack_params)]
    if not tables:
        return 0
    H = math.ceil(max(tables) / device.tensor)
    return FLOAT * L * L * (n * LANES * math.ceil(H / LANES) + 2 * H)


def dense_residuals(expert: Any, rows: int, r: Residuals, device: DeviceShare) -> int:
    """Bytes of hidden units before and after the activation."""
    return r.hidden[isinstance(expert, GLU)] * device.width * rows * expert.F // device.tensor


class RowCounts(NamedTuple):
    """Numbers of rows for experts, of one device's tokens."""

    sent: int
    received: int  # rows from all devices for the local experts, or the room for them
    masks: int  # numbers in dispatch and combine masks

    @classmethod
    def of(cls, cfg: MoEConfig, T: int, L: int, device: DeviceShare) -> "RowCounts":
        """Row counts of T tokens in sequences of L."""
        S, K, E = min(cfg.group(cfg.sequences(L), L, training=True), T), cfg.router.K, cfg.E
        if cfg.dispatch.layout is not Padded:
            sent = received = T * K
            if isinstance(cfg.exchange, RaggedAllToAll) and device.experts > 1:
                received = cfg.exchange.room(sent, device.experts, E, cfg.distinct)
            return cls(sent, received, 0)
        C = cfg.dispatch.slots(S, K, E)
        masks = 2 * T * E * C if type(cfg.dispatch).__name__ == "Einsum" else 0
        return cls(T // S * E * C, T // S * E * C, masks)


def moe_residuals(cfg: MoEConfig, T: int, D: int, rows: RowCounts, r: Residuals, device: DeviceShare) -> int:
    """Bytes of rows sent and received, hidden units, and outputs of choices."""
    hidden = dense_residuals(cfg.experts, rows.received, r, device)
    exchanged = rows.sent + rows.received if device.experts > 1 and not isinstance(cfg.exchange, AllGather) else 0
    shared = dense_residuals(cfg.shared, T, r, device) if cfg.shared is not None else 0
    moved = D * (rows.sent + rows.received + exchanged + T * cfg.router.K)
    return hidden + shared + device.width * (moved + rows.masks)
