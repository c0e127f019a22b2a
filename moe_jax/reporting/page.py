"""Static HTML pages: one file, everything inside it, for light and dark, for a desk and a phone.

Nothing is wider than the screen but what scrolls inside its own container: tables, wide figures, preformatted text.
"""

import html
from collections.abc import Collection, Mapping, Sequence

from moe_jax.reporting.plots.style import Plot


def page(title: str, parts: Sequence[str], reload: int | None = None) -> str:
    """A page of these parts, which are HTML; the title is text. reload: seconds until a browser loads it again."""
    again = f'<meta http-equiv="refresh" content="{reload}">' if reload else ""
    title = html.escape(title)
    inside = "\n".join(parts)
    whole = f"{HEAD}{again}<title>{title}</title>{LOOK}<body><h1>{title}</h1><main>\n{inside}\n</main></body></html>\n"
    return whole.encode("utf-8", "backslashreplace").decode()  # the name of a file may be no UTF-8


def figure(plot: Plot, wide: bool = False) -> str:
    """A figure with its title and note, drawn in the colours of the page."""
    kind = ' class="wide"' if wide else ""
    note = f"<span>{html.escape(plot.note)}</span>" if plot.note else ""
    return f"<figure{kind}><figcaption>{html.escape(plot.title)}{note}</figcaption>{plot.svg()}</figure>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], words: bool = False, marked: Collection[int] = ()) -> str:
    """A table whose first column names its rows; wider ones scroll.

    words: whether the last column is text. marked: the numbers of rows that stand out.
    """
    cells = "".join(f"<th>{html.escape(word)}</th>" for word in head)
    body = "".join(
        f"<tr{MARKED if i in marked else ''}><th>{html.escape(first)}</th>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in rest)
        + "</tr>"
        for i, (first, *rest) in enumerate(rows)
    )
    kind = ' class="words"' if words else ""
    return f'<div class="table"><table{kind}>{f"<tr>{cells}</tr>" if head else ""}{body}</table></div>'


def text(words: str) -> str:
    return f"<p>{html.escape(words)}</p>"


def heading(words: str) -> str:
    return f"<h2>{html.escape(words)}</h2>"


def facts_list(rows: Mapping[str, str]) -> str:
    """A list of names and what is to be said of each; beside it on a desk, below it on a phone."""
    inside = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(words)}</dd>" for name, words in rows.items())
    return f"<dl>{inside}</dl>"


def folded(title: str, inside: str) -> str:
    """Text that is shown when its title is clicked."""
    return details(title, [f"<pre>{html.escape(inside)}</pre>"])


def details(title: str, parts: Sequence[str], shown: bool = False) -> str:
    """Parts, which are HTML, that are shown when their title is clicked, or from the beginning."""
    inside = "\n".join(parts)
    return f"<details{' open' if shown else ''}><summary>{html.escape(title)}</summary>\n{inside}\n</details>"


MARKED = ' class="marked"'
HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
"""
LOOK = """
<style>
:root { color-scheme: light dark; --ink: #1f2328; --soft: #626b75; --line: #d8dee4; --page: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #dfe3e8; --soft: #98a1ab; --line: #363c44; --page: #15181c; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); overflow-wrap: anywhere;
       max-width: 1120px; margin: 2.5rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.5rem; font-weight: 600; }
h2 { font-size: 1.15rem; font-weight: 600; margin: 1.2rem 0 0; }
main { display: grid; grid-template-columns: 1fr 1fr; gap: 2rem 2rem; }
main > * { grid-column: 1 / -1; margin: 0; min-width: 0; }
figure:not(.wide) { grid-column: auto; }
figcaption { font-weight: 600; margin-bottom: .4rem; }
figcaption span { font-weight: 400; color: var(--soft); margin-left: .6rem; font-size: .87rem; }
svg, img { max-width: 100%; height: auto; } svg { width: 100%; }
svg text { font-family: system-ui, sans-serif !important; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .22rem 1.6rem .22rem 0; border-bottom: 1px solid var(--line); text-align: right; }
.words :is(th, td):last-child { text-align: left; min-width: 18rem; }
th:first-child { text-align: left; font-weight: 400; color: var(--soft); }
.marked :is(th, td) { font-weight: 600; color: var(--ink); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1.6rem; }
dt { color: var(--soft); } dd { margin: 0; }
p { max-width: 52rem; } pre { overflow-x: auto; font-size: .84rem; overflow-wrap: normal; }
summary { cursor: pointer; font-weight: 600; }
@media (max-width: 800px) {
  body { margin: 1rem auto; padding: 0 .8rem; } figure:not(.wide) { grid-column: 1 / -1; }
  figure.wide { overflow-x: auto; } figure.wide svg { min-width: 640px; }
  dl { grid-template-columns: 1fr; } dd { margin-bottom: .5rem; }
}
</style></head>
"""
