"""The layer in numpy, float64 and plain loops, from the papers' formulas: every other way must agree with it.

It imports nothing of moe_jax; configurations are only read, by their fields. How a router decides is in
oracle_routing.py; what it draws is an argument. Derivatives are central differences with the discrete decisions
(who goes where, what is dropped) held fixed.
"""

from typing import NamedTuple

import numpy as np

from tests import oracle_routing
from tests.oracle_routing import capacity, softmax


class Given(NamedTuple):
    """Inputs of a layer besides tokens, in groups. Without noise it evaluates."""

    noise: list | None = None  # for each group, the router's draws
    times: np.ndarray | float = 1.0  # what a transform multiplies the router's input with, [G, S, D]
    state: dict | None = None
    token_GS: np.ndarray | None = None
    task_GS: np.ndarray | None = None
    E: int | None = None  # for routers without parameters


class Choice(NamedTuple):
    """Experts named by each token and their weights; expert E is nowhere."""

    expert: np.ndarray  # [G, S, K]
    weight: np.ndarray  # [G, S, K]
    logits: np.ndarray  # [G, S, E]
    probs: np.ndarray  # [G, S, E]
    load: np.ndarray | None = None  # [G, S, E]


class Slots(NamedTuple):
    """Tokens that each slot of each expert takes, token S is nobody."""

    token: np.ndarray  # [G, E, C]
    weight: np.ndarray
    logits: np.ndarray
    probs: np.ndarray


class Soft(NamedTuple):
    """Masks of real numbers, [G, S, E, C]."""

    dispatch: np.ndarray
    combine: np.ndarray
    logits: np.ndarray  # [G, S, E]
    probs: np.ndarray


class Result(NamedTuple):
    y: np.ndarray
    aux_loss: float
    stats: dict
    metrics: dict
    decision: tuple  # experts (or tokens of slots) chosen, choices kept


NOTHING = Given()


def route(router, params, x, mask, given: Given = NOTHING, chosen=None):
    """x [G, S, D], params without their prefix. `chosen`: ids are given."""
    name, groups = type(router).__name__, []
    E = next((w.shape[-1] for n, w in params.items() if n in ("gate_DE", "embed_AE", "task_ME")), None)
    for g in range(len(x)):
        if name in ("ExpertChoice", "MixtureOfDepths"):
            f = oracle_routing.expert_choice if name == "ExpertChoice" else oracle_routing.depths
            token, weight, logits, probs = f(router, params, x[g], mask[g])
            if chosen is not None:
                token, padded = (
                    chosen[g],
                    np.vstack([probs if name == "ExpertChoice" else logits, np.zeros(len(token))]),
                )
                weight = np.stack([padded[token[e], e] for e in range(len(token))])
            groups.append((token, weight, logits, probs))
        elif name == "SoftMoE":
            dispatch, combine, logits = oracle_routing.soft(router, params, x[g], mask[g])
            logits = np.log(np.exp(logits).sum(-1))
            groups.append((dispatch, combine, logits, np.array([softmax(row) for row in logits])))
        else:
            of_group = [None if a is None else a[g] for a in (given.noise, chosen)]
            ids = [None if a is None else a[g] for a in (given.token_GS, given.task_GS)]
            choice = oracle_routing.ROUTE[name](
                router, params, x[g], mask[g], *of_group, given.state, *ids, E or given.E
            )
            groups.append((choice.expert_SK, choice.weight_SK, choice.logits_SE, choice.probs_SE, choice.load_SE))
    kind = {"ExpertChoice": Slots, "MixtureOfDepths": Slots, "SoftMoE": Soft}.get(name, Choice)
    return kind(*(None if a[0] is None else np.stack(a) for a in zip(*groups, strict=True)))


def queue(expert, weight, E, priority):
    """Place of every choice in its expert's queue; S*K for nowhere. expert, weight: [G, S, K]."""
    G, S, K = expert.shape
    place = np.full((G, S, K), S * K)
    for g in range(G):
        order = [(s, k) for s in range(S) for k in range(K)]
        if priority == "choice-major":
            order = [(s, k) for k in range(K) for s in range(S)]
        if priority == "probability":
            tokens = sorted(range(S), key=lambda s: (-weight[g, s].max(), s))
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


def visits(choice) -> np.ndarray:
    """Assignments of each token to each expert, [G, S, E]."""
    G, S, E = choice.logits.shape
    count = np.zeros((G, S, E + 1))
    if isinstance(choice, Choice):
        for g, s, k in np.ndindex(choice.expert.shape):
            count[g, s, choice.expert[g, s, k]] += 1
    elif isinstance(choice, Slots):
        for g, e, c in np.ndindex(choice.token.shape):
            if choice.token[g, e, c] < S:
                count[g, choice.token[g, e, c], e] += 1
    else:
        count[..., :E] = choice.dispatch.sum(-1)
    return count[..., :E]


def gains(choice) -> np.ndarray:
    """The weight of each expert in each token's output, [G, S, E]."""
    G, S, E = choice.logits.shape
    gain = np.zeros((G, S + 1, E + 1))
    if isinstance(choice, Choice):
        for g, s, k in np.ndindex(choice.expert.shape):
            gain[g, s, choice.expert[g, s, k]] += choice.weight[g, s, k]
    elif isinstance(choice, Slots):
        for g, e, c in np.ndindex(choice.token.shape):
            gain[g, choice.token[g, e, c], e] += choice.weight[g, e, c]
    else:
        gain[:, :S, :E] = choice.combine.sum(-1)
    return gain[:, :S, :E]


def kept(dispatch, choice, mask=None):
    """Choices (or slots) that reach their expert."""
    if isinstance(choice, Slots):
        return choice.token < choice.logits.shape[1]
    if isinstance(choice, Soft):
        return np.broadcast_to(mask.any(-1)[:, None, None], (len(mask), *choice.dispatch.shape[2:]))
    (_, S, K), E = choice.expert.shape, choice.logits.shape[-1]
    if dispatch.capacity_factor is None:
        return choice.expert < E
    C = capacity(S, K, E, dispatch.capacity_factor, getattr(dispatch, "convention", "exact"))
    return queue(choice.expert, choice.weight, E, dispatch.priority) < C


def combine(kind, params, x, choice, taken):
    """Weighted sum of the experts each token reaches. params: [E, ...] each."""
    y = np.zeros(x.shape)
    each = lambda e: {n: w[e] for n, w in params.items()}  # noqa: E731
    if isinstance(choice, Choice):
        for g, s, k in np.argwhere(taken):
            e = choice.expert[g, s, k]
            y[g, s] += choice.weight[g, s, k] * expert(kind, each(e), x[g, s])
    elif isinstance(choice, Slots):
        for g, e, c in np.argwhere(taken):
            s = choice.token[g, e, c]
            y[g, s] += choice.weight[g, e, c] * expert(kind, each(e), x[g, s])
    else:
        for g, e, c in np.argwhere(taken):
            out = expert(kind, each(e), choice.dispatch[g, :, e, c] @ x[g])
            y[g] += choice.combine[g, :, e, c][:, None] * out
    return y


def count(choice, mask, taken, B=1, task=None, tasks=1):
    """Sums over real tokens."""
    E, visit = choice.logits.shape[-1], visits(choice)
    probs, logits = choice.probs[mask], choice.logits[mask]
    first = visit
    if isinstance(choice, Choice):
        first = np.zeros(visit.shape)
        for g, s in np.argwhere(choice.expert[..., 0] < E):
            first[g, s, choice.expert[g, s, 0]] = 1
    load = getattr(choice, "load", None)
    entropies = -(probs * np.log(np.maximum(probs, 1e-30))).sum(-1)
    task = (np.zeros(mask.shape, int) if task is None else task)[mask]
    return {
        "tokens": mask.sum(),
        "kept": taken.sum(),
        "choices_E": visit.sum((0, 1)),
        "top1_E": first.sum((0, 1)),
        "probs_E": probs.sum(0),
        "combine_E": gains(choice).sum((0, 1)),
        "load_E": visit.sum((0, 1)) if load is None else load[mask].sum(0),
        "entropy": entropies.sum(),
        "z_squared": (np.log(np.exp(logits).sum(-1)) ** 2).sum(),
        "group_balance": balance(visit, choice.probs, mask),
        "sequence_balance": balance(*(a.reshape(B, -1, *a.shape[2:]) for a in (visit, choice.probs, mask))),
        "tokens_M": np.array([(task == m).sum() for m in range(tasks)]),
        "probs_ME": np.stack([probs[task == m].sum(0) for m in range(tasks)]),
        "entropy_M": np.array([entropies[task == m].sum() for m in range(tasks)]),
        "agreed": None,  # of a layer with the one before it, and there is none
        "compared": None,
    }


def balance(visit, probs, mask):
    """Sum over groups of their tokens times E * sum_e f_e P_e."""
    total = 0.0
    for g in range(len(mask)):
        n, f, P = mask[g].sum(), visit[g].sum(0), probs[g][mask[g]].sum(0)
        total += n * visit.shape[-1] * sum(f / max(f.sum(), 1) * P / max(n, 1))
    return total


def describe(s):
    """Metrics of those sums, and the losses that are always told."""
    n, tokens, E = max(s["choices_E"].sum(), 1), max(s["tokens"], 1), len(s["choices_E"])
    load = s["choices_E"] / n
    told = oracle_routing.describe(s["choices_E"])
    P = s["probs_E"] / tokens
    return {
        **told,
        "load": load,
        "drop_rate": 1 - s["kept"] / n,
        "active_experts": s["choices_E"].sum() / tokens,
        "router_entropy": s["entropy"] / tokens,
        "load_balance": E * sum(load[e] * P[e] for e in range(E)),
        "router_z": s["z_squared"] / tokens,
        "importance": oracle_routing.cv(s["combine_E"]) ** 2,
        "uniform_kl": -np.log(E) - np.log(np.maximum(P / P.sum(), 1e-30)).mean(),
    }


def layer(cfg, params, x, mask, given: Given = NOTHING, decision=None) -> Result:
    """The whole layer; x [B, L, D]. With `decision`, experts and drops are those, not decided again."""
    S = cfg.S or x.shape[1]
    x = np.where(mask[..., None], x, 0)
    x_GSD, mask_GS = x.reshape(-1, S, x.shape[-1]), mask.reshape(-1, S)
    router = {n.removeprefix("router_"): w for n, w in params.items() if n.startswith("router_")}
    choice = route(cfg.router, router, x_GSD * given.times, mask_GS, given, decision and decision[0])
    taken = kept(cfg.dispatch, choice, mask_GS) if decision is None else decision[1]
    y = combine(cfg.experts, {n: params[n] for n in cfg.experts.params}, x_GSD, choice, taken)
    if cfg.shared is not None:
        p = {n: params["shared_" + n.replace("_E", "_")] for n in cfg.shared.params}
        for g, s in np.ndindex(y.shape[:2]):
            y[g, s] += expert(cfg.shared, p, x_GSD[g, s])
    s = count(choice, mask_GS, taken, len(x), given.task_GS, cfg.tasks)
    aux = sum(part.weight * auxiliary(part, cfg, choice, s, mask_GS, given) for part in cfg.losses)
    return Result(y.reshape(x.shape), aux, s, describe(s), (choice[0], taken))


def auxiliary(part, cfg, choice, s, mask, given):
    """One auxiliary loss, from all real tokens."""
    name, probs, K, E = type(part).__name__, choice.probs[mask], cfg.router.K, cfg.E
    task = np.zeros(mask.sum(), int) if given.task_GS is None else given.task_GS[mask]
    if name == "Adaptive":
        return np.exp(given.state["log_weight_"]) * auxiliary(part.loss, cfg, choice, s, mask, given)
    if name == "LoadBalance" and part.scope != "batch":
        return s[f"{part.scope}_balance"] / s["tokens"] * {"switch": 1, "sum": K, "mean": 1 / K}[part.convention]
    if name == "LoadBalance" and type(cfg.router).__name__ == "NullExperts":  # each null with the mean of their loads
        M = cfg.router.M
        f, P = s["choices_E"] / s["tokens"] / K, probs.mean(0)
        return (E + M) * (f @ P + (1 - f.sum()) / M * (1 - P.sum()))
    if name == "LoadBalance":
        return oracle_routing.load_balance(choice.expert[mask], probs, E, part.convention)
    if name == "RouterZ":
        return s["z_squared"] / s["tokens"]
    if name in ("Importance", "Load"):
        key = "load_E" if name == "Load" else {"weights": "combine_E", "probs": "probs_E"}[part.of]
        return oracle_routing.cv(s[key]) ** 2
    if name == "UniformKL":
        return oracle_routing.uniform_kl(probs, part.direction == "reverse")
    f = {"TokenEntropy": oracle_routing.token_entropy, "LoadEntropy": oracle_routing.load_entropy}[name]
    options = {"threshold": part.threshold} if name == "LoadEntropy" else {}
    return oracle_routing.per_task(f, task, probs, **options) if part.by_task else f(probs, **options)


def loss(cfg, params, x, mask, target, given: Given = NOTHING, decision=None):
    """Squared error over real tokens, plus auxiliary losses."""
    result = layer(cfg, params, x, mask, given, decision)
    return (((result.y - target) ** 2).sum(-1) * mask).sum() + result.aux_loss


def slope(f, x, direction, step=1e-5):
    """Derivative of f at x along a direction."""
    return (f(x + step * direction) - f(x - step * direction)) / (2 * step)
