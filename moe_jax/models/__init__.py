"""Models: Linen shells around the pure functions of the layers below. One line here registers one."""

from moe_jax.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from moe_jax.models.lm import LM, LMConfig
from moe_jax.models.transformer import Call, TransformerConfig, aux_loss, layer_tokens
from moe_jax.models.vit import ViT, ViTConfig

Model = LMConfig | EncoderDecoderConfig | ViTConfig
MODELS: dict[str, type] = {
    "LM": LMConfig,
    "EncoderDecoder": EncoderDecoderConfig,
    "ViT": ViTConfig,
}  # config.model.kind

__all__ = [
    "LM",
    "MODELS",
    "Call",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "LMConfig",
    "Model",
    "TransformerConfig",
    "ViT",
    "ViTConfig",
    "aux_loss",
    "layer_tokens",
]
