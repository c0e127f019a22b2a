import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.stats import norm
from jaxtyping import Array, Bool, Float

from moe_jax.core.context import Context, draw_by_group
from moe_jax.core.gate import gate, linear
from moe_jax.core.ranges import PositiveInt
from moe_jax.core.routing import TokenChoice, token_choice
from moe_jax.core.scores import check_choices, softmax_at, take_experts


@dataclasses.dataclass(frozen=True)
class NoisyTopK:
    """Gaussian noise on the logits while training, and with it a smooth estimate of every expert's load.

    learned: the noise's scale is softplus(x @ noise_DE); gate and noise start at zero (arXiv:1701.06538, eqs. 3-5,
    8-9). Otherwise it is 1 / E (V-MoE, arXiv:2106.05974, appendix A).
    normalize: softmax over the K noisy logits kept (Shazeer), rather than over all (V-MoE).
    """

    K: PositiveInt = 2
    learned: bool = True
    normalize: bool = True
    random: ClassVar[bool] = True
    distinct: ClassVar[bool] = True
    gives: ClassVar = ("load",)

    def __post_init__(self):
        check_choices(self)

    @property
    def params(self) -> tuple[str, ...]:
        return ("gate_DE", "noise_DE") if self.learned else ("gate_DE",)

    @property
    def zeros(self) -> tuple[str, ...]:
        return self.params if self.learned else ()

    def __call__(
        self,
        params: Mapping[str, Array],
        x_GSD: Float[Array, "G S D"],
        mask_GS: Bool[Array, "G S"],
        ctx: Context = Context(),
    ) -> TokenChoice:
        clean_GSE = gate(x_GSD, params["gate_DE"], ctx)
        probs_GSE, E = jax.nn.softmax(clean_GSE), clean_GSE.shape[-1]
        noisy_GSE, load_GSE = clean_GSE, None
        if ctx.keys_G is not None:
            noise_GSE = draw_by_group(ctx.keys_G, jax.random.normal, clean_GSE.shape[1:])
            std_GSE = jnp.full_like(clean_GSE, 1 / E)
            if self.learned:
                std_GSE = jax.nn.softplus(linear(ctx.input(x_GSD), params["noise_DE"]))
            noisy_GSE = clean_GSE + noise_GSE * std_GSE
            load_GSE = self._load(clean_GSE, noisy_GSE, std_GSE)
        expert_GSK = ctx.top_k(noisy_GSE, self.K)
        if self.normalize:
            weight_GSK = softmax_at(noisy_GSE, expert_GSK)
        else:
            weight_GSK = take_experts(jax.nn.softmax(noisy_GSE), expert_GSK)
        return token_choice(expert_GSK, weight_GSK, clean_GSE, probs_GSE, mask_GS, load_GSE)

    def _load(self, clean_GSE: Array, noisy_GSE: Array, std_GSE: Array) -> Array:
        """The probability that an expert is among the K best under a new draw of its noise."""
        best_GSK = take_experts(noisy_GSE, lax.top_k(noisy_GSE, min(self.K + 1, noisy_GSE.shape[-1]))[1])
        kth_GS1 = best_GSK[..., self.K - 1 : self.K]
        if not self.learned:  # V-MoE: the threshold counts the expert itself
            return normal_cdf((clean_GSE - kth_GS1) / std_GSE)
        if self.K == noisy_GSE.shape[-1]:
            return jnp.ones_like(noisy_GSE)
        others_GSE = jnp.where(noisy_GSE >= kth_GS1, best_GSK[..., -1:], kth_GS1)  # K-th best of the others
        return normal_cdf((clean_GSE - others_GSE) / std_GSE)


@jax.custom_jvp
def normal_cdf(z: Float[Array, "..."]) -> Float[Array, "..."]:
    """The standard normal distribution function; jax 0.12 cannot differentiate `norm.cdf` inside shard_map."""
    return norm.cdf(z)


normal_cdf.defjvps(lambda dz, _, z: dz * norm.pdf(z))
