"""Every metric of a MoE layer: its title, formula and unit, for the page of a run and docs/routing.md."""

from typing import NamedTuple


class Metric(NamedTuple):
    """Title, formula and axis unit of a metric."""

    title: str
    formula: str
    unit: str


SYMBOLS = (
    "An assignment is one choice of an expert by a token. Of E experts, f_e is the load of expert e, p_e a token's "
    "probability of it, and P_e the mean of p_e over tokens."
)
RATIO = "ratio"
METRICS = {
    "drop_rate": Metric("Drop rate", "dropped assignments / assignments", "fraction"),
    "load_max_over_mean": Metric("Load, busiest expert", "largest f_e / mean f_e; 1 when balanced", RATIO),
    "dead_experts": Metric("Dead experts", "number of experts without an assignment", "experts"),
    "router_entropy": Metric("Router entropy", "mean over tokens of -sum_e p_e log p_e; at most log E", "nats"),
    "load": Metric("Expert load", "f_e = assignments of expert e / assignments", "fraction"),
    "load_percentiles": Metric("Load, percentiles", "0, 25, 50, 75 and 100 % of f_e / mean f_e", RATIO),
    "max_violation": Metric("Load violation", "largest f_e / mean f_e - 1 (arXiv:2408.15664)", RATIO),
    "load_cv": Metric("Load, variation", "standard deviation of f_e / mean f_e", RATIO),
    "load_entropy": Metric("Load entropy", "-sum_e f_e log f_e; at most log E", "nats"),
    "active_experts": Metric("Active experts", "assignments / tokens, before any is dropped", "experts"),
    "agreement": Metric(
        "Agreement",
        "assignments that the MoE layer before made for the same token / assignments; not of a stack's first "
        "(by chance K / E)",
        "fraction",
    ),
    "load_balance": Metric("Load balance loss", "E sum_e f_e P_e; 1 when balanced, E when collapsed", "unweighted"),
    "router_z": Metric("Router z-loss", "mean over tokens of (log sum_e exp logit_e)^2", "unweighted"),
    "importance": Metric(
        "Importance loss", "(standard deviation / mean)^2 of the experts' summed combine weights", "unweighted"
    ),
    "uniform_kl": Metric("Uniformity loss", "KL(1 / E, P) = -log E - mean of log P_e", "unweighted"),
}
HIDDEN = ("load_percentiles", "max_violation", "load_cv")  # say again what other figures say
AUXILIARY = Metric("Auxiliary loss", "auxiliary losses times their weights, as added to the loss", "nats")
LOSS = "cross-entropy, mean over targets, in nats"
