"""One style for every figure: in a page it takes the page's colours, in a notebook or a file it is black on white."""

import dataclasses
import io
import re
import textwrap
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_jax.files import write_file
from moe_jax.names import printable, without_middle

if TYPE_CHECKING:
    from matplotlib.figure import FigureBase

# Okabe and Ito's colours, with a violet and a brown: told apart by every eye and seen on white and on black; a mark and
# a hatch for each, for print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8A3FFC", "#734A12")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "p")
HATCHES = ("", "///", "...", "\\\\\\", "xx", "++", "---", "|||")
Number = int | float | np.number
Size = tuple[int | float, int | float]  # inches, width and height
INK = "#123456"  # stands for the page's text colour in a figure, so that one page serves light and dark
BLACK = "#1f2328"
PER_INCH = 12  # characters of a title
LONGEST_NAME = 40  # characters
WIDE, NARROW = (11.4, 3.0), (5.6, 3.1)


def style(ink: str = BLACK) -> Any:
    """matplotlib's settings; text and strokes in this colour."""
    return {
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink),
        **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
        **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none"),
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.alpha": 0.15,
        "grid.color": ink,
        "lines.color": ink,
        "font.size": 9.5,
        "axes.titlesize": 9.5,
        "figure.titlesize": 10.5,
        "hatch.linewidth": 0.6,
        "text.parse_math": False,  # a dollar in the name of a domain or a run is a dollar
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "moe_jax",  # the same numbers give the same file
    }


@dataclasses.dataclass(frozen=True)
class Plot:
    """A figure that is drawn where it is shown: `svg` for a page, a picture in a notebook, `save` for a file.

    draw: draws into an empty matplotlib figure, whose settings are set. size: in inches, width and height.
    """

    draw: Callable[["FigureBase"], None]
    title: str = ""
    note: str = ""  # what is to be known to read it
    size: Size = NARROW

    def svg(self) -> str:
        """The figure as an <svg> whose ink is the colour of the text around it."""
        text = self._bytes("svg", INK, facecolor="none", metadata=_UNDATED).decode()
        text = re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :].replace(INK, "currentColor"))  # ids repeat
        head, _, inside = text.partition(">")
        return re.sub(r' (width|height)="[^"]*"', "", head) + ">" + inside  # as large as the page has room

    def save(self, path: str | Path) -> Path:
        """Writes it to a .png, .svg or .pdf file, titles and all; ValueError for another kind."""
        path = Path(path)
        kinds: dict[str, dict[str, Any]] = {".png": {"dpi": 150}, ".svg": {"metadata": _UNDATED}, ".pdf": {}}
        if path.suffix not in kinds:
            raise ValueError(f"{path} is of no kind that can be drawn; end it in {', '.join(kinds)}.")
        drawn = self._bytes(path.suffix[1:], BLACK, titled=True, facecolor="white", **kinds[path.suffix])
        return write_file(path, drawn)

    @property
    def heading(self) -> str:
        """Title and note, in as many lines as they take at this width."""
        room = int(PER_INCH * self.size[0])
        if len(f"{self.title}   ({self.note})") <= room:
            return f"{self.title}   ({self.note})" if self.note else self.title
        return "\n".join([self.title, *textwrap.wrap(self.note, room)])

    def _repr_png_(self) -> bytes:
        return self._bytes("png", BLACK, titled=True, dpi=110, facecolor="white")

    def _bytes(self, kind: str, ink: str, titled: bool = False, **options: Any) -> bytes:
        import matplotlib
        from matplotlib.figure import Figure

        from moe_jax.reporting.plots.powers import label_powers

        written = io.BytesIO()
        with matplotlib.rc_context(style(ink)):
            figure = Figure(figsize=self.size, layout="constrained")  # no pyplot, no global state
            self.draw(figure)
            label_powers(figure)
            if titled and self.title:
                figure.suptitle(self.heading, x=0.01, ha="left")
            with warnings.catch_warnings():
                if kind == "svg":  # which leaves the font to its reader
                    warnings.filterwarnings("ignore", "Glyph .* missing from font")
                figure.savefig(written, format=kind, **options)
        return written.getvalue()


_UNDATED: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))


def fitted(name: str, most: int = LONGEST_NAME) -> str:
    """Writes somebody's name of something so that it fits beside axes and in legends."""
    return without_middle(printable(name), most)


def colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


@dataclasses.dataclass(frozen=True)
class Legend:
    """Names of what is drawn, below the axes, so that no curve is hidden; in as many columns as have room.

    labels: in the order of the artists. width: of the figure, in inches.
    """

    labels: Sequence[str]
    width: int | float = NARROW[0]

    @property
    def columns(self) -> int:
        widest = max(map(len, self.labels), default=0) + 6  # the line before a name, and the space after it
        return max(1, min(len(self.labels), int(PER_INCH * self.width / widest)))

    @property
    def height(self) -> float:
        """Inches that a figure needs besides."""
        return 0.19 * -(-len(self.labels) // self.columns) if self.labels else 0.0

    def draw(self, figure: Any, artists: Sequence[Any]) -> None:
        if self.labels:
            figure.legend(artists, self.labels, loc="outside lower center", ncols=self.columns, fontsize=8.5)


def beside(plots: Sequence[Plot], columns: int | None = None, title: str = "", note: str = "") -> Plot:
    """Several figures as one, row by row, each under its own title; all in one row by default."""
    columns = columns or len(plots)
    rows = [plots[i : i + columns] for i in range(0, len(plots), columns)]

    def draw(figure: Any) -> None:
        heights = [max(plot.size[1] for plot in row) for row in rows]
        for whole, row in zip(
            figure.subfigures(len(rows), 1, squeeze=False, height_ratios=heights).flat, rows, strict=True
        ):
            widths = [plot.size[0] for plot in row] + [NARROW[0]] * (columns - len(row))
            for part, plot in zip(
                whole.subfigures(1, columns, squeeze=False, width_ratios=widths).flat, row, strict=False
            ):
                plot.draw(part)
                part.suptitle(plot.heading)

    width = max(sum(plot.size[0] for plot in row) for row in rows)
    height = sum(max(plot.size[1] for plot in row) for row in rows)
    return Plot(draw, title, note, (width, height))
