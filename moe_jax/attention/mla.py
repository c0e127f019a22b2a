import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.attention.heads import Cache, extend, init_cache, mask_overflow, merge_heads, project, rms_norm
from moe_jax.attention.mha import GATES
from moe_jax.attention.positions import NoPE, Rotary
from moe_jax.attention.scores import Scores, attend
from moe_jax.attention.sees import Sees
from moe_jax.core.quoted import quoted
from moe_jax.core.ranges import PositiveFloat, PositiveInt, check_ranges
from moe_jax.core.shard import Shard


@dataclasses.dataclass(frozen=True)
class MLA:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, sec. 2.1): a cache of W + U numbers for a token.

    Keys and values of all heads are made from a normalised latent of rank W; the rotated part of keys is one for all
    heads. Heads are [without position, rotated]; pairs that rotate are halves (a, a + U/2), as everywhere.
    H: heads. A, U: widths of a head of queries and keys without position, and of its rotated part. O: of values.
    Q: rank of a normalised latent of queries; None makes them from x.
    position: Rotary(), or NoPE(), under which nothing rotates.
    window, gate: as `MHA` has them.
    scale: of scores; None is 1 / sqrt(A + U), under YaRN with mscale_all_dim times m^2 (DeepSeek-V3, see `YaRN`).
    """

    H: PositiveInt
    A: PositiveInt
    U: PositiveInt
    O: PositiveInt
    W: PositiveInt
    Q: PositiveInt | None = None
    position: Any = Rotary()
    window: PositiveInt | None = None
    gate: str = "none"
    scale: PositiveFloat | None = None
    stack_params: ClassVar[tuple[str, ...]] = ()
    of_memory: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        check_ranges(self)
        if not isinstance(self.position, (Rotary, NoPE)):
            raise ValueError(f"MLA(position={quoted(self.position)}) does not fit a latent; use Rotary() or NoPE().")
        if self.gate not in GATES:
            raise ValueError(f"MLA(gate={self.gate!r}) is unknown; use one of {', '.join(map(repr, GATES))}.")
        self.position.check(self.U)

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of the letters of its parameters, the model's width left out."""
        ranks = {"W": self.W} if self.Q is None else {"W": self.W, "Q": self.Q}
        return {"H": self.H, "A": self.A, "U": self.U, "O": self.O, "I": self.A + self.U, **ranks}

    @property
    def params(self) -> tuple[str, ...]:
        """Names of the parameters of a layer, in the order in which they are drawn."""
        queries = ["query_DHI"] if self.Q is None else ["query_down_DQ", "scale_query_Q", "query_QHI"]
        gate = {"none": [], "head": ["gate_DH"], "element": ["gate_DHO"]}[self.gate]
        return (*queries, "latent_DW", "scale_latent_W", "key_rope_DU", "key_WHA", "value_WHO", *gate, "out_HOD")

    @property
    def entering(self) -> str:
        """Widths of the inputs of heads that are sharded: latents and the rotated key; x where heads read it."""
        x = "D" * (self.Q is None or self.gate != "none")
        return x + "Q" * (self.Q is not None) + "WU"

    def for_memory(self) -> "MLA":
        """Refuses attention to a memory."""
        raise ValueError("MLA attends only to its own tokens; use MHA for attention to a memory.")

    def check_tensor(self, tensor: int) -> None:
        """Accepts heads on any number of shards: what heads share is replicated."""

    def score_flops(self, L: int, M: int) -> int:
        """FLOPs of the scores of L queries and M keys and of the weighted values, for all pairs."""
        return 2 * L * M * self.H * (self.A + self.U + self.O)

    def absorbs(self, L: int, M: int) -> bool:
        """Tells whether L queries of M cached latents cost fewer FLOPs than the keys and values computed from them."""
        made = self.W * (self.A + self.O)
        return L * made + L * M * (2 * self.W + self.U) < M * made + L * M * (self.A + self.U + self.O)

    def __call__(
        self,
        params: Mapping[str, Array],
        x_BLD: Float[Array, "B L D"],
        sees: Sees,
        here: Shard = Shard(),
        cache: Cache | None = None,
        memory_BMD: Float[Array, "B M D"] | None = None,
    ) -> tuple[Float[Array, "B L D"], Cache | None]:
        """Attention of x to itself, and the cache with the tokens of x in it.

        params: matrices in the type of x. cache: latents of earlier tokens (`init_cache`), or None.
        Latents are computed on every tensor shard, and enter the heads instead of x: they are narrower.
        """
        if memory_BMD is not None:
            self.for_memory()
        dtype = x_BLD.dtype
        inner_BLD = here.tensor_enter(x_BLD)  # unused where heads read latents
        latent_BMW = rms_norm(project(x_BLD, params["latent_DW"]), (-1,), params["scale_latent_W"])
        rope_BM1U = project(x_BLD, params["key_rope_DU"])[:, :, None]
        rope_BMU = self.position.rotate(rope_BM1U, sees.position_BL)[:, :, 0]
        if self.Q is None:
            q_BLHI = project(inner_BLD, params["query_DHI"])
        else:
            query_BLQ = rms_norm(project(x_BLD, params["query_down_DQ"]), (-1,), params["scale_query_Q"])
            q_BLHI = project(here.tensor_enter(query_BLQ), params["query_QHI"])
        q_BLHA, q_BLHU = jnp.split(q_BLHI, [self.A], axis=-1)
        q_BLHU = self.position.rotate(q_BLHU, sees.position_BL)
        new = None
        if cache is not None:
            both, sees, new = extend(cache, {"latent_BMW": latent_BMW, "rope_BMU": rope_BMU}, sees, self.window)
            latent_BMW, rope_BMU = (both[name].astype(dtype) for name in ("latent_BMW", "rope_BMU"))
        latent_BMW, rope_BMU = here.tensor_enter((latent_BMW, rope_BMU))
        rope_BM1U = rope_BMU[:, :, None]
        if cache is not None and self.absorbs(q_BLHA.shape[1], latent_BMW.shape[1]):
            q_BLHW = jnp.einsum("blha,wha->blhw", q_BLHA, params["key_WHA"])
            k_BM1I = jnp.concatenate([latent_BMW[:, :, None], rope_BM1U], axis=-1)
            y_BLHW = self._attend(jnp.concatenate([q_BLHW, q_BLHU], -1), k_BM1I, latent_BMW[:, :, None], sees)
            y_BLHO = jnp.einsum("blhw,who->blho", y_BLHW, params["value_WHO"])
        else:
            k_BMHA = project(latent_BMW, params["key_WHA"])
            rope_BMHU = jnp.broadcast_to(rope_BM1U, (*k_BMHA.shape[:3], self.U))
            v_BMHO = project(latent_BMW, params["value_WHO"])
            q_BLHI = jnp.concatenate([q_BLHA, q_BLHU], -1)
            y_BLHO = self._attend(q_BLHI, jnp.concatenate([k_BMHA, rope_BMHU], -1), v_BMHO, sees)
        if self.gate == "head":
            y_BLHO *= jax.nn.sigmoid(project(inner_BLD, params["gate_DH"]))[..., None]
        if self.gate == "element":
            y_BLHO *= jax.nn.sigmoid(project(inner_BLD, params["gate_DHO"]))
        y_BLD = here.tensor_exit(merge_heads(y_BLHO, params["out_HOD"]))
        return (y_BLD, None) if cache is None else (mask_overflow(y_BLD, cache, sees, self.window), new)

    def _attend(self, q_BLHI: Array, k_BMJI: Array, v_BMJO: Array, sees: Sees) -> Float[Array, "B L H O"]:
        """Attends with scores scaled by the width of a head, in any form of the queries."""
        scaling = getattr(self.position, "scaling", None)
        scale = self.scale
        if scale is None:
            scale = (self.A + self.U) ** -0.5 * (1.0 if scaling is None else scaling.sharpness)
        return attend(Scores(q_BLHI, k_BMJI, v_BMJO, sees, self.window, scale=scale))

    def init_cache(self, B: int, M: int, dtype: Any = jnp.float32) -> Cache:
        """An empty cache for B sequences of at most M tokens; of a window's size where there is one."""
        room = M if self.window is None else min(M, self.window)
        return init_cache(B, room, {"latent_BMW": (self.W,), "rope_BMU": (self.U,)}, dtype)
