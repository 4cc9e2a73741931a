"""Reading the pages that we write as a browser would, and what every one of them must be."""

import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

# What a text from data may hold: nothing of it may become markup.
ATTACK = """</span><script>alert("x")</script><img src=x onerror='y'>&lt;"""
VOID = {"meta", "link", "br", "img"}


class Page(HTMLParser):
    """Elements in the order in which they open; fails when one is closed that is not open."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def assert_escaped(page):
    """No element or attribute of the attack is on the page; returns how often its text is."""
    read = Page(page)
    tags = [tag for tag, _ in read.elements]
    assert "script" not in tags
    assert "img" not in tags
    assert not [name for _, attributes in read.elements for name in attributes if name.startswith("on")]
    return sum(ATTACK in data for data in read.texts)


def assert_self_contained(page):
    """The page asks for nothing, and takes every colour from variables that light, dark and print all set; returns what was read."""
    read = Page(page)
    assert not {"link", "script", "iframe"} & {tag for tag, _ in read.elements}
    assert not {"src", "srcset"} & {name for _, attributes in read.elements for name in attributes}
    assert all(attributes["href"].startswith("#") for _, attributes in read.elements if "href" in attributes)
    assert not re.search(r"https?:|url\(|@import", page[page.index("<style>") : page.index("</style>")])
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page
    used = set(re.findall(r"var\((--[a-z]+)\)", page)) - {"--much"}
    light, dark, printed = re.findall(r":root \{([^}]*)\}", page)
    for scheme in (light, dark, printed):
        assert used <= set(re.findall(r"(--[a-z]+):", scheme))
    return read


def assert_inside_frames(page):
    """Every mark, line and text of every plot starts inside its frame; returns how many plots there are."""
    plots = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    for source in plots:
        root = ElementTree.fromstring(source)
        width, height = (float(value) for value in root.get("viewbox", root.get("viewBox")).split()[2:])
        for element in root.iter():
            places = {"x": [], "y": []}
            for name, value in element.attrib.items():
                if name in ("x", "x1", "x2", "cx"):
                    places["x"].append(float(value))
                if name in ("y", "y1", "y2", "cy"):
                    places["y"].append(float(value))
            for corner in element.get("points", "").split():
                x, y = corner.split(",")
                places["x"].append(float(x))
                places["y"].append(float(y))
            assert all(-1 <= x <= width + 1 for x in places["x"]), source
            assert all(-1 <= y <= height + 1 for y in places["y"]), source
    return len(plots)
