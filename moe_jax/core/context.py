"""Context of a router's call: keys, state and ids, and the transforms of the router's input and logits."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

NO_GROUP = 2**32 - 1  # folded into keys of what all groups share: groups have smaller numbers, folded in as well
FAR = -1e9  # the logit of an expert that cannot be chosen: as good as minus infinity, and no NaN


class Ids(NamedTuple):
    """Numbers that come with tokens: in the vocabulary, of a task or domain, of recorded choices to replay."""

    token_BL: Int[Array, "B L"] | None = None
    task_BL: Int[Array, "B L"] | None = None
    expert_BLK: Int[Array, "B L K"] | None = None


@dataclasses.dataclass(frozen=True)
class Context:
    """Context of one call of a router. Without keys (evaluation) nothing is random.

    E: the number of experts.
    keys_G: the noise of each group; key: that of the step, which all groups share.
    state: the router's state, and `step_`, the number of updates so far.
    gating: transforms of the router's input and logits, in order (`moe_jax.gating`).
    group_G: the number of each group in the whole batch.
    """

    E: int = 0
    keys_G: Key[Array, "G"] | None = None
    key: Key[Array, ""] | None = None
    state: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    token_GS: Int[Array, "G S"] | None = None
    task_GS: Int[Array, "G S"] | None = None
    replay_GSK: Int[Array, "G S K"] | None = None
    gating: tuple[Any, ...] = ()
    group_G: Int[Array, "G"] | None = None

    @property
    def training(self) -> bool:
        return self.keys_G is not None

    def ids(self, what: str, router: Any) -> Int[Array, "G S"]:
        """Token or task ids; ValueError where the layer was called without."""
        ids_GS = getattr(self, f"{what}_GS")
        if ids_GS is None:
            raise ValueError(f"{type(router).__name__} routes by {what} ids; call the layer with Ids({what}_BL=...).")
        return ids_GS

    def get_state(self, name: str, router: Any) -> Array:
        """An array of the router's state; ValueError where the layer was called without."""
        if name not in self.state:
            raise ValueError(
                f"{type(router).__name__} keeps {name} from step to step, but the layer was called without state; "
                "start with state=config.init_state()."
            )
        return self.state[name]

    def input(self, x_GSD: Float[Array, "G S D"]) -> Float[Array, "G S D"]:
        """Transforms the router's input, in float32 where a transform applies; experts get the tokens unchanged."""
        for i, transform in enumerate(self.gating):
            if transform.on == "input":
                x_GSD = transform(x_GSD.astype(jnp.float32), self, self._keys(i))
        return x_GSD

    def transform(self, logits: Float[Array, "G S I"]) -> Float[Array, "G S I"]:
        """Logits, of experts or anything else, after temperature, noise, ..."""
        for i, transform in enumerate(self.gating):
            if transform.on == "logits":
                logits = transform(logits, self, self._keys(i))
        return logits

    def logits(self, logits_GSE: Float[Array, "G S E"]) -> Float[Array, "G S E"]:
        """Logits of experts after all transforms, with `FAR` for those dropped in this step."""
        logits_GSE = self.transform(logits_GSE)
        if (dropped_GE := self.dropped()) is None:
            return logits_GSE
        some_GE = dropped_GE & ~dropped_GE.all(-1, keepdims=True)  # if all experts are dropped, keep the logits
        return jnp.where(some_GE[:, None], FAR, logits_GSE)

    def dropped(self) -> Bool[Array, "G E"] | None:
        """Experts that no token may choose in this step: dropped at random in training, or masked always."""
        now = [(i, t) for i, t in enumerate(self.gating) if t.on == "experts" and (self.training or not t.random)]
        found = [t(self, self._step_key(i) if t.random else None) for i, t in now]
        return sum(found[1:], found[0]) if found else None

    def top_k(self, score_GSE: Float[Array, "G S I"], K: int) -> Int[Array, "G S K"]:
        """The K experts of the largest scores, ties to the lower index; the recorded ones in a replay.

        Null experts, which come after the E experts, are never dropped.
        """
        if self.replay_GSK is not None:
            return self.replay_GSK
        best_GSK, expert_GSK = lax.top_k(self.mask_dropped(score_GSE), K)
        # Otherwise XLA merges later slices of the choices into the selection, and then sorts all E scores.
        expert_GSK = lax.optimization_barrier(expert_GSK)
        return expert_GSK if self.dropped() is None else jnp.where(best_GSK > -jnp.inf, expert_GSK, self.E)

    def mask_dropped(self, score_GSE: Float[Array, "G S I"]) -> Float[Array, "G S I"]:
        """Scores, minus infinity for experts that no token may choose in this step."""
        if (dropped_GE := self.dropped()) is None:
            return score_GSE
        masked_GE = jnp.pad(dropped_GE, ((0, 0), (0, score_GSE.shape[-1] - self.E)))
        return jnp.where(masked_GE[:, None], -jnp.inf, score_GSE)

    def override(self, expert_GSK: Int[Array, "G S K"]) -> Int[Array, "G S K"]:
        """Choices made outside `top_k`, with the replay and the dropped experts that `top_k` applies."""
        if self.replay_GSK is not None:
            return self.replay_GSK
        if (dropped_GE := self.dropped()) is None:
            return expert_GSK
        masked_GE = jnp.pad(dropped_GE, ((0, 0), (0, 1)))
        return jnp.where(masked_GE[jnp.arange(len(expert_GSK))[:, None, None], expert_GSK], self.E, expert_GSK)

    def _keys(self, i: int) -> Key[Array, "G"] | None:
        if self.keys_G is None:
            return None
        return jax.vmap(partial(jax.random.fold_in, data=i + 1))(self.keys_G)

    def _step_key(self, i: int) -> Key[Array, ""]:
        assert self.key is not None
        return jax.random.fold_in(jax.random.fold_in(self.key, NO_GROUP), i)


def draw_by_group(keys_G: Key[Array, "G"], sample: Any, shape: tuple[int, ...], **options: Any) -> Array:
    """[G, *shape] of `sample` (jax.random.uniform, ...) in float32, each group from its own key."""
    return jax.vmap(lambda key: sample(key, shape, jnp.float32, **options))(keys_G)
