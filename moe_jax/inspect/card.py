"""The card of an expert: the tokens it serves, its additions to the residual stream, and the loss without it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from moe_jax.core.groups import Dense
from moe_jax.inspect.knockout import Effects
from moe_jax.inspect.look import LayerTrace
from moe_jax.models.pattern import check_expert, layer_params


class Share(NamedTuple):
    """Share of an expert's choices that one domain or token has; lift: over its share of all tokens."""

    what: int
    n: int
    share: float
    lift: float


class Card(NamedTuple):
    """Card of one expert: load, drops, domains, tokens, and additions to the residual stream.

    load: its choices over the mean of its layer's experts. drop_rate: of its choices. weight: mean of those kept.
    writes: mean length of its addition (output times weight) to the residual stream of a token that it serves.
    drop_rate is None without choices, weight and writes where it serves no token.
    promotes: the vocabulary entries with the largest logits of its mean addition, read through the final norm's scale
        and the unembedding (the logit lens, nostalgebraist 2020; arXiv:2303.08112), without the norm's division.
    rise: of the loss without it, nats per target, over all and by domain; None where no knock-out was done.
    """

    layer: int
    expert: int
    choices: int
    load: float
    drop_rate: float | None
    weight: float | None
    domains: tuple[Share, ...]
    tokens: tuple[Share, ...]
    writes: float | None
    promotes: tuple[tuple[int, float], ...]
    rise: float | None
    rise_by_domain: tuple[float, ...] | None


def card(
    model: Any, params: Any, trace: LayerTrace, layer: int, expert: int, effects: Effects | None = None, top: int = 8
) -> Card:
    """An expert of a language model, from a trace of some text and, if given, its knock-out."""
    check_expert(model, layer, expert)
    chosen_TK = trace.expert_NTK[layer] == expert
    kept_TK, served_T = chosen_TK & trace.kept_NTK[layer], chosen_TK.any(1)
    choices, E = int(chosen_TK.sum()), model.moe.E
    all_choices = max(int((trace.expert_NTK[layer] < E).sum()), 1)
    added_TD = additions(model, params, trace, layer, expert)
    rise, by_domain = None, None
    if effects is not None and (layer, expert) in effects.expert_P:
        p = effects.expert_P.index((layer, expert))
        rise, by_domain = float(effects.rise_P[p]), tuple(float(r) for r in effects.rise_PZ[p])
    return Card(
        layer=layer,
        expert=expert,
        choices=choices,
        load=choices * E / all_choices,
        drop_rate=1 - int(kept_TK.sum()) / choices if choices else None,
        weight=float(trace.weight_NTK[layer][kept_TK].mean()) if kept_TK.any() else None,
        domains=shares(trace.domain_T, served_T, top),
        tokens=shares(trace.token_T, served_T, top),
        writes=float(np.linalg.norm(added_TD, axis=1).mean()) if len(added_TD) else None,
        promotes=promoted(params, added_TD.mean(0), top) if len(added_TD) else (),
        rise=rise,
        rise_by_domain=by_domain,
    )


def shares(what_T: np.ndarray, served_T: np.ndarray, top: int) -> tuple[Share, ...]:
    """Shares of the values of the tokens that an expert serves, the most frequent first."""
    values, count = np.unique(what_T[served_T], return_counts=True)
    total = max(int(served_T.sum()), 1)
    order = np.argsort(-count, kind="stable")[:top]
    found = ((int(values[i]), int(count[i]), int(count[i]) / total) for i in order)
    return tuple(Share(v, n, share, share / float(np.mean(what_T == v))) for v, n, share in found)


def additions(model: Any, params: Any, trace: LayerTrace, layer: int, expert: int) -> Float[np.ndarray, "_ D"]:
    """Additions of an expert to the residual stream, for each token whose choice was kept: output times weight."""
    t, k = np.nonzero((trace.expert_NTK[layer] == expert) & trace.kept_NTK[layer])
    weights = layer_params(model, params, layer)
    own = {name: jnp.asarray(weights[name][expert]) for name in model.moe.experts.params}
    y_TD = np.asarray(_run(model.moe.experts, own, jnp.asarray(trace.input_NTD[layer][t])), np.float64)
    return y_TD * trace.weight_NTK[layer][t, k, None]


def _run(expert: Any, params: dict[str, Array], x_TD: Array) -> Array:
    with jax.default_matmul_precision("highest"):
        return expert(params, x_TD, Dense())


def promoted(params: Any, direction_D: Float[np.ndarray, "D"], top: int) -> tuple[tuple[int, float], ...]:
    """The vocabulary entries that a direction of the residual stream raises most, and by how much."""
    head_DV = params["head_DV"] if "head_DV" in params else np.asarray(params["embed_VD"]).T
    logits_V = (direction_D * np.asarray(params["norm"]["scale_D"], np.float64)) @ np.asarray(head_DV, np.float64)
    return tuple((int(v), float(logits_V[v])) for v in np.argsort(-logits_V, kind="stable")[:top])


def card_text(
    card: Card, domains: Sequence[str] = (), decode: Callable[[int], str] = str, layer: str | None = None
) -> str:
    """A card in a few lines; decode: a token, as words; layer: its name."""
    name = lambda z: domains[z] if 0 <= z < len(domains) else str(z)  # noqa: E731
    of_domains = ", ".join(f"{name(s.what)} {s.share:.0%} ({s.lift:.1f}x)" for s in card.domains)
    of_tokens = ", ".join(f"{decode(s.what)!r} {s.share:.0%} ({s.lift:.1f}x)" for s in card.tokens)
    dropped = "" if card.drop_rate is None else f", {card.drop_rate:.1%} dropped"
    weight = "" if card.weight is None else f", mean weight {card.weight:.3f}"
    lines = [
        f"expert {card.expert} of {layer or f'MoE layer {card.layer}'}: {card.choices} choices, "
        f"{card.load:.2f}x the mean load{dropped}{weight}",
        f"  serves   {of_domains or 'no token'}",
        f"  tokens   {of_tokens or 'none'}",
    ]
    if card.writes is not None:
        promoted = ", ".join(repr(decode(v)) for v, _ in card.promotes)
        lines.append(f"  writes   {card.writes:.3g} per token; promotes {promoted}")
    if card.rise is not None and card.rise_by_domain is not None:
        parts = [f"{name(z)} {rise:+.4f}" for z, rise in enumerate(card.rise_by_domain) if np.isfinite(rise)]
        lines.append(f"  without  {card.rise:+.4f} nats; {', '.join(parts)}")
    return "\n".join(lines)
