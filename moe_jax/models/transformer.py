"""The stacks that transformers of all kinds share: their sizes, and layers that are scanned."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Key

from moe_jax.attention import ATTENTION, Sees, Sinusoidal
from moe_jax.attention.layer import Attention
from moe_jax.attention.positions import table_bias
from moe_jax.core import dims, shard
from moe_jax.core.context import Ids
from moe_jax.core.parameter import parameter
from moe_jax.core.quoted import quoted
from moe_jax.core.ranges import PositiveFloat, PositiveInt, check_ranges
from moe_jax.core.shard import Shard
from moe_jax.core.stats import ratio
from moe_jax.experts import GLU
from moe_jax.models.blocks import NORMS, FeedForward
from moe_jax.models.pattern import (
    RepeatedLayers,
    StackShape,
    Sublayer,
    blocks,
    layer_counts,
    placed_sublayers,
    sparse_layers,
)
from moe_jax.moe import Aux, LayerState, MoE, MoEConfig

SAVED = jax.checkpoint_policies.save_only_these_names(shard.COLLECTIVES)
REMAT: dict[str, Callable] = {
    "none": lambda block: block,
    "full": partial(nn.remat, prevent_cse=False),
    "save_collectives": partial(nn.remat, prevent_cse=False, policy=SAVED),
}


class Call(NamedTuple):
    """The arguments of a model's call, other than its batch.

    key: of random draws in training; None draws nothing (evaluation). router: state of the MoE layers
    (`init_router`). replay: recorded choices of the MoE layers, as `Aux.expert_BLK` has them.
    record: details of each token's routing to report, see `moe.Recorded`.
    """

    key: Key[Array, ""] | None = None
    router: LayerState | None = None
    replay: Int[Array, "N B _ K"] | None = None
    record: tuple[str, ...] = ()

    def part(self, i: int, layers: slice, L: int) -> "Call":
        """The arguments of stack number i, whose MoE layers are `layers`, on sequences of L tokens."""
        return Call(
            None if self.key is None else jax.random.fold_in(self.key, i),
            jax.tree.map(lambda a: a[layers], self.router or {}),
            None if self.replay is None else self.replay[layers, :, :L],
            self.record,
        )


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """The fields that all models have.

    V: vocabulary or classes, as the data says. D: width. N: layers, of each stack.
    attention: an attention, or several that layers take in turn (a window in every second layer, ...).
    ffn: the feed-forward part of dense layers.
    moe: feed-forward part of the layers chosen by `moe_layers`: a MoEConfig, or one expert in a dense baseline.
    moe_layers: which layers are MoE layers: "every 2" (the last of each two, GLaM's), "all", "none", "first 3",
        "last 3", or indices "0,4,5".
    dense_after_moe: a dense feed-forward after each MoE layer, with a norm of its own (ST-MoE,
        arXiv:2202.08906, appendix C).
    tied: logits by the embedding; with False by a matrix of their own.
    dtype: "float32" or "bfloat16", of activations and matrix multiplications; parameters are float32.
    init_scale: attentions and dense parts start with std sqrt(init_scale / fan_in).
    causal: with False, routing that depends on later tokens is allowed (attention stays as it is).
    remat: what the backward pass computes again: nothing ("none"), layers ("full"), or layers except results of
        collectives ("save_collectives": 4 instead of 6 all-to-alls per MoE layer).
    aux_over_layers: whether the MoE layers' auxiliary losses are averaged ("mean") or added up ("sum").
    """

    V: PositiveInt
    D: PositiveInt
    N: PositiveInt
    attention: Any
    ffn: Any = GLU(F=1024, activation="gelu")
    moe: Any = None
    dense_after_moe: Any = None
    moe_layers: str = "every 2"
    tied: bool = True
    remat: str = "full"
    dtype: str = "float32"
    init_scale: PositiveFloat = 1.0
    causal: bool = True
    aux_over_layers: str = "mean"
    STACKS: ClassVar = 1
    norm: ClassVar[str] = "rms"  # of all layers, see `blocks.NORMS`

    def __post_init__(self):
        check_ranges(self)
        several = self.attention if isinstance(self.attention, tuple | list) else (self.attention,)
        object.__setattr__(self, "attention", tuple(several))
        if not self.attention or not all(isinstance(part, ATTENTION) for part in self.attention):
            names = ", ".join(f"{c.__name__}(...)" for c in ATTENTION)
            raise ValueError(
                f"attention={quoted(self.attention)} must be one of {names}, or several for layers in turn."
            )
        choices = {"dtype": ("float32", "bfloat16"), "remat": tuple(REMAT), "aux_over_layers": ("mean", "sum")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                words = ", ".join(map(repr, known))
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; use one of {words}.")
        if self.embeds_positions and self.D % 2:
            raise ValueError(f"Sinusoidal positions need an even width, but D={self.D}.")
        if sparse_layers(self.moe_layers, self.N) and self.moe is None:
            raise ValueError(
                f"moe_layers={self.moe_layers!r} has sparse layers, but moe is None; set moe or moe_layers='none'."
            )
        if self.causal and isinstance(self.moe, MoEConfig) and not self.moe.causal:
            raise ValueError(not_causal(self.moe))
        for name in self.stack_params:
            sizes = {tuple(part.sizes[letter] for letter in dims.dims_of(name)) for part in self._sharing(name)}
            if len(sizes) > 1:
                raise ValueError(
                    f"Attentions in turn share {name} of their stack, but not its sizes {sorted(sizes)}; give them "
                    "equal heads, or a table for each layer: Relative()."
                )
        if len(self.attention) > self.N:
            raise ValueError(f"{len(self.attention)} attentions in turn, but N={self.N} layers; name at most {self.N}.")

    def stacks(self, batch: Any = None) -> tuple[StackShape, ...]:
        """The stacks of layers, on batches like this one; without a batch, lengths mean nothing."""
        raise NotImplementedError

    def real_tokens(self, batch: Any) -> tuple[Bool[Array | np.ndarray, "B _"], ...]:
        """Masks of the tokens of each stack that are no padding."""
        raise NotImplementedError

    def sublayers(self, stack: StackShape, i: int) -> tuple[Sublayer, ...]:
        """The parts of layer i of a stack, in order: the only definition of what a layer contains."""
        attention = self.attention[i % len(self.attention)]
        found = [Sublayer("attention", "attention", attention)]
        if stack.M:
            found.append(Sublayer("cross", "attention", attention.for_memory(), memory=True))
        if i not in sparse_layers(self.moe_layers, self.N):
            return (*found, Sublayer("ffn", "dense", self.ffn))
        routed = isinstance(stack.moe, MoEConfig)
        found.append(Sublayer("moe", "moe", stack.moe) if routed else Sublayer("ffn", "dense", stack.moe))
        return (
            *found,
            *([] if self.dense_after_moe is None else [Sublayer("dense_after_moe", "dense", self.dense_after_moe)]),
        )

    @property
    def routed_layers(self) -> tuple[int, ...]:
        """The layer number, over all stacks, of every MoE layer."""
        return tuple(part.layer for part in placed_sublayers(self) if part.sub.kind == "moe")

    @property
    def n_moe_layers(self) -> int:
        """Number of MoE layers."""
        return len(self.routed_layers)

    @property
    def routed(self) -> MoEConfig | None:
        """The config of the MoE layers; None where no layer routes."""
        if not isinstance(self.moe, MoEConfig):
            return None
        kinds = (layer for stack in self.stacks() for layer in layer_counts(self, stack))
        return self.moe if any(sub.kind == "moe" for layer in kinds for sub in layer) else None

    @property
    def embeds_positions(self) -> bool:
        """Tells whether sines and cosines of positions are added to the embeddings."""
        return any(isinstance(part.position, Sinusoidal) for part in self.attention)

    @property
    def stack_params(self) -> dict[str, Mapping[str, int]]:
        """Sizes of the letters of the parameters that all layers of a stack share, by name."""
        return {name: part.sizes for part in self.attention for name in part.stack_params}

    def _sharing(self, name: str) -> list[Any]:
        return [part for part in self.attention if name in part.stack_params]

    def init_router(self) -> LayerState:
        """The state of all MoE layers before the first step ({} for most)."""
        return {} if self.routed is None else self.routed.init_state(self.n_moe_layers)

    def dropless(self) -> Any:
        """Returns the model with dropless layers: no capacity."""
        if not isinstance(self.moe, MoEConfig):
            return self
        return dataclasses.replace(self, moe=self.moe.dropless())

    def dense_baseline(self) -> Any:
        """The dense model with the same active matrix multiplications per token, up to the router's.

        Every MoE becomes one expert of K times the hidden width, plus the shared one's.
        """
        moe = self.moe
        if not isinstance(moe, MoEConfig):
            return self
        if moe.shared is not None and dataclasses.replace(moe.shared, F=1) != dataclasses.replace(moe.experts, F=1):
            raise ValueError(
                f"The shared expert {moe.shared} is of another kind than {moe.experts}; no single dense baseline."
            )
        F = moe.router.K * moe.experts.F + (moe.shared.F if moe.shared is not None else 0)
        return dataclasses.replace(self, moe=dataclasses.replace(moe.experts, F=F))


def not_causal(moe: MoEConfig) -> str:
    """Explains why a layer's routing depends on later tokens, and what to do."""
    if not moe.traits.causal:
        return (
            f"{type(moe.router).__name__}() decides about a token by later ones; in a language model use "
            "a router that is causal, or say causal=False."
        )
    if getattr(moe.exchange, "buffer", None):
        return (
            f"{moe.exchange} shares its room with later tokens; in a language model use buffer=None, "
            "or say causal=False."
        )
    return (
        f"Slot priority {moe.dispatch.priority!r} lets later tokens take earlier ones' slots; in a "
        "language model use 'token-major', or say causal=False."
    )


class StackInputs(NamedTuple):
    """The inputs of all layers of a stack, other than x."""

    sees: Sees
    ids: Ids
    memory_BMD: Float[Array, "B M D"] | None = None  # what every layer also attends to
    memory_sees: Sees | None = None  # visibility of the memory


def stack(
    cfg: TransformerConfig, shape: StackShape, x_BLD: Float[Array, "B L D"], inputs: StackInputs, call: Call
) -> tuple[Float[Array, "B L D"], list[Aux]]:
    """Applies the layers of a stack, as submodules of the calling module; returns reports of MoE layers by block.

    call: router state and replay of the MoE layers of this stack only.
    """
    reports, first = [], 0
    for i, block in enumerate(blocks(cfg, shape)):
        n, m = block.n, block.n_moe_layers
        keys_N = None if call.key is None else jax.random.split(jax.random.fold_in(call.key, i), n)
        layers = slice(first, first := first + n * m)
        own = jax.tree.map(lambda a: a[layers].reshape(n, m, *a.shape[1:]), (call.router or {}, call.replay))  # noqa: B023
        Stack = nn.scan(
            REMAT[cfg.remat](Block),
            length=n,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast),
        )
        x_BLD, report = Stack(cfg, block, call.record, name=f"{shape.prefix}stack_{i}")(x_BLD, keys_N, own, inputs)
        if report is not None:  # [n, MoE layers in the block, ...] -> [layers, ...]
            reports.append(jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), report))
    return x_BLD, reports


def share_params(module: nn.Module, cfg: TransformerConfig, prefix: str, sees: Sees) -> Sees:
    """Visibility, with the parameters that all layers of a stack share and their bias of scores, computed once."""
    shared = {
        name: parameter(module, prefix + name, sizes, nn.initializers.zeros) for name, sizes in cfg.stack_params.items()
    }
    if "bias_PH" not in shared:
        return sees
    return sees._replace(shared=shared, bias_1HLM=table_bias(shared["bias_PH"], sees.segment_BL.shape[1], sees.order))


class Block(nn.Module):
    """The layers that a stack repeats: x + part(norm(x)) for every part of every layer."""

    cfg: TransformerConfig
    repeated: RepeatedLayers
    record: tuple[str, ...] = ()

    @nn.compact
    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        key: Key[Array, ""] | None,
        own: tuple[LayerState, Int[Array, "M B L K"] | None],
        inputs: StackInputs,
    ) -> tuple[Float[Array, "B L D"], Aux | None]:
        """own: state and replayed choices of the MoE layers among the repeated ones."""
        reports = list[Aux]()
        for i, layer in enumerate(self.repeated.layers):
            routed = 0  # MoE layers of this layer so far
            for sub in layer:
                name = f"{sub.name}_{i}"
                h_BLD = NORMS[self.cfg.norm](name=f"norm_{name}")(x_BLD)
                if sub.kind == "moe":
                    number = i + routed * len(self.repeated.layers)
                    layer_key = None if key is None else jax.random.fold_in(key, number)
                    state, replay_BLK = jax.tree.map(lambda a: a[len(reports)], own)
                    ids, real_BL = inputs.ids._replace(expert_BLK=replay_BLK), inputs.sees.segment_BL > 0
                    given = (real_BL, layer_key, state, ids, self.record)
                    y_BLD, aux = MoE(sub.part, name=name)(h_BLD, *given)
                    reports.append(aux)
                    routed += 1
                elif sub.kind == "attention":
                    memory = (inputs.memory_sees, inputs.memory_BMD) if sub.memory else (inputs.sees, None)
                    y_BLD = Attention(sub.part, self.cfg.init_scale, name=name)(h_BLD, *memory)
                else:
                    y_BLD = FeedForward(sub.part, self.cfg.init_scale, name=name)(h_BLD)
                x_BLD += y_BLD
        return x_BLD, jax.tree.map(lambda *xs: jnp.stack(xs), *reports) if reports else None


def stack_aux(reports: list[Aux]) -> Aux | None:
    """The reports of MoE layers, stacked over them in order; None without any."""
    return count_agreement(jax.tree.map(lambda *xs: jnp.concatenate(xs), *reports)) if reports else None


def count_agreement(aux: Aux) -> Aux:
    """Counts the choices that each MoE layer of a stack but the first shares with the one before it."""
    if aux.expert_BLK is None or len(aux.expert_BLK) < 2:
        return aux
    now, before = aux.expert_BLK[1:, ..., None], aux.expert_BLK[:-1, ..., None, :]
    same = ((now == before) & (now < aux.stats.choices_E.shape[-1])).any(-1)
    here = shard.with_batch_axes(shard.local(), aux.expert_BLK, aux.stats.choices_E)
    shared = here.sum(same.sum((1, 2, 3), dtype=jnp.float32))
    return aux._replace(stats=aux.stats._replace(agreed=shared, compared=aux.stats.choices_E[1:].sum(-1)))


def aux_loss(cfg: TransformerConfig, aux: Aux | None, tokens_N: Float[Array, "N"] | None = None) -> Float[Array, ""]:
    """The auxiliary loss of the model, over all MoE layers.

    tokens_N: where `aux` is of a microbatch, the real tokens of each layer in the whole batch (`layer_tokens`). The
    losses of a layer are weighted by the microbatch's share of them, so that microbatches add up to the batch's.
    """
    if aux is None:
        return jnp.zeros((), jnp.float32)
    loss_N = aux.loss if tokens_N is None else aux.loss * ratio(aux.stats.tokens, tokens_N)
    return loss_N.sum() if cfg.aux_over_layers == "sum" else loss_N.mean()


def layer_tokens(cfg: TransformerConfig, batch: Any, here: Shard) -> Float[Array, "N"]:
    """The real tokens of each MoE layer in a batch, over all shards."""
    counts = jnp.stack([real_BL.sum(dtype=jnp.float32) for real_BL in cfg.real_tokens(batch)])
    return jnp.repeat(here.sum(counts), cfg.n_moe_layers // cfg.STACKS)
