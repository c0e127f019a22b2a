"""The contestants: every causal router, some variants, and the dense baseline, as changes of one config."""

import dataclasses
from collections.abc import Iterable

from ml_collections import ConfigDict

from configs import glam_nano
from moe_jax.config import dense_baseline, parse, suggestion

STEPS = 300
EVAL_SEQUENCES = 512
DENSE = "dense"


@dataclasses.dataclass(frozen=True)
class Contestant:
    """Contestant: the changes of the base config; the experts' width follows from the active FLOPs, which are equal.

    router: None for the dense baseline. losses: None for those of the base config. gating: "{steps}" is the length of
    the run. active: experts that a token visits on average, where that is not the router's K; measured over a run of
    the default length.
    """

    name: str
    router: str | None
    losses: tuple[str, ...] | None = None
    gating: tuple[str, ...] = ()
    active: float | None = None

    @property
    def K(self) -> int:
        """Experts per token, at most."""
        return parse(self.router).K if self.router else 1

    @property
    def visits(self) -> float:
        """Experts per token that the config counts."""
        return self.active or self.K

    @property
    def kind(self) -> str:
        """Kind of routing: "dense" (none), a learned "gate", or a "fixed" rule."""
        if self.router is None:
            return DENSE
        return "gate" if parse(self.router).params else "fixed"

    @property
    def words(self) -> str:
        """The router, its gating, and a note where nothing balances a learned one."""
        text = " + ".join((self.router or "one expert", *self.gating)).replace(", steps={steps}", "")
        return text + (", no losses" if self.losses == () and self.kind == "gate" else "")


CONTESTANTS = (
    Contestant(DENSE, None),
    # One line for each causal router, with the losses of its paper.
    Contestant("switch", "Switch()", gating=("Jitter(0.01)",)),
    Contestant("top_k", "TopK(K=2)"),  # glam_nano itself
    Contestant("top2", "Top2()"),
    Contestant("noisy_top_k", "NoisyTopK(K=2)", ("Importance(0.1)", "Load(0.1)")),
    Contestant("loss_free", "LossFree(K=2, rate=0.01)", ()),  # ten times the paper's rate, in a far shorter run
    Contestant("cosine", "CosineTopK(K=2)"),
    Contestant("top_p", "TopP(p=0.3, K=8)", ("LoadBalance(0.01)", "TokenEntropy(0.0001)"), active=3.7),
    Contestant("null_experts", "NullExperts(K=4, M=32)", ("LoadBalance(0.01)",), active=1.8),
    Contestant("sampled", "Sampled(K=2)"),
    Contestant("hierarchical", "Hierarchical(M=8, outer=2, inner=2, normalize=True)"),
    Contestant("task", "TaskTopK(K=2, M=8)"),  # the corpus has eight domains
    Contestant("hash", "Hash(K=1)", ()),
    Contestant("random", "Random(K=2)", ()),
    Contestant("round_robin", "RoundRobin(K=2)", ()),
    # Variants of TopK.
    Contestant("top_k_plain", "TopK(K=2, normalize=False)"),
    Contestant("top_k_fine", "TopK(K=4)"),  # twice as many experts of half the width
    Contestant("top_k_unbalanced", "TopK(K=2)", ()),
    Contestant("sigmoid", "TopK(K=2, score='sigmoid')"),
    Contestant("sparsemax", "TopK(K=4, score='sparsemax')", active=1.95),
    Contestant("entmax15", "TopK(K=4, score='entmax15')", active=3.5),
    Contestant("annealed", "TopK(K=2)", gating=("Temperature(start=2.0, end=0.5, steps={steps})",)),
    Contestant("expert_dropout", "TopK(K=2)", gating=("ExpertDropout(0.1)",)),
    Contestant("soft_cap", "TopK(K=2)", gating=("SoftCap(5.0)",)),
)


def base(steps: int = STEPS) -> ConfigDict:
    """Base config of all contestants: glam_nano, shortened, its schedule with it, evaluated once, at the end.

    Batches and routing groups are half as large: for few tokens, more steps learn more.
    """
    config = glam_nano.get_config()
    config.data.B //= 2
    config.model.moe.S //= 2
    schedule = dataclasses.replace(parse(config.optim.schedule), warmup=max(1, steps // 8))
    config.optim.schedule = repr(schedule)
    config.run.update(
        {
            "steps": steps,
            "log_every": max(1, steps // 15),
            "eval_every": steps,
            "eval_sequences": EVAL_SEQUENCES,
            "save_every": steps,
        }
    )
    return config


def configure(contestant: Contestant, base: ConfigDict, seed: int = 0) -> ConfigDict:
    """The contestant's config: visits * F and the slots of an expert, in numbers, are those of the base config."""
    config = base.copy_and_resolve_references()
    config.seed = seed
    if contestant.router is None:
        return dense_baseline(config)
    moe = config.model.moe
    experts, dispatch = parse(moe.experts), parse(moe.dispatch)
    factor = dispatch.capacity_factor * contestant.visits / contestant.K  # relative to the actual choices, not to K
    moe.experts = repr(dataclasses.replace(experts, F=round(width(base) / contestant.visits)))
    moe.dispatch = repr(dataclasses.replace(dispatch, capacity_factor=round(factor, 4)))
    moe.router = contestant.router
    moe.gating = tuple(t.format(steps=config.run.steps) for t in contestant.gating)
    if contestant.losses is not None:
        moe.losses = contestant.losses
    return config


def width(base: ConfigDict) -> int:
    """Hidden width that a token passes through, over all its experts."""
    return parse(base.model.moe.router).K * parse(base.model.moe.experts).F


def choose(names: Iterable[str] | None) -> tuple[Contestant, ...]:
    """The contestants of these names, all for None; ValueError for an unknown name."""
    by_name = {c.name: c for c in CONTESTANTS}
    if names is None:
        return CONTESTANTS
    for name in (names := list(names)):
        if name not in by_name:
            raise ValueError(f"--only names no contestant {name!r}{suggestion(name, list(by_name))}")
    return tuple(c for c in CONTESTANTS if c.name in names)
