"""Labels of logarithmic axes as characters: figures have no formulas, so that no name is taken for one."""

import re
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import Formatter, LogFormatterSciNotation

MINUS, TIMES = "\u2212", "\u00d7"
RAISED = str.maketrans(f"0123456789-{MINUS}", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁻")


def label_powers(figure: Any) -> None:
    """Lets the logarithmic axes of a figure write their powers as characters."""
    for axes in figure.findobj(Axes):
        for axis in (axes.xaxis, axes.yaxis):
            if isinstance(formula := axis.get_major_formatter(), LogFormatterSciNotation):
                axis.set_major_formatter(PlainPowers(formula))
            if isinstance(formula := axis.get_minor_formatter(), LogFormatterSciNotation):
                axis.set_minor_formatter(PlainPowers(formula))


class PlainPowers(Formatter):
    """The labels that matplotlib's own formatter would write as formulas, where it would."""

    def __init__(self, formula: LogFormatterSciNotation):
        self.formula = formula

    def set_axis(self, axis: Any) -> None:
        self.formula.set_axis(axis)

    def set_locs(self, locs: Any) -> None:
        self.formula.set_locs(locs)

    def __call__(self, x: float, pos: int | None = None) -> str:
        return plain_power(self.formula(x, pos))


def plain_power(formula: str) -> str:
    r"""Writes matplotlib's formula of a number, `$\mathdefault{10^{-3}}$`, as characters."""
    inside = formula.removeprefix(r"$\mathdefault{").removesuffix("}$").replace(r"\times", TIMES)
    return re.sub(rf"\^\{{([-{MINUS}]?\d+)\}}", lambda power: power[1].translate(RAISED), inside)
