"""The layer in numpy, float64 and plain loops, from the papers' formulas: every other way must agree with it.

It imports nothing of moe_jax; configurations are only read, by their fields. Noise is an argument: the
factors that a jittered input is multiplied with, or the draws that decide about second choices. Derivatives
are central differences with the discrete decisions (who goes where, what is dropped) held fixed.
"""

from decimal import Decimal
from typing import NamedTuple

import numpy as np


class Choice(NamedTuple):
    """Experts named by each token and their weights; expert E is nowhere."""

    named: np.ndarray  # [G, S, K], the best K, used or not
    expert: np.ndarray  # [G, S, K]
    weight: np.ndarray  # [G, S, K]
    logits: np.ndarray  # [G, S, E]
    probs: np.ndarray  # [G, S, E]


class Result(NamedTuple):
    y: np.ndarray
    aux_loss: float
    stats: dict
    metrics: dict
    decision: tuple  # experts named, experts used, choices kept


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def best(values, K):
    """The K largest, ties to the lower index."""
    return sorted(range(len(values)), key=lambda e: (-values[e], e))[:K]


def weights(router, logits, named):
    """Weights of the experts a token names: their probabilities, or a softmax over their logits alone."""
    if type(router).__name__ == "Switch" or getattr(router, "softmax", "") == "all":
        return softmax(logits)[named]
    if type(router).__name__ == "Top2":
        return softmax(logits)[named] / softmax(logits)[named].sum()
    return softmax(logits[named])


def route(router, gate, x, mask, noise=None, decision=None) -> Choice:
    """x [G, S, D]; noise [G, S, D] for a jitter, [G, S] for second choices. `decision`: ids are given."""
    G, S, _ = x.shape
    E, K = gate.shape[1], router.K
    named, ids, weight = np.full((G, S, K), E), np.full((G, S, K), E), np.zeros((G, S, K))
    logits, probs = np.zeros((G, S, E)), np.zeros((G, S, E))
    jitter = noise if noise is not None and noise.ndim == 3 else np.ones(x.shape)
    for g, s in np.ndindex(G, S):
        logits[g, s] = (x[g, s] * jitter[g, s]) @ gate
        probs[g, s] = softmax(logits[g, s])
        if mask[g, s]:
            named[g, s] = best(logits[g, s], K) if decision is None else decision[0][g, s]
            weight[g, s] = weights(router, logits[g, s], named[g, s])
            ids[g, s] = named[g, s]
            if type(router).__name__ == "Top2" and noise is not None and 2 * weight[g, s, 1] <= noise[g, s]:
                ids[g, s, 1] = E  # GShard, algorithm 1: used with probability min(1, 2 * its weight)
    if decision is not None:
        ids = decision[1]
    return Choice(named, ids, np.where(ids < E, weight, 0), logits, probs)


def capacity(S, K, E, factor):
    """The smallest C with C * E >= factor * K * S, and never more than S."""
    C = 0
    while C < S and Decimal(str(factor)) * K * S > C * E:
        C += 1
    return C


def queue(expert, weight, E, priority):
    """Place of every choice in its expert's queue; S*K for nowhere. expert, weight: [G, S, K]."""
    G, S, K = expert.shape
    place = np.full((G, S, K), S * K)
    for g in range(G):
        order = [(s, k) for s in range(S) for k in range(K)]
        if priority == "choice-major":
            order = [(s, k) for k in range(K) for s in range(S)]
        if priority == "probability":
            tokens = sorted(range(S), key=lambda s: (-weight[g, s, 0], s))
            order = [(s, k) for k in range(K) for s in tokens]
        waiting = [0] * E
        for s, k in order:
            if (e := expert[g, s, k]) < E:
                place[g, s, k] = waiting[e]
                waiting[e] += 1
    return place


ACTIVATION = {
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "gelu": lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def expert(kind, p, x):
    """One expert on one row; p: its parameters under the names they have in the layer."""
    act = ACTIVATION[kind.activation]
    if type(kind).__name__ == "GLU":
        return (act(x @ p["gate_EDF"]) * (x @ p["up_EDF"])) @ p["down_EFD"]
    return act(x @ p["up_EDF"] + p.get("up_EF", 0)) @ p["down_EFD"] + p.get("down_ED", 0)


def kept(dispatch, choice: Choice):
    """Which choices reach their expert."""
    (_, S, K), E = choice.expert.shape, choice.logits.shape[-1]
    if dispatch.capacity_factor is None:
        return choice.expert < E
    C = capacity(S, K, E, dispatch.capacity_factor)
    return queue(choice.expert, choice.weight, E, dispatch.priority) < C


def combine(kind, params, x, choice: Choice, taken):
    """Weighted sum of the experts each token reaches. params: [E, ...] each."""
    y = np.zeros(x.shape)
    for g, s, k in np.argwhere(taken):
        e = choice.expert[g, s, k]
        y[g, s] += choice.weight[g, s, k] * expert(kind, {n: w[e] for n, w in params.items()}, x[g, s])
    return y


def count(choice: Choice, mask, taken):
    """Sums over real tokens."""
    E = choice.logits.shape[-1]
    probs, logits = choice.probs[mask], choice.logits[mask]
    return {
        "tokens": mask.sum(),
        "kept": taken.sum(),
        "choices_E": np.array([(choice.expert == e).sum() for e in range(E)]),
        "probs_E": probs.sum(0),
        "entropy": -(probs * np.log(np.maximum(probs, 1e-30))).sum(),
        "z_squared": (np.log(np.exp(logits).sum(-1)) ** 2).sum(),
    }


def describe(s):
    """Metrics and losses of those sums."""
    n, tokens, E = max(s["choices_E"].sum(), 1), max(s["tokens"], 1), len(s["choices_E"])
    load = s["choices_E"] / n
    return {
        "load": load,
        "load_max_over_mean": load.max() / (1 / E),
        "load_cv": load.std() / (1 / E),
        "dead_experts": (s["choices_E"] == 0).sum(),
        "drop_rate": 1 - s["kept"] / n,
        "router_entropy": s["entropy"] / tokens,
        "load_balance": E * sum(load[e] * s["probs_E"][e] / tokens for e in range(E)),
        "router_z": s["z_squared"] / tokens,
    }


def layer(cfg, params, x, mask, noise=None, decision=None) -> Result:
    """The whole layer; x [B, L, D]. With `decision`, experts and drops are those, not decided again."""
    S = cfg.S or x.shape[1]
    x = np.where(mask[..., None], x, 0)
    x_GSD, mask_GS = x.reshape(-1, S, x.shape[-1]), mask.reshape(-1, S)
    choice = route(cfg.router, params["router_gate_DE"], x_GSD, mask_GS, noise, decision)
    taken = kept(cfg.dispatch, choice) if decision is None else decision[2]
    y = combine(cfg.experts, {n: params[n] for n in cfg.experts.params}, x_GSD, choice, taken)
    if cfg.shared is not None:
        p = {n: params["shared_" + n.replace("_E", "_")] for n in cfg.shared.params}
        for g, s in np.ndindex(y.shape[:2]):
            y[g, s] += expert(cfg.shared, p, x_GSD[g, s])
    s = count(choice, mask_GS, taken)
    metrics = describe(s)
    aux = sum(weight * metrics[name] for name, weight in dict(cfg.losses).items())
    return Result(y.reshape(x.shape), aux, s, metrics, (choice.named, choice.expert, taken))


def loss(cfg, params, x, mask, target, noise=None, decision=None):
    """Squared error over real tokens, plus auxiliary losses."""
    result = layer(cfg, params, x, mask, noise, decision)
    return (((result.y - target) ** 2).sum(-1) * mask).sum() + result.aux_loss


def slope(f, x, direction, step=1e-5):
    """Derivative of f at x along a direction."""
    return (f(x + step * direction) - f(x - step * direction)) / (2 * step)
