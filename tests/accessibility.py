"""What of WCAG 2.2 can be read off a page's text: names, order of headings, heads of tables, contrast, no request.

Contrast is that of every text against the ground it stands on, by the page's own style sheet, in the light and the
dark scheme, on a wide and on a narrow page: at least 4.5 (1.4.3), and 3 for what a figure is made of (1.4.11). The
style sheet may use the selectors and the media queries that are read here; another one is an error, as is a text whose
colour or ground no rule gives, so that nothing passes unread.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

TEXT_CONTRAST, GRAPHIC_CONTRAST = 4.5, 3.0
VOID = frozenset({"meta", "link", "img", "br", "hr", "input"})
# Lines of a grid help the eye; what they say stands at the axis too.
DECORATION = frozenset({"--grid", "--page"})
SCHEMES = ("light", "dark")
WIDTHS = ("wide", "narrow")

Colour = tuple[float, float, float]


@dataclass(eq=False)
class Element:
    """A tag with what is in it."""

    tag: str
    attributes: dict[str, str]
    parent: Element | None
    children: list[Element] = field(default_factory=list)
    text: str = ""

    @functools.cached_property
    def style(self) -> dict[str, str]:
        """The declarations of its own style attribute."""
        pairs = (one.partition(":") for one in self.attributes.get("style", "").split(";"))
        return {name.strip(): value.strip() for name, _, value in pairs}

    def walk(self) -> Iterator[Element]:
        yield self
        for child in self.children:
            yield from child.walk()

    def find(self, *tags: str) -> list[Element]:
        return [element for element in self.walk() if element.tag in tags]

    def above(self) -> Iterator[Element]:
        """Itself and what it is in, innermost first."""
        element: Element | None = self
        while element is not None:
            yield element
            element = element.parent

    def all_text(self) -> str:
        return " ".join("".join(element.text for element in self.walk()).split())


class _Tree(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.root = self.here = Element("", {}, None)
        self.feed(html)
        self.close()
        if self.here is not self.root:
            raise ValueError(f"<{self.here.tag}> is not closed")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs}, self.here)
        self.here.children.append(element)
        if tag not in VOID:
            self.here = element

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.here.children.append(Element(tag, {name: value or "" for name, value in attrs}, self.here))

    def handle_endtag(self, tag: str) -> None:
        if self.here.tag != tag or self.here.parent is None:
            raise ValueError(f"</{tag}> closes <{self.here.tag}>")
        self.here = self.here.parent

    def handle_data(self, data: str) -> None:
        self.here.text += data


def parse(html: str) -> Element:
    """The page's tree.

    Raises:
        ValueError: tags that do not match.
    """
    return _Tree(html).root


def problems(html: str) -> list[str]:
    """What a person who does not see the page, or not well, would stumble over; empty if nothing was found."""
    page = parse(html)
    return [*_names(page), *_headings(page), *_tables(page), *_requests(page), *_contrasts(page)]


def _names(page: Element) -> Iterator[str]:
    html = page.find("html")
    if len(html) != 1 or not html[0].attributes.get("lang"):
        yield "the page does not say its language"
    titles = [element for element in page.find("title") if element.parent and element.parent.tag == "head"]
    if len(titles) != 1 or not titles[0].all_text():
        yield "the page has no title"
    if len(page.find("main")) != 1:
        yield "the page has no main part"
    viewport = [one for one in page.find("meta") if one.attributes.get("name") == "viewport"]
    if not viewport or "width=device-width" not in viewport[0].attributes.get("content", ""):
        yield "the page is not laid out for the width of its device"
    if any(
        re.search(r"user-scalable=no|maximum-scale", one.attributes.get("content", "")) for one in viewport
    ):
        yield "the page cannot be enlarged"
    for element in page.find("img", "svg"):
        outer = [one.tag for one in element.above()][1:]
        if "svg" in outer:
            continue
        name = element.attributes.get("alt" if element.tag == "img" else "aria-label", "")
        if not name.strip():
            yield f"<{element.tag}> has no name"
        if element.tag == "svg" and element.attributes.get("role") != "img":
            yield f"<svg> {name[:40]!r} is not said to be an image"
    for figure in page.find("figure"):
        if not any(caption.all_text() for caption in figure.find("figcaption")):
            yield "a figure has no caption"
    seen: set[str] = set()
    for element in page.walk():
        identifier = element.attributes.get("id")
        if identifier is not None and identifier in seen:
            yield f"two elements are called {identifier!r}"
        seen.add(identifier or "")


def _headings(page: Element) -> Iterator[str]:
    headings = page.find("h1", "h2", "h3", "h4", "h5", "h6")
    levels = [int(heading.tag[1]) for heading in headings]
    if levels.count(1) != 1 or levels[:1] != [1]:
        yield "the page does not begin with its one heading of the first level"
    for above, below in itertools.pairwise(levels):
        if below > above + 1:
            yield f"a heading of level {below} follows one of level {above}"
    for heading in headings:
        if not heading.all_text():
            yield f"a heading <{heading.tag}> is empty"


def _tables(page: Element) -> Iterator[str]:
    for table in page.find("table"):
        heads = table.find("th")
        if not heads:
            yield "a table has no heads"
        for head in heads:
            if head.attributes.get("scope") not in ("col", "row"):
                yield f"table head {head.all_text()!r} does not say what it is the head of"
            if not head.all_text():
                yield "a table head is empty"
        lengths = {sum(cell.tag in ("th", "td") for cell in row.children) for row in table.find("tr")}
        if len(lengths) > 1:
            yield f"a table has rows of {sorted(lengths)} cells"


def _requests(page: Element) -> Iterator[str]:
    fetching = frozenset({"script", "link", "iframe", "object", "embed", "base", "video", "audio", "source"})
    for element in page.walk():
        if element.tag in fetching:
            yield f"<{element.tag}> could make a request"
        for name, value in element.attributes.items():
            if name in ("src", "srcset", "data", "poster", "action", "background") or name.startswith("on"):
                yield f"<{element.tag}> has {name}={value[:60]!r}"
            if name.endswith("href") and not value.startswith("#"):
                yield f"<{element.tag}> leads to {value[:60]!r}"
            if re.search(r"url\((?!#)", value):
                yield f"<{element.tag}> loads {value[:60]!r}"
    for style in page.find("style"):
        if re.search(r"@import|url\(", style.text):
            yield "the style sheet loads something"


# The style sheet


@dataclass(frozen=True)
class Rule:
    """A selector's declarations, and the pages that it is for: those of a scheme, of a width, or all."""

    selector: str
    declarations: dict[str, str]
    scheme: str | None
    width: str | None


def _rules(css: str, scheme: str | None = None, width: str | None = None) -> Iterator[Rule]:
    css = re.sub(r"/\*.*?\*/", "", css, flags=re.DOTALL)
    while css.strip():
        head, _, rest = css.partition("{")
        depth, end = 1, 0
        for end, character in enumerate(rest):  # noqa: B007
            depth += {"{": 1, "}": -1}.get(character, 0)
            if depth == 0:
                break
        body, css = rest[:end], rest[end + 1 :]
        head = " ".join(head.split())
        if head.startswith("@media"):
            query = head.removeprefix("@media").strip()
            if query == "(prefers-color-scheme: dark)":
                yield from _rules(body, "dark", width)
            elif re.fullmatch(r"\(max-width: [\d.]+(rem|px)\)", query):
                yield from _rules(body, scheme, "narrow")
            else:
                raise ValueError(f"media query {query!r} is not read here")
            continue
        if head.startswith("@"):
            raise ValueError(f"rule {head!r} is not read here")
        pairs = (one.partition(":") for one in body.split(";") if one.strip())
        declarations = {name.strip(): value.strip() for name, _, value in pairs}
        for selector in head.split(","):
            yield Rule(selector.strip(), declarations, scheme, width)


class Styles:
    """A page's colours in one scheme and at one width."""

    def __init__(self, css: str, scheme: str, width: str) -> None:
        rules = [
            rule for rule in _rules(css) if rule.scheme in (None, scheme) and rule.width in (None, width)
        ]
        # By property, and by what comes before or after an element, the declarations in the order of their strength.
        self.declared: dict[tuple[str, str], list[tuple[str, str]]] = {}
        for rule in sorted(rules, key=lambda rule: _specificity(rule.selector)):
            selector, _, pseudo = rule.selector.partition("::")
            for simple in selector.split():
                _simple(simple)
            for name, value in rule.declarations.items():
                self.declared.setdefault((name, pseudo), []).append((selector, value))
        self.tints: dict[int, list[tuple[Colour, float]]] = {}
        self.variables: dict[str, str] = {}
        for rule in rules:
            if rule.selector == ":root":
                self.variables.update(
                    {name: value for name, value in rule.declarations.items() if name.startswith("--")}
                )

    def value(self, element: Element, name: str, pseudo: str = "") -> str | None:
        """The strongest declaration of a property for the element itself, not what it inherits."""
        if not pseudo and name in element.style:
            return element.style[name]
        for selector, value in reversed(self.declared.get((name, pseudo), [])):
            if _matches(element, selector):
                return value
        return None

    def tinted(self, svg: Element) -> list[tuple[Colour, float]]:
        """Colour and opacity of every translucent area of a figure."""
        if id(svg) not in self.tints:
            found = []
            for shape in svg.walk():
                fill, opacity = self.value(shape, "fill"), self.opacity(shape)
                if fill not in (None, "none") and opacity is not None:
                    found.append((self.colour(fill), float(opacity)))
            self.tints[id(svg)] = list(dict.fromkeys(found))
        return self.tints[id(svg)]

    def opacity(self, shape: Element) -> str | None:
        return self.value(shape, "opacity") or self.value(shape, "fill-opacity")

    def colour(self, value: str) -> Colour:
        variable = re.fullmatch(r"var\((--[\w-]+)\)", value)
        if variable:
            value = self.variables[variable[1]]
        digits = re.fullmatch(r"#([0-9a-fA-F]{6})", value)
        if not digits:
            raise ValueError(f"colour {value!r} is not read here")
        red, green, blue = (int(digits[1][at : at + 2], 16) / 255 for at in (0, 2, 4))
        return red, green, blue

    def ground(self, element: Element) -> str:
        """The background of the innermost element that has one."""
        for outer in element.above():
            value = self.value(outer, "background") or self.value(outer, "background-color")
            if value is not None and value != "none":
                return value
        raise ValueError(f"<{element.tag}> stands on no ground that a rule gives")

    def ink(self, element: Element) -> str:
        """The colour of an element's text: of an SVG's its fill, and otherwise what it inherits."""
        inside = [outer.tag for outer in element.above()]
        name = "fill" if "svg" in inside else "color"
        for outer in element.above():
            value = self.value(outer, name)
            if value is not None:
                return value
            if outer.tag == "svg":
                break
        raise ValueError(f"<{element.tag}> {element.all_text()[:30]!r} has no colour that a rule gives")


def _matches(element: Element, selector: str) -> bool:
    *outer, last = selector.split()
    if not _is(element, last):
        return False
    above = list(element.above())[1:]
    for wanted in reversed(outer):
        while above and not _is(above[0], wanted):
            above.pop(0)
        if not above:
            return False
        above.pop(0)
    return True


@functools.cache
def _simple(simple: str) -> tuple[str, frozenset[str], str | None]:
    """Tag, classes and state of a selector without spaces."""
    parts = re.fullmatch(r"(\*|[\w-]*)((?:\.[\w-]+)*)(:root|:first-child)?", simple)
    if not parts:
        raise ValueError(f"selector {simple!r} is not read here")
    return parts[1], frozenset(parts[2].split(".")[1:]), parts[3]


def _is(element: Element, simple: str) -> bool:
    tag, classes, state = _simple(simple)
    if tag not in ("", "*", element.tag):
        return False
    if not classes <= set(element.attributes.get("class", "").split()):
        return False
    if state == ":root":
        return element.tag == "html"
    first = element.parent is not None and element.parent.children[:1] == [element]
    return state is None or first


def _specificity(selector: str) -> int:
    return sum(
        100 * (simple.count(".") + simple.count(":")) + bool(re.match(r"[a-z]", simple))
        for simple in selector.split()
    )


def _contrasts(page: Element) -> Iterator[str]:
    css = "".join(style.text for style in page.find("style"))
    found: dict[str, None] = {}
    for scheme, width in itertools.product(SCHEMES, WIDTHS):
        styles = Styles(css, scheme, width)
        for problem in itertools.chain(_texts(page, styles), _graphics(page, styles)):
            found[f"{problem} in the {scheme} scheme"] = None
    yield from found


def _texts(page: Element, styles: Styles) -> Iterator[str]:
    for body in page.find("body"):
        for element in body.walk():
            if element.text.strip():
                ink = styles.ink(element)
                for ground in _grounds(element, styles):
                    yield from _too_weak(
                        f"text {element.text.strip()[:30]!r}", styles.colour(ink), ground, TEXT_CONTRAST
                    )
            label = element.attributes.get("data-label")
            if label and styles.value(element, "content", "before"):
                ink = styles.value(element, "color", "before") or styles.ink(element)
                ground = styles.colour(styles.ground(element))
                yield from _too_weak(f"label {label!r}", styles.colour(ink), ground, TEXT_CONTRAST)


def _grounds(element: Element, styles: Styles) -> Iterator[Colour]:
    """What a text may stand on: its background and, in a figure, every translucent area of it."""
    behind = styles.colour(styles.ground(element))
    yield behind
    for svg in (outer for outer in element.above() if outer.tag == "svg"):
        for tint, opacity in styles.tinted(svg):
            yield _blend(tint, behind, opacity)


def _graphics(page: Element, styles: Styles) -> Iterator[str]:
    for svg in page.find("svg"):
        behind = styles.colour(styles.ground(svg))
        used = {
            variable
            for element in svg.walk()
            if not styles.opacity(element)
            for name in ("fill", "stroke")
            for variable in re.findall(r"var\((--[\w-]+)\)", styles.value(element, name) or "")
        }
        for variable in sorted(used - DECORATION):
            yield from _too_weak(f"{variable}", styles.colour(f"var({variable})"), behind, GRAPHIC_CONTRAST)


def _too_weak(what: str, ink: Colour, ground: Colour, least: float) -> Iterator[str]:
    ratio = contrast(ink, ground)
    if ratio < least:
        yield f"{what} has a contrast of {ratio:.2f}, less than {least}"


def contrast(one: Colour, other: Colour) -> float:
    """WCAG's contrast ratio of two sRGB colours, channels from 0 to 1: from 1 to 21."""
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: Colour) -> float:
    red, green, blue = (
        channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4 for channel in colour
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _blend(over: Colour, under: Colour, opacity: float) -> Colour:
    red, green, blue = (opacity * a + (1 - opacity) * b for a, b in zip(over, under, strict=True))
    return red, green, blue
