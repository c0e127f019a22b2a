"""Figures: one style that every eye can read, the numbers that were given, and nothing from outside."""

import itertools
import re
import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from moe_jax.files import write_file
from moe_jax.names import printable
from moe_jax.reporting import page, plots
from moe_jax.reporting.plots.style import BLACK, COLOURS, HATCHES, INK, MARKS, style

# Machado, Oliveira and Fernandes 2009, severity 1: what linear RGB becomes for who lacks one kind of cone.
MACHADO = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    "all cones": np.eye(3),
}
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def linear(colour: str) -> np.ndarray:
    rgb = np.array(to_rgb(colour))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of linear RGB under D65."""
    xyz = TO_XYZ @ np.clip(rgb, 0, 1) / (TO_XYZ @ np.ones(3))
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("eye", MACHADO)
def test_colours_are_told_apart_by_every_eye(eye):
    """Any two are further apart than six just noticeable differences (of 2.3), and seen on white and on black."""
    seen = [lab(np.array(MACHADO[eye]) @ linear(colour)) for colour in COLOURS]
    for a, b in itertools.combinations(range(len(COLOURS)), 2):
        assert np.linalg.norm(seen[a] - seen[b]) > 6 * 2.3, (COLOURS[a], COLOURS[b])
    for colour in COLOURS:
        luminance = TO_XYZ[1] @ linear(colour)
        assert min(1.05 / (luminance + 0.05), (luminance + 0.05) / 0.05) > 2, colour  # WCAG's contrast
    assert len(set(MARKS)) == len(set(HATCHES)) == len(COLOURS) == 8


def test_red_and_green_would_not_be():
    """Colours of a common palette would fail."""
    red, green = (lab(np.array(MACHADO["deuteranopia"]) @ linear(c)) for c in ("#d62728", "#2ca02c"))
    assert np.linalg.norm(red - green) < 6 * 2.3


def drawn(plot: plots.Plot) -> Figure:
    with matplotlib.rc_context(style()):
        figure = Figure(figsize=plot.size)
        plot.draw(figure)
    return figure


X = np.arange(5.0)
M = np.array([[0.25, 1.0, 4.0], [np.nan, 0.0, 2.0]])
LINE = plots.Curve(X, X)
EVERY = {
    "lines": plots.lines(
        [plots.Curve(X, X**2, "a <b>", "both", band=[X, 2 * X**2]), plots.Curve(X, X, look="dashed")], "x", "y", level=3
    ),
    "bars": plots.bars(
        ["p", "q & r"],
        {"one": [1, 2], "two": [3, np.nan]},
        "x",
        write="{:.2f}",
        spread={"one": [[0, 1], [2, 3]]},
    ),
    "stacked": plots.bars(["p", "q"], {"one": [1, 2], "two": [3, 5]}, "x", write="{:.0f}", stacked=True),
    "share": plots.matrices(
        {"a": M, "b": M}, "x", "y", "share", rows=["r", "s"], columns=["long name", "d", "e"], write="{:.1f}"
    ),
    "signed": plots.matrices({"": M}, "x", "y", "sign", "signed"),
    "ratio": plots.matrices({"a": M}, "x", "y", "times", "ratio", extent=(0, 10, 1.5, -0.5)),
    "histogram": plots.histogram({"a": X, "b": [np.nan, np.inf]}, "x"),
    "regions": plots.regions({"a": np.zeros((2, 2), int)}, (0, 1, 0, 1), np.ones((1, 2))),
    "beside": plots.beside([plots.lines([LINE], "x", "y", "first"), plots.histogram({"a": X}, "z", "second")] * 2, 3),
}


@pytest.mark.parametrize("name", EVERY)
def test_a_figure_stands_in_a_page(name):
    """Text and strokes have the page's colour, nothing comes from outside, the same numbers give the same bytes."""
    svg = EVERY[name].svg()
    assert svg == EVERY[name].svg()
    assert INK not in svg
    assert BLACK not in svg
    assert "currentColor" in svg
    root = ET.fromstring(svg)
    for element in root.iter():
        for attribute, value in element.attrib.items():
            if attribute.endswith("href"):
                assert value.startswith(("#", "data:image/png")), value
        assert "id" not in element.attrib or not element.tag.endswith("}g")
    assert not re.search(r"url\((?!#)", svg)


@pytest.mark.parametrize("name", EVERY)
def test_a_figure_is_a_picture_and_a_file(name, tmp_path):
    assert EVERY[name]._repr_png_().startswith(b"\x89PNG")
    for kind, start in ((".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")):
        assert EVERY[name].save(tmp_path / f"a{kind}").read_bytes().startswith(start)


NAMES = ("$x^{$", "$1 and $2", r"a\$b", "_a", "a <b> & c", "a\x01b\n", "caf\udce9", "日本語", "", "x" * 250)


def written(figure: str) -> str:
    """The text of an <svg>, which is well-formed."""
    return " ".join(ET.fromstring(figure.encode()).itertext())


LABELLED = {
    "lines": plots.lines([plots.Curve(X, X, name) for name in NAMES], "x", "y", "$x^{$", size=(6, 4)),
    "bars": plots.bars(NAMES, {name: [1.0] * len(NAMES) for name in NAMES[:2]}, "x", write="{:.1f}"),
    "matrices": plots.matrices({NAMES[0]: M}, "x", "y", "z", rows=NAMES, columns=NAMES[-3:]),
    "regions": plots.regions({NAMES[0]: np.zeros((2, 2), int)}, (0, 1, 0, 1)),
}
TOLD = {"regions": NAMES[:1]}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", LABELLED)
def test_names_are_drawn_as_they_are(name):
    """No name of a domain or a run is a formula, is hidden, breaks a file, or takes the room of the axes."""
    words = written(LABELLED[name].svg())
    for expected in TOLD.get(name, NAMES):
        shown = f"{'x' * 15}…{'x' * 15}" if len(expected) == 250 else printable(expected)
        assert shown in words


def test_names_stand_in_pages_as_they_are():
    html = page.page("$x^{$", [page.table(NAMES, [NAMES, NAMES]), *map(page.heading, NAMES), *map(page.text, NAMES)])
    assert r"caf\udce9" in html.encode().decode()


def test_logarithmic_axes_have_powers_and_no_formulas():
    few = plots.lines([plots.Curve([1, 1e5], [0.02, 0.05])], "x", "y", xscale="log", yscale="log")
    words = written(few.svg())
    assert "$" not in words
    assert {"10⁰", "10⁵", "2×10⁻²", "4×10⁻²"} <= set(words.split())  # noqa: RUF001


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a\.gif is of no kind that can be drawn; end it in \.png, \.svg, \.pdf"):
        EVERY["lines"].save(tmp_path / "a.gif")


def test_what_is_drawn_is_what_was_given():
    (axes,) = drawn(EVERY["lines"]).axes
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), X**2)
    assert axes.lines[2].get_ydata()[0] == 3
    (axes,) = drawn(EVERY["bars"]).axes
    widths = [[bar.get_width() for bar in group] for group in axes.containers]
    np.testing.assert_array_equal(widths, [[1, 2], [3, np.nan]])
    written = {text.get_text() for text in axes.texts}
    assert {"1.00", "2.00", "3.00"} <= written
    (axes,) = drawn(EVERY["stacked"]).axes
    assert [bar.get_x() for bar in axes.containers[1]] == [1, 2]
    assert {text.get_text() for text in axes.texts} == {"4", "7"}  # the sums
    share = drawn(EVERY["share"]).axes
    np.testing.assert_array_equal(share[0].images[0].get_array().filled(np.nan), M)
    assert share[0].images[0].get_clim() == share[1].images[0].get_clim() == (0, 4)
    assert drawn(EVERY["signed"]).axes[0].images[0].get_clim() == (-4, 4)
    ratio = drawn(EVERY["ratio"]).axes[0].images[0]
    np.testing.assert_allclose(ratio.get_array()[0], [-2, 0, 2])
    assert ratio.get_clim() == (-2, 2)
    counts, edges, _ = drawn(EVERY["histogram"]).axes[0].patches[0].get_data()
    assert counts.sum() == pytest.approx(1)
    assert (edges[0], edges[-1]) == (0, 4)


NAMED = [plots.Curve(X, X + i, f"a run with a name, number {i}", "both", i) for i in range(8)]


@pytest.mark.parametrize(
    "plot",
    [plots.lines(NAMED, "x", "y"), EVERY["bars"], EVERY["stacked"], EVERY["histogram"]],
    ids=["lines", "bars", "stacked", "histogram"],
)
def test_legends_hide_nothing(plot):
    """Names stand below the axes and their labels, inside the figure, with the colours of what they name."""
    with matplotlib.rc_context(style()):
        figure = Figure(figsize=plot.size, layout="constrained")
        plot.draw(figure)
        figure.draw_without_rendering()
    (legend,) = figure.legends
    names, (axes,) = legend.get_window_extent(), figure.axes
    assert names.y1 <= axes.get_tightbbox().y0 + 1
    assert figure.bbox.x0 <= names.x0
    assert names.x1 <= figure.bbox.x1
    assert axes.get_window_extent().height > figure.bbox.height / 2
    if len(axes.lines) == len(COLOURS):
        assert [h.get_color() for h in legend.legend_handles] == list(COLOURS)


def test_numbers_stand_in_their_regions():
    area = np.zeros((7, 9), int)
    area[1:6, 2:9], area[0] = 4, -1
    (axes,) = drawn(plots.regions({"": area}, (0, 9, 0, 7))).axes
    places = {text.get_text(): text.get_position() for text in axes.texts}
    assert set(places) == {"0", "4"}
    assert places["4"] == (5.5, 3.5)
    x, y = places["0"]
    assert area[int(y), int(x)] == 0


def test_several_figures_are_one():
    svg = EVERY["beside"].svg()
    assert svg.count(">first<") == svg.count(">second<") == 2


# ---------------------------------------------------------------- pages


def test_a_page_escapes_what_it_is_told(tmp_path):
    plot = plots.lines([plots.Curve(X, X, "<i>&")], "x", "y", "<b>&", "<u>&")
    parts = [
        page.figure(plot, wide=True),
        page.table(["", "<s>"], [["<q>", "&"]]),
        page.folded("<a>", "<p>"),
        page.text("<t>"),
    ]
    written = write_file(tmp_path / "a.html", page.page("<x>", parts, reload=5)).read_text()
    for tag in ("<b>", "<i>", "<u>", "<s>", "<q>", "<a>", "<t>", "<x>"):
        assert tag not in written
        assert tag.replace("<", "&lt;").replace(">", "&gt;") in written, tag
    assert '<meta http-equiv="refresh" content="5">' in written
    assert "refresh" not in page.page("x", [])
    assert [p.name for p in tmp_path.iterdir()] == ["a.html"]
