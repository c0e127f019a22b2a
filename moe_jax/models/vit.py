"""A vision transformer with sparse layers, V-MoE (arXiv:2106.05974)."""

import dataclasses
from typing import Any, ClassVar, cast

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Key

from moe_jax.attention import NoPE, Order, Sees
from moe_jax.core import dims
from moe_jax.core.context import Ids
from moe_jax.core.parameter import parameter, weight
from moe_jax.core.ranges import PositiveInt
from moe_jax.models.blocks import LayerNorm
from moe_jax.models.pattern import StackShape
from moe_jax.models.transformer import Call, StackInputs, TransformerConfig, stack, stack_aux
from moe_jax.moe import Aux


@dataclasses.dataclass(frozen=True)
class ViTConfig(TransformerConfig):
    """A classifier of images: V classes, read from a token of its own.

    patch: side of the square patches that are its tokens. image: height, width and channels.
    representation: whether a dense layer with tanh stands before the head, as in pre-training (arXiv:2010.11929).
    Positions are learned, one for each patch; routing may depend on the whole batch, since nothing is generated.
    """

    patch: PositiveInt = 16
    image: tuple[PositiveInt, ...] = (224, 224, 3)
    representation: bool = False
    causal: bool = False
    batch_kind: ClassVar = "images"
    norm: ClassVar = "layer"

    def __post_init__(self):
        super().__post_init__()
        if len(self.image) != 3:
            raise ValueError(f"image={self.image} must be height, width and channels.")
        if self.image[0] % self.patch or self.image[1] % self.patch:
            raise ValueError(f"Patches of {self.patch} do not cut {self.image[0]} x {self.image[1]} images evenly.")
        if self.causal:
            raise ValueError("An image has no order: leave causal=False.")
        for part in self.attention:
            if not isinstance(part.position, NoPE) or part.window is not None:
                raise ValueError(
                    f"An image has no order, and a ViT learns its positions: {part} must have position=NoPE() and "
                    "window=None."
                )

    @property
    def L(self) -> int:
        """Tokens of an image: its patches, and one to classify by."""
        return 1 + (self.image[0] // self.patch) * (self.image[1] // self.patch)

    def init(self, key: Key[Array, ""], batch: Any) -> Any:
        """Parameters, for batches like this one."""
        return ViT(self).init(key, batch.image_BYXC)["params"]

    def apply(self, params: Any, batch: Any, call: Call = Call()) -> tuple[Float[Array, "B 1 V"], Aux | None]:
        """Logits on `data.Images`, and the reports of the MoE layers; domains are tasks."""
        given = (batch.image_BYXC, batch.loss_mask_BL[:, 0], batch.domain_B, call)
        return cast(tuple[Array, Aux | None], ViT(self).apply({"params": params}, *given))

    def stacks(self, batch: Any = None) -> tuple[StackShape, ...]:
        """The stack of layers."""
        return (StackShape("", self.L, 0, self.moe, Order.BOTH),)

    def real_tokens(self, batch: Any) -> tuple[Bool[Array | np.ndarray, "B L"], ...]:
        """The mask of the patches, and tokens to classify by, of images that are no padding."""
        return (jnp.broadcast_to(batch.loss_mask_BL, (len(batch.loss_mask_BL), self.L)),)


class ViT(nn.Module):
    """Logits of an image, and reports of the MoE layers, stacked over them in order (None without MoE layers)."""

    cfg: ViTConfig

    @nn.compact
    def __call__(
        self,
        image_BYXC: Float[Array, "B Y X C"],
        real_B: Bool[Array, "B"] | None = None,
        task_B: Int[Array, "B"] | None = None,
        call: Call = Call(),
    ) -> tuple[Float[Array, "B 1 V"], Aux | None]:
        """real_B: mask of images that are no padding. task_B: a task for each image."""
        cfg, B = self.cfg, len(image_BYXC)
        if real_B is None:
            real_B = jnp.ones(B, bool)
        if self.is_initializing():
            call = call._replace(router=cfg.init_router())
        patch_BLI = patches(image_BYXC, cfg.patch).astype(cfg.dtype)
        sizes = {**vars(cfg), "I": patch_BLI.shape[-1], "L": cfg.L, "O": cfg.D}

        def matrix(name: str, init: Any = None) -> Array:
            return weight(self, name, sizes, init or dims.kernel_init(dims.dims_of(name)), cfg.dtype)

        def vector(name: str) -> Array:
            return parameter(self, name, sizes, nn.initializers.zeros).astype(cfg.dtype)

        x_BLD = jnp.einsum("bli,id->bld", patch_BLI, matrix("patch_ID")) + vector("patch_D")[None, None]
        class_BLD = jnp.broadcast_to(vector("class_D"), (B, 1, cfg.D))
        x_BLD = jnp.concatenate([class_BLD, x_BLD], axis=1)
        x_BLD += matrix("position_LD", nn.initializers.normal(0.02))[None]
        per_token = lambda a_B: jnp.broadcast_to(a_B[:, None], (B, cfg.L))  # noqa: E731
        position_BL = jnp.broadcast_to(jnp.arange(cfg.L), (B, cfg.L))
        sees = Sees(per_token(real_B).astype(jnp.int32), position_BL, Order.BOTH)
        inputs = StackInputs(sees, Ids(task_BL=None if task_B is None else per_token(task_B)))
        x_BLD, reports = stack(cfg, cfg.stacks()[0], x_BLD, inputs, call)
        x_BLD = LayerNorm(name="norm")(x_BLD[:, :1])
        if cfg.representation:
            x_BLD = jnp.einsum("bld,do->blo", x_BLD, matrix("representation_DO"))
            x_BLD = jnp.tanh(x_BLD + vector("representation_D")[None, None])
        logits_BLV = jnp.einsum("bld,dv->blv", x_BLD, matrix("head_DV")) + vector("head_V")[None, None]
        return logits_BLV.astype(jnp.float32), stack_aux(reports)


def patches(image_BYXC: Float[Array, "B Y X C"], side: int) -> Float[Array, "B L I"]:
    """Square patches of images, row by row, each as one vector."""
    B, Y, X, C = image_BYXC.shape
    cut = image_BYXC.reshape(B, Y // side, side, X // side, side, C)
    return cut.swapaxes(2, 3).reshape(B, Y // side * (X // side), side * side * C)
