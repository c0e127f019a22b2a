import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.attention.heads import Cache, extend, init_cache, mask_overflow, merge_heads, project, rms_norm
from moe_jax.attention.positions import BUCKETS, POSITIONS, NoPE, Rotary
from moe_jax.attention.scores import Scores, attend
from moe_jax.attention.sees import Sees
from moe_jax.core.quoted import quoted
from moe_jax.core.ranges import PositiveFloat, PositiveInt, check_ranges
from moe_jax.core.shard import Shard

QK_NORMS = ("none", "head", "all")
GATES = ("none", "head", "element")


@dataclasses.dataclass(frozen=True)
class MHA:
    """Multi-head attention (arXiv:1706.03762), with grouped queries, windows, positions, norms, sinks and gates.

    H: heads. A: width of a head. J: heads of keys and values, each for H / J heads of queries (GQA, arXiv:2305.13245);
        None is one for each head.
    position: encoding of positions: Rotary(), Relative(), Sinusoidal() or NoPE().
    qk_norm: queries and keys divided by their root mean square by "head" (Qwen3), over "all" heads (OLMoE), or "none".
    window: number of positions that a query sees, its own and those before; None for all (arXiv:2004.05150).
    bias: of all four projections. sinks: a learned score of every head for a key without value, which absorbs
        attention that goes to no token (gpt-oss, arXiv:2508.10925).
    gate: outputs times a sigmoid of the input, one number for each "head" or "element", or "none" (arXiv:2505.06708).
    scale: of scores; None is 1 / sqrt(A).
    """

    H: PositiveInt
    A: PositiveInt
    J: PositiveInt | None = None
    position: Any = Rotary()
    qk_norm: str = "none"
    window: PositiveInt | None = None
    bias: bool = False
    sinks: bool = False
    gate: str = "none"
    scale: PositiveFloat | None = None
    of_memory: ClassVar[tuple[str, ...]] = ("key_DJA", "value_DJA")  # matrices applied to the tokens of keys
    entering: ClassVar[str] = "D"  # widths of the inputs of heads that are sharded

    def __post_init__(self):
        check_ranges(self)
        if self.J is not None and self.H % self.J:
            raise ValueError(f"J={self.J} heads of keys and values do not divide H={self.H}; make H a multiple.")
        for name, known in {"qk_norm": QK_NORMS, "gate": GATES}.items():
            if getattr(self, name) not in known:
                words = ", ".join(map(repr, known))
                raise ValueError(f"MHA({name}={quoted(getattr(self, name))}) is unknown; use one of {words}.")
        if not isinstance(self.position, POSITIONS):
            names = ", ".join(f"{c.__name__}()" for c in POSITIONS)
            raise ValueError(f"MHA(position={quoted(self.position)}) is no position; use one of {names}.")
        self.position.check(self.A)

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of the letters of its parameters, the model's width left out."""
        return {"H": self.H, "J": self.J or self.H, "A": self.A, "P": BUCKETS}

    @property
    def params(self) -> tuple[str, ...]:
        """Names of the parameters of a layer, in the order in which they are drawn."""
        found = ["query_DHA", "key_DJA", "value_DJA"]
        found += ["query_HA", "key_JA", "value_JA"] * self.bias
        found += {"none": [], "head": ["scale_query_A", "scale_key_A"], "all": ["scale_query_HA", "scale_key_JA"]}[
            self.qk_norm
        ]
        found += [*self.position.params, *["sink_H"] * self.sinks]
        found += {"none": [], "head": ["gate_DH"], "element": ["gate_DHA"]}[self.gate]
        return (*found, "out_HAD", *["out_D"] * self.bias)

    @property
    def stack_params(self) -> tuple[str, ...]:
        """Names of parameters that all layers of a stack share."""
        return self.position.stack_params

    def for_memory(self) -> "MHA":
        """Returns the attention to a memory, whose tokens have no positions relative to x."""
        return dataclasses.replace(self, position=NoPE(), window=None)

    def check_tensor(self, tensor: int) -> None:
        """Refuses heads that cannot be sharded over this many shards."""
        if self.qk_norm == "all" and tensor > 1:
            raise ValueError(
                f"qk_norm='all' needs all heads on one shard, but mesh.tensor={tensor}; set it to 1, or qk_norm='head'."
            )

    def score_flops(self, L: int, M: int) -> int:
        """FLOPs of the scores of L queries and M keys and of the weighted values, for all pairs."""
        return 2 * L * M * self.H * (self.A + self.A)

    def __call__(
        self,
        params: Mapping[str, Array],
        x_BLD: Float[Array, "B L D"],
        sees: Sees,
        here: Shard = Shard(),
        cache: Cache | None = None,
        memory_BMD: Float[Array, "B M D"] | None = None,
    ) -> tuple[Float[Array, "B L D"], Cache | None]:
        """Attention of x to itself or to a memory, and the cache with the tokens of x in it.

        params: matrices in the type of x. cache: keys and values of earlier tokens (`init_cache`), or None.
        """
        dtype = x_BLD.dtype
        x_BLD = here.tensor_enter(x_BLD)
        memory_BMD = x_BLD if memory_BMD is None else here.tensor_enter(memory_BMD)
        q_BLHA = project(x_BLD, params["query_DHA"])
        k_BMJA, v_BMJA = project(memory_BMD, params["key_DJA"]), project(memory_BMD, params["value_DJA"])
        if self.bias:
            names = ("query_HA", "key_JA", "value_JA")
            q_BLHA, k_BMJA, v_BMJA = (
                x + params[n].astype(dtype)[None, None] for x, n in zip((q_BLHA, k_BMJA, v_BMJA), names, strict=True)
            )
        if self.qk_norm != "none":
            letters, axes = ("A", (-1,)) if self.qk_norm == "head" else ("HA", (-2, -1))
            q_BLHA = rms_norm(q_BLHA, axes, params["scale_query_" + letters])
            k_BMJA = rms_norm(k_BMJA, axes, params["scale_key_" + letters.replace("H", "J")])
        q_BLHA = self.position.rotate(q_BLHA, sees.position_BL)
        k_BMJA = self.position.rotate(k_BMJA, sees.keys[1])
        new = None
        if cache is not None:
            both, sees, new = extend(cache, {"key_BMJA": k_BMJA, "value_BMJA": v_BMJA}, sees, self.window)
            k_BMJA, v_BMJA = (both[name].astype(dtype) for name in ("key_BMJA", "value_BMJA"))
        bias = self.position.bias(params, sees, cached=cache is not None)
        sink_H = params["sink_H"] if self.sinks else None
        y_BLHA = attend(Scores(q_BLHA, k_BMJA, v_BMJA, sees, self.window, bias, self.scale, sink_H))
        if self.gate == "head":
            y_BLHA *= jax.nn.sigmoid(project(x_BLD, params["gate_DH"]))[..., None]
        if self.gate == "element":
            y_BLHA *= jax.nn.sigmoid(project(x_BLD, params["gate_DHA"]))
        y_BLD = merge_heads(y_BLHA, params["out_HAD"])
        if self.bias:
            y_BLD += here.bias_once("out_D", params["out_D"]).astype(dtype)[None, None]
        y_BLD = here.tensor_exit(y_BLD)
        return (y_BLD, None) if cache is None else (mask_overflow(y_BLD, cache, sees, self.window), new)

    def init_cache(self, B: int, M: int, dtype: Any = jnp.float32) -> Cache:
        """An empty cache for B sequences of at most M tokens; of a window's size where there is one."""
        J = self.J or self.H
        room = M if self.window is None else min(M, self.window)
        return init_cache(B, room, {"key_BMJA": (J, self.A), "value_BMJA": (J, self.A)}, dtype)
