"""Equations become MathML when the site is built, so that a page needs no script and no network to show them."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

# What pymdownx.arithmatex (generic) makes of $...$ and $$...$$.
_EQUATION = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    return _EQUATION.sub(lambda found: _mathml(html.unescape(found[3]), block=found[2] == "["), content)


def _mathml(latex: str, *, block: bool) -> str:
    mathml: str = convert(latex.strip(), display="block" if block else "inline")
    return f'<div class="equation">{mathml}</div>' if block else mathml
