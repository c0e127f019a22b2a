"""Explanation of the route of one token: its logits, their parts, and the routes of similar tokens."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from moe_jax.inspect.look import LayerTrace
from moe_jax.models.pattern import check_expert, layer_params


class Neighbour(NamedTuple):
    """Another token, and the cosine between the router inputs of both."""

    row: int
    token: int
    cosine: float
    experts: tuple[int, ...]


class Explanation(NamedTuple):
    """Explanation of the route of one token in one layer.

    part_DE: x_d * gate_de, which sum over d to gate_E exactly; logits_E are the router's logits (after temperature,
    soft cap). along_PE: the part along each leading principal direction of the layer's inputs; mean_E and rest_E: the
    parts of their mean and of other directions: mean_E + along_PE.sum(0) + rest_E = gate_E.
    margin: the logit of the last of the chosen less the best of the others; negative where a bias decided.
    """

    row: int
    layer: int
    token: int
    chosen: tuple[int, ...]
    weights: tuple[float, ...]
    logits_E: Float[np.ndarray, "E"]
    gate_E: Float[np.ndarray, "E"]
    margin: float
    runner_up: int
    part_DE: Float[np.ndarray, "D E"]
    mean_E: Float[np.ndarray, "E"]
    along_PE: Float[np.ndarray, "P E"]
    rest_E: Float[np.ndarray, "E"]
    near: tuple[Neighbour, ...]

    def features(self, expert: int, n: int = 5) -> list[tuple[int, float]]:
        """The n input features (d, x_d * gate_de) that contribute most for or against an expert."""
        part_D = self.part_DE[:, expert]
        return [(int(d), float(part_D[d])) for d in np.argsort(-np.abs(part_D), kind="stable")[:n]]


def explain(
    model: Any, params: Any, trace: LayerTrace, row: int, layer: int, directions: int = 4, neighbours: int = 5
) -> Explanation:
    """Explains the route of the token in this row of a trace.

    ValueError where there is no such token or layer, or the router has no linear gate of its input.
    """
    check_expert(model, layer, 0)
    if not 0 <= row < len(trace.token_T):
        raise ValueError(f"There is no token in row {row}; {len(trace.token_T)} were seen, counted from 0.")
    weights = layer_params(model, params, layer)
    if "gate_DE" not in model.moe.router.params:
        raise ValueError(f"{model.moe.router} has no linear gate of its input to be explained; use one that has.")
    x_TD = trace.input_NTD[layer].astype(np.float64)
    gate_DE = np.asarray(weights["router_gate_DE"], np.float64)
    mean_D, along_PD = principal(x_TD, directions)
    coordinate_P = along_PD @ (x_TD[row] - mean_D)
    part_DE, mean_E = x_TD[row][:, None] * gate_DE, mean_D @ gate_DE
    along_PE = coordinate_P[:, None] * (along_PD @ gate_DE)
    chosen = [int(e) for e in trace.expert_NTK[layer, row] if e < model.moe.E]
    logits_E = trace.logits_NTE[layer, row]
    margin, runner_up = margin_of(logits_E, chosen)
    return Explanation(
        row=row,
        layer=layer,
        token=int(trace.token_T[row]),
        chosen=tuple(chosen),
        weights=tuple(float(w) for w in trace.weight_NTK[layer, row][: len(chosen)]),
        logits_E=logits_E,
        gate_E=part_DE.sum(0),
        margin=margin,
        runner_up=runner_up,
        part_DE=part_DE,
        mean_E=mean_E,
        along_PE=along_PE,
        rest_E=part_DE.sum(0) - mean_E - along_PE.sum(0),
        near=nearest_tokens(trace, row, layer, neighbours, model.moe.E),
    )


def margin_of(logits_E: Float[np.ndarray, "E"], chosen: list[int]) -> tuple[float, int]:
    """Lowest logit of the chosen less the highest of the others, and its expert; -1 if there are no others."""
    others = [e for e in range(len(logits_E)) if e not in chosen]
    if not others or not chosen:
        return float("inf") if chosen else float("-inf"), int(np.argmax(logits_E)) if others else -1
    best = max(others, key=lambda e: logits_E[e])
    return float(min(logits_E[e] for e in chosen) - logits_E[best]), best


def principal(x_TD: Float[np.ndarray, "T D"], P: int) -> tuple[Float[np.ndarray, "D"], Float[np.ndarray, "P D"]]:
    """The mean of inputs, and the P directions of their largest variance (orthonormal, by singular values)."""
    mean_D = x_TD.mean(0)
    _, _, along_PD = np.linalg.svd(x_TD - mean_D, full_matrices=False)
    return mean_D, along_PD[:P]


def nearest_tokens(trace: LayerTrace, row: int, layer: int, n: int, E: int) -> tuple[Neighbour, ...]:
    """The n other tokens whose router inputs point most nearly the same way."""
    x_TD = trace.input_NTD[layer].astype(np.float64)
    length_T = np.maximum(np.linalg.norm(x_TD, axis=1), 1e-30)
    cosine_T = x_TD @ x_TD[row] / (length_T * length_T[row])
    order: Int[np.ndarray, "T"] = np.argsort(-cosine_T, kind="stable")
    chosen_TK = trace.expert_NTK[layer]
    others = [int(t) for t in order if t != row][:n]
    return tuple(
        Neighbour(t, int(trace.token_T[t]), float(cosine_T[t]), tuple(int(e) for e in chosen_TK[t] if e < E))
        for t in others
    )
