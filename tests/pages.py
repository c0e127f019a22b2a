"""A reader of HTML pages: whether one is well formed, stands alone, and is legible at a width of 500 pixels."""

import html.parser
import re

VOID = {"meta", "link", "br", "img", "path", "use", "rect", "image", "line"}
NARROW = 500  # pixels


class Page(html.parser.HTMLParser):
    """Reader of a page: its text and parts; an AssertionError where its tags are not closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.text = text
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.outside: list[str] = []  # addresses of what is fetched
        self.titles: list[str] = []
        self.words: list[str] = []
        self.tables: list[list[str]] = []  # of each, the classes of the elements around it
        self.widths: list[float] = []  # given in attributes, outside of figures
        self.details: dict[str, bool] = {}  # summaries, and whether they are open
        self.rows: list[tuple[str | None, list[str]]] = []  # of all tables: class and cells
        self.viewport = ""
        self.feed(text)
        self.close()
        assert self.open == [], self.open

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.outside += [v for k, v in attributes if k.endswith(("href", "src")) and not v.startswith(("#", "data:"))]
        if tag == "meta" and given.get("name") == "viewport":
            self.viewport = given["content"]
        if "width" in given and not self.inside("svg"):
            self.widths.append(float(re.match(r"[\d.]+", given["width"])[0]))
        if tag == "table":
            self.tables.append([a.get("class") or "" for _, a in self.open])
        if tag == "tr":
            self.rows.append((given.get("class"), []))
        if tag in ("td", "th"):
            self.rows[-1][1].append("")
        if tag not in VOID:
            self.open.append((tag, given))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop()[0] == tag

    def handle_data(self, data):
        tag = self.open[-1][0] if self.open else ""
        if data.strip() and tag in ("figcaption", "h2"):
            self.titles.append(data.strip())
        if tag == "summary":
            self.details[data.strip()] = "open" in self.open[-2][1]
        if tag in ("td", "th"):
            self.rows[-1][1][-1] += data
        if tag != "style" and not self.inside("svg"):
            self.words.append(data)

    def inside(self, tag: str) -> bool:
        return any(name == tag for name, _ in self.open)

    @property
    def said(self) -> str:
        """All words, without figures."""
        return " ".join(" ".join(self.words).split())


def stands_alone(text: str) -> Page:
    """The page, which is well formed, needs nothing from outside and is legible on a narrow screen."""
    page = Page(text)
    assert page.outside == []
    assert "<script" not in text
    assert not re.search(r"url\((?!#)|@import", text)
    return legible(page)


def legible(page: Page) -> Page:
    """The page, of which nothing is wider than a narrow screen but what scrolls inside its own container."""
    style = " ".join(re.findall(r"<style>(.*?)</style>", page.text, re.DOTALL))
    assert "width=device-width" in page.viewport
    assert all("table" in around[-1].split() for around in page.tables), page.tables
    assert ".table { overflow-x: auto; }" in style
    assert [w for w in page.widths if w > NARROW] == []
    assert "max-width: 100%" in style
    fixed = re.findall(r"([^{}]*)\{[^{}]*?(?<!max-)(?<!min-)\bwidth: *[\d.]+(?:px|rem|pt)", style)
    assert fixed == [], "nothing has a fixed width"
    wide = re.findall(r"([\w.]+) svg \{ min-width", style)
    assert all(f"{box} {{ overflow-x: auto; }}" in style for box in wide), "what may be wider scrolls"
    assert not re.search(r'<svg[^>]* width="', page.text), "figures take the room that there is"
    narrow = style[style.index("@media (max-width") :]
    assert re.fullmatch(r"[^{]*\{(?:[^{}]*\{[^{}]*\})*\s*\}\s*", narrow), "what is for narrow screens has the last word"
    return page
