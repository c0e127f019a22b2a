"""Results of an inspection as one static HTML page."""

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple

import numpy as np

from moe_jax.inspect import figures
from moe_jax.reporting import page
from moe_jax.reporting.plots import Plot

NOBODY = "-"


def inspection_page(title: str, found: Mapping[str, Any], config: str, cards: Sequence[str] = ()) -> str:
    """The page of what `analyse` and its companions have found, by their names; `cards`: of experts, as text."""
    parts = [inspection_summary(found), overview(found)]
    for title_of, words, drawn in report_sections(found):
        parts += [page.heading(title_of), *([page.text(words)] if words else [])]
        parts += [part if isinstance(part, str) else page.figure(part, wide=bool(part.size[0] > 7)) for part in drawn]
    if cards:
        parts.append(page.folded(f"Cards of the {len(cards)} experts that are missed most", "\n\n".join(cards)))
    parts.append(page.folded("Resolved config", config))
    return page.page(title, parts)


def named_figures(found: Mapping[str, Any]) -> dict[str, Plot]:
    """The figures alone, by names for files; a title that comes again is numbered."""
    drawn: dict[str, Plot] = {}
    for plot in (part for _, _, parts in report_sections(found) for part in parts if isinstance(part, Plot)):
        title = "_".join("".join(c if c.isalnum() else " " for c in plot.title).lower().split())
        names = (f"{title}_{i}" if i > 1 else title for i in count(1))
        drawn[next(name for name in names if name not in drawn)] = plot
    return drawn


def inspection_summary(found: Mapping[str, Any]) -> str:
    """The first paragraph: of what, and the few numbers that matter most."""
    dead = int(np.sum(found["dead"]))
    alike = [group for groups in found.get("weights", {}).get("duplicates", []) for group in groups]
    words = [
        f"{found['tokens']:,} tokens of {found['sequences']:,} held-out sequences, step {found['step']:,}: "
        f"{len(found['layers'])} MoE layer{'s' if len(found['layers']) > 1 else ''} of {found['E']} experts, "
        f"{found['K']} for each token.",
        f"{dead} dead expert{'' if dead == 1 else 's'}, {sum(map(len, alike))} with a duplicate by weights; "
        f"{np.mean(found['drop_rate']):.2%} of choices dropped.",
    ]
    if found["loss"] is not None:
        words.append(f"Loss {found['loss']:.4f} nats per target.")
    if information := found.get("information"):
        nats, p = np.max(information["nats_N"]), np.min(information["p_N"])
        words.append(f"Domain and expert share up to {nats:.3f} nats (p = {p:.3f}).")
    return page.text(" ".join(words))


def overview(found: Mapping[str, Any]) -> str:
    """A row for each layer."""
    head = ["", "busiest / mean", "dead", "dropped", "entropy, nats", "median margin", "paths alike"]
    margin = found["margin"]
    rows = []
    for n, name in enumerate(found["layers"]):
        load_E = np.asarray(found["load"][n], float) * found["E"]
        agreement = found["dependence"]["agreement_M"]
        rows.append(
            [
                name,
                f"{load_E.max():.2f}",
                f"{int(np.sum(found['dead'][n]))}",
                f"{found['drop_rate'][n]:.2%}",
                f"{found['entropy'][n]:.3f}",
                f"{margin['percentiles'][n][2]:.3f}" if margin else NOBODY,
                f"{agreement[n - 1]:.1%}" if n else NOBODY,
            ]
        )
    return page.table(head, rows)


class ReportSection(NamedTuple):
    """A heading, a sentence, and figures or tables (HTML)."""

    title: str
    words: str
    parts: list[Plot | str]


def report_sections(found: Mapping[str, Any]) -> list[ReportSection]:
    """Sections that have numbers."""
    made = [choice(found)]
    made += [purpose(found)] if found["specialisation"] else []
    made += [tokens(found)] if found["favourites"] else []
    made += [breaks(found)] if found.get("knock_out") else []
    made += [among_themselves(found), where(found)]
    made += [alike(found)] if found["fairness"] else []
    return made + [
        ReportSection(f"Compared with {other['name']}", "", beside_other(found, other))
        for other in found.get("compare", ())
    ]


def choice(found: Mapping[str, Any]) -> ReportSection:
    names, margin = found["layers"], found["margin"]
    drawn: list[Plot | str] = [figures.draw_load(found["load"], names)]
    drawn += [figures.draw_margin(margin["edges"], margin["share"], names)] if margin else []
    return ReportSection("Load and choice", "", drawn)


def purpose(found: Mapping[str, Any]) -> ReportSection:
    names, spec, information = found["layers"], found["specialisation"], found["information"]
    domains = [found["domains"][z] for z in found["by_domain"]["domain"]]
    drawn: list[Plot | str] = [figures.draw_specialisation(spec["lift_NEA"], names, domains)]
    if information:
        drawn.append(
            figures.draw_information(information["nats_N"], information["chance_N"], information["p_N"], names)
        )
    return ReportSection("What experts are for", specialised(found, domains), drawn)


def tokens(found: Mapping[str, Any]) -> ReportSection:
    note = "Frequent tokens with the largest lift, most loaded experts first."
    return ReportSection("Tokens of experts", note, [words_of(found, found["favourites"])])


def breaks(found: Mapping[str, Any]) -> ReportSection:
    effects = found["knock_out"]
    domains = found["domains"][: np.shape(effects["rise_by_domain"])[1]]
    return ReportSection(
        "What breaks without them", missed(found), [figures.draw_knock_out(effects, found["layers"], domains)]
    )


def among_themselves(found: Mapping[str, Any]) -> ReportSection:
    names, drawn = found["layers"], list[Plot | str]()
    if found["K"] > 1:
        drawn.append(figures.draw_coactivation(found["coactivation"], names))
    if len(names) > 1:
        drawn.append(figures.draw_transitions(found["transitions"], names))
    if weights := found.get("weights"):
        drawn.append(figures.draw_similarity(weights["similarity"], names))
    return ReportSection("Experts among themselves", paths(found), drawn)


def where(found: Mapping[str, Any]) -> ReportSection:
    names, by, at = found["layers"], found["by_position"], found["by_position"]["position"]
    even = float(np.log(found["E"]))
    drawn: list[Plot | str] = [figures.draw_by_position(at, by["entropy"], names, "nats", "Entropy by position", even)]
    if np.max(found["drop_rate"]) > 0:
        drawn.append(figures.draw_by_position(at, by["drop_rate"], names, "share dropped", "Drops by position"))
    return ReportSection("Where", drops_again(found), drawn)


def alike(found: Mapping[str, Any]) -> ReportSection:
    fair = found["fairness"]
    groups = [found["domains"][z] for z in fair["domain"]]
    return ReportSection(
        "Alike for all?", unfair(fair, found["domains"]), [figures.draw_gaps(fair["value"], fair["interval"], groups)]
    )


def specialised(found: Mapping[str, Any], domains: Sequence[str]) -> str:
    """The pair of expert and domain that belongs together most."""
    lift_NEA = np.nan_to_num(np.asarray(found["specialisation"]["lift_NEA"], float))
    share_NEA = np.asarray(found["specialisation"]["share_NEA"], float)
    n, e, a = (int(i) for i in np.unravel_index(np.argmax(lift_NEA), lift_NEA.shape))
    return (
        f"Most of all, expert {e} of {found['layers'][n]} is for {domains[a]}: {share_NEA[n, e, a]:.1%} of its tokens "
        f"choose it, {lift_NEA[n, e, a]:.1f} times the share of all tokens."
    )


def words_of(found: Mapping[str, Any], favourites: Sequence[Any], most: int = 32) -> str:
    """Favourite tokens of the busiest experts of all layers."""
    load_NE = np.asarray(found["load"], float)
    rows = []
    for n, e in (divmod(int(i), found["E"]) for i in np.argsort(-load_NE, axis=None, kind="stable")[:most]):
        words = ",  ".join(f'"{word["token"]}" {word["lift"]:.1f}x' for word in favourites[n][e])
        rows.append([f"{found['layers'][n]}, expert {e}", f"{load_NE[n, e] * found['E']:.2f}", words])
    return page.table(["", "load / mean", "tokens, and how many times their share of all"], rows, words=True)


def missed(found: Mapping[str, Any]) -> str:
    effects = found["knock_out"]
    rise_P = np.asarray(effects["rise"], float)
    (n, e), rise = effects["expert"][int(rise_P.argmax())], rise_P.max()
    share = np.mean(rise_P > 0)
    return (
        f"Masked one by one, {share:.0%} of the experts are missed by the whole text; most of all expert {e} of "
        f"{found['layers'][n]}, without which the loss rises by {rise:.4f} nats."
    )


def paths(found: Mapping[str, Any]) -> str:
    it = found["paths"]
    if len(found["layers"]) < 2:
        return ""
    return (
        f"{it['distinct']:,} different paths of first choices through the layers, as diverse as "
        f"{it['effective']:,.0f} equally frequent ones."
    )


def drops_again(found: Mapping[str, Any]) -> str:
    """Section on tokens that are dropped in several layers."""
    share_NN, chance_N = (np.asarray(found["drops_again"][key], float) for key in ("share_NN", "chance_N"))
    if len(chance_N) < 2 or not np.nan_to_num(chance_N).any():
        return ""
    off = ~np.eye(len(chance_N), dtype=bool)
    seen, chance = np.nanmean(share_NN[off]), np.nanmean(np.broadcast_to(chance_N, share_NN.shape)[off])
    return (
        f"A token that loses a choice in one layer loses one in another in {seen:.1%} of cases; by chance {chance:.1%}."
    )


def unfair(fair: Mapping[str, Any], domains: Sequence[str]) -> str:
    """The largest differences that chance would hardly give."""
    gaps = [gap for gap in fair["largest"] if gap["found"]]
    if not gaps:
        return "No difference between domains that chance would not give."
    words = (
        f"{gap['metric'].replace('_', ' ')} {abs(gap['difference']):.3g} between "
        f"{domains[gap['groups'][0]]} and {domains[gap['groups'][1]]}"
        for gap in gaps
    )
    return f"The largest differences that chance would hardly give: {'; '.join(words)}."


def beside_other(found: Mapping[str, Any], other: Mapping[str, Any]) -> list[Any]:
    """A table of both, and the choices that they share where they can be compared."""

    def column(one: Mapping[str, Any]) -> list[str]:
        information = one["information"]
        return [
            f"{one['step']:,}",
            NOBODY if one["loss"] is None else f"{one['loss']:.4f}",
            f"{(np.asarray(one['load'], float).max(1) * one['E']).max():.2f}",
            f"{int(np.sum(one['dead']))}",
            f"{np.mean(one['drop_rate']):.2%}",
            f"{np.mean(one['entropy']):.3f}",
            f"{np.max(information['nats_N']):.3f}" if information else NOBODY,
        ]

    heads = ["step", "loss", "busiest / mean", "dead experts", "dropped", "entropy, nats", "domain and expert, nats"]
    rows = [[head, a, b] for head, a, b in zip(heads, column(found), column(other), strict=True)]
    parts: list[Any] = [page.table(["", "this", other["name"]], rows)]
    if same := other.get("same"):
        parts.append(figures.draw_saturation(same["saturation"], same["chance"], found["layers"], other["name"]))
    return parts
