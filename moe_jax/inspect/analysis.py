"""Analysis of a recording, as named arrays and plain values: the contents of the report and its JSON."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moe_jax.inspect.balance import (
    check_same_tokens,
    dead_experts,
    drop_rate_by,
    entropy_by,
    expert_choices,
    expert_load,
    load_percentiles,
    repeated_drops,
    router_margin,
)
from moe_jax.inspect.fairness import between_domains
from moe_jax.inspect.knockout import Effects
from moe_jax.inspect.paths import coactivation, layer_dependence, path_statistics, transitions
from moe_jax.inspect.recording import Recording
from moe_jax.inspect.similarity import chosen_together, duplicates, router_saturation, weight_similarity
from moe_jax.inspect.specialisation import domain_information, domain_specialisation, vocabulary_specialisation

POSITION_BINS = 32  # bins of positions
MOST_TOKENS = 8  # of an expert, at most


def layer_names(model: Any, stack: str = "decoder") -> list[str]:
    """Names of a stack's MoE layers: their numbers among all layers of the stack."""
    first = model.N if model.STACKS > 1 and stack == "decoder" else 0
    return [f"layer {n - first}" for n in model.routed_layers if first <= n < first + model.N]


def analyse(rec: Recording, names: Sequence[str], decode: Callable[[int], str] | None = None) -> dict[str, Any]:
    """Analyses a single recording. names: of its layers. decode: token id -> text."""
    domains = list(rec.domains) or [str(z) for z in range(int(rec.domain_T.max(initial=0)) + 1)]
    several = len(np.unique(rec.domain_T[rec.domain_T >= 0])) > 1
    loss = rec.loss_T[np.isfinite(rec.loss_T)]
    return {
        "tokens": rec.tokens,
        "sequences": len(np.unique(rec.sequence_T)),
        "layers": list(names),
        "E": rec.E,
        "K": rec.K,
        "domains": domains,
        "loss": float(loss.mean()) if loss.size else None,
        "choices": expert_choices(rec),
        "load": expert_load(rec),
        "load_percentiles": load_percentiles(rec),
        "dead": dead_experts(rec),
        "drop_rate": rec.dropped_TNK.sum((0, 2)) / np.maximum(rec.taken_TNK.sum((0, 2)), 1),
        "entropy": rec.entropy_TN.mean(0),
        "margin": margin_summary(rec),
        "drops_again": repeated_drops(rec)._asdict(),
        "coactivation": coactivation(rec),
        "chosen_together": [duplicates(s_EE, 0.9) for s_EE in chosen_together(rec)],
        "transitions": transitions(rec),
        "dependence": layer_dependence(rec)._asdict(),
        "paths": path_statistics(rec)._asdict(),
        "by_position": position_summary(rec),
        "by_domain": by_domain(rec) if several else None,
        "specialisation": domain_specialisation(rec)._asdict() if several else None,
        "information": information_summary(rec) if several else None,
        "fairness": fair(rec) if several else None,
        "favourites": favourites(rec, decode) if decode and (rec.token_T >= 0).any() else None,
    }


def margin_summary(rec: Recording) -> dict[str, Any] | None:
    """Router margins by layer: percentiles, and a histogram over tokens."""
    if rec.K >= rec.E:
        return None
    margin_TN = router_margin(rec)
    edges = np.linspace(0, max(float(margin_TN.max(initial=0)), 1e-6), 41)
    share_NX = np.stack([np.histogram(m_T, edges)[0] for m_T in margin_TN.T]) / max(rec.tokens, 1)
    return {"percentiles": np.percentile(margin_TN, (5, 25, 50, 75, 95), axis=0).T, "edges": edges, "share": share_NX}


def position_summary(rec: Recording) -> dict[str, Any]:
    """Drops and entropy over the position in a document, in at most POSITION_BINS bins."""
    width = -(-(int(rec.position_T.max(initial=0)) + 1) // POSITION_BINS)
    bin_T = rec.position_T // width
    drops, entropy = drop_rate_by(rec, bin_T), entropy_by(rec, bin_T)
    return {"position": drops.group_A * width, "drop_rate": drops.value_AN, "entropy": entropy.value_AN}


def by_domain(rec: Recording) -> dict[str, Any]:
    """Tokens, loss, drops and entropy of every named domain."""
    known = rec.where(rec.domain_T >= 0)
    drops, entropy = drop_rate_by(known, known.domain_T), entropy_by(known, known.domain_T)
    loss = [np.nan_to_num(known.loss_T[known.domain_T == z], nan=0).sum() for z in drops.group_A]
    targets = [np.isfinite(known.loss_T[known.domain_T == z]).sum() for z in drops.group_A]
    return {
        "domain": drops.group_A,
        "tokens": drops.tokens_A,
        "loss": np.array(loss) / np.maximum(targets, 1),
        "drop_rate": drops.value_AN,
        "entropy": entropy.value_AN,
    }


def information_summary(rec: Recording) -> dict[str, Any] | None:
    """Mutual information of domain and expert; None where sequences are of several domains."""
    try:
        return domain_information(rec)._asdict()
    except ValueError:
        return None


def fair(rec: Recording) -> dict[str, Any] | None:
    """The largest difference between domains of each metric; None where not two have enough sequences."""
    gaps = between_domains(rec, rec.domain_T, rec.sequence_T)
    return gaps and {
        "domain": gaps.groups,
        "value": dict(gaps.value),
        "interval": dict(gaps.interval),
        "largest": [gaps.largest(name)._asdict() for name in gaps.value],
    }


def favourites(rec: Recording, decode: Callable[[int], str]) -> list[list[list[dict[str, Any]]]]:
    """Favourite tokens by layer and expert: those that choose it most relative to their share, frequent ones only."""
    spec = vocabulary_specialisation(rec, least=max(8, rec.tokens // 2000))
    words = [decode(int(token)) for token in spec.class_A]
    found = []
    for lift_EA, share_EA in zip(np.nan_to_num(spec.lift_NEA), spec.share_NEA, strict=True):
        order_EA = np.argsort(-lift_EA, 1, kind="stable")[:, :MOST_TOKENS]
        found.append(
            [
                [{"token": words[a], "lift": float(lift_EA[e, a]), "share": float(share_EA[e, a])} for a in order_A]
                for e, order_A in enumerate(order_EA)
            ]
        )
    return found


def effects_of(effects: Effects) -> dict[str, Any]:
    """Summary of a knock-out of every expert."""
    return {
        "expert": np.array(effects.expert_P),
        "base": effects.base.by_domain_Z,
        "rise": effects.rise_P,
        "rise_by_domain": effects.rise_PZ,
    }


def weights_of(model: Any, params: Any) -> dict[str, Any]:
    """Similarity of the experts' weights by layer, and duplicates among them."""
    similarity_NEE = np.stack([weight_similarity(model, params, n) for n in range(model.n_moe_layers)])
    return {"similarity": similarity_NEE, "duplicates": [duplicates(s_EE) for s_EE in similarity_NEE]}


def compare_recordings(rec: Recording, other: Recording) -> dict[str, Any]:
    """Share of choices that two recordings of the same tokens, layers and experts have in common."""
    check_same_tokens(rec, other)
    chance_N = [float(rec.K * (a_E * b_E).sum()) for a_E, b_E in zip(expert_load(rec), expert_load(other), strict=True)]
    return {"saturation": router_saturation(other, rec), "chance": np.minimum(chance_N, 1.0)}
