"""A sentence on every law from the findings of an audit."""

from collections.abc import Sequence

from moe_jax.audit.communication import ComparedCollective
from moe_jax.audit.experiment import Finding
from moe_jax.audit.laws import LAWS

COMMUNICATION = LAWS[5].title


def by_law(found: Sequence[Finding]) -> dict[str, list[Finding]]:
    """Findings by the names of the laws, in their order; then what is found besides the laws."""
    named: dict[str, list[Finding]] = {law.title: [] for law in LAWS}
    for finding in found:
        named.setdefault(title(finding.law), []).append(finding)
    return named


def title(name: str) -> str:
    """A law's title by the name that findings have."""
    return next((law.title for law in LAWS if law.name == name), name[0].upper() + name[1:])


def sentence(law: str, found: Sequence[Finding | ComparedCollective]) -> str:
    """A law, and whether it holds, in a sentence."""
    known = {one.title: one for one in LAWS}.get(law)
    if known is None:
        return f"{law}: {outcome(found)}."
    return f"{known.number}. {law}: {outcome(found)} ({known.sentence.rstrip('.')})."


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
