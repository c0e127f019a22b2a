"""The laws by name and number, as CONTRIBUTING.md has them, and a sentence on each from an audit."""

from collections.abc import Sequence

from moe_jax.audit.communication import ComparedCollective
from moe_jax.audit.experiment import Finding

LAWS = {
    "One model, every mesh": "outputs, gradients, metrics and dropped tokens do not depend on the devices.",
    "One routing, every dispatcher": "all dispatchers compute what `Einsum` defines.",
    "Routers are trainable": "the task loss alone gives every router parameter a gradient.",
    "Causal means causal": "in a language model, no output depends on a later token.",
    "Replicas are replicas": "what is replicated is bit-identical on all devices, after any number of steps.",
    "Communication is accounted for": ("the collectives in the compiled program are those that the config predicts."),
    "Padding is nowhere": "a padded token has no slot, no weight, and is in no loss, count or metric.",
    "Nothing is dropped in silence": "drop rates are in every log record; evaluation is dropless.",
    "Resume is exact": "an interrupted run goes on with the same batches and the same losses.",
    "The numbers are the paper's": "a published model's config has its published parameter counts.",
}
COMMUNICATION = "Communication is accounted for"


def by_law(found: Sequence[Finding]) -> dict[str, list[Finding]]:
    """Findings by the names of the laws, in their order; then what is found besides the laws."""
    named: dict[str, list[Finding]] = {law: [] for law in LAWS}
    for finding in found:
        named.setdefault(finding.law[0].upper() + finding.law[1:], []).append(finding)
    return named


def sentence(law: str, found: Sequence[Finding | ComparedCollective]) -> str:
    """A law, and whether it holds, in a sentence."""
    number = f"{list(LAWS).index(law) + 1}. " if law in LAWS else ""
    return f"{number}{law}: {outcome(found)}" + (f" ({LAWS[law].rstrip('.')})" if law in LAWS else "") + "."


def outcome(found: Sequence[Finding | ComparedCollective]) -> str:
    """Counts the trials in which it holds, in words."""
    tried = [f.verdict.holds if isinstance(f, Finding) else f.holds for f in found]
    if not tried:
        return "not tried here"
    if all(tried):
        return "holds" if len(tried) == 1 else f"holds in all {len(tried)} trials"
    how = "BROKEN" if any(map(broken, found)) else "does not hold, nor is it claimed,"
    return f"{how} in {tried.count(False)} of {len(tried)} trials"


def broken(finding: Finding | ComparedCollective) -> bool:
    """Returns whether it breaks a law that the config claims."""
    return finding.broken if isinstance(finding, Finding) else not finding.holds
