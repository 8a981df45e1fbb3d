"""What a page may hold: HTML from outside is reduced to what reports use, and nothing of it runs or loads."""

import re

import nh3

MATH = set(
    "math menclose mfrac mi mn mo mover mpadded mphantom mroot mrow mspace msqrt mstyle msub msubsup msup mtable mtd"
    " mtext mtr munder munderover".split()
)
MATH_LOOKS = set(
    "accent columnalign columnlines columnspacing depth display displaystyle fence form height linebreak linethickness"
    " lspace mathbackground mathcolor mathsize mathvariant maxsize minsize movablelimits notation rowlines rowspacing"
    " rspace scriptlevel separator stretchy symmetric voffset width".split()
)
TAGS = (nh3.ALLOWED_TAGS | {"details", "summary"} | MATH) - {"area", "map"}
ATTRIBUTES = {
    "*": {"align", "class", "id", "style", "title"},
    "a": {"href"},
    "details": {"open"},
    "img": {"alt", "height", "src", "width"},
    "ol": {"start"},
    **dict.fromkeys(("td", "th"), {"colspan", "rowspan"}),
    **dict.fromkeys(MATH, MATH_LOOKS),
}
# none of these takes a url()
STYLES = {"background-color", "color", "font-style", "font-weight", "text-align", "text-decoration", "vertical-align"}


def clean(body: str) -> str:
    """HTML without scripts, event handlers, forms, frames, styles that load, and links but to pages and mail."""
    return nh3.clean(
        body,
        tags=TAGS,
        attributes=ATTRIBUTES,
        attribute_filter=_attribute,
        url_schemes={"http", "https", "mailto", "data"},
        filter_style_properties=STYLES,
    )


def _attribute(tag: str, name: str, value: str) -> str | None:
    """Images are data; links are not."""
    if name in ("href", "src"):
        data = re.sub(r"[\x00-\x20]", "", value[:100]).lower().startswith("data:image/" if tag == "img" else "data:")
        return value if data == (tag == "img") else None
    return value


def text_of(fragment: str) -> str:
    """The text of a piece of HTML, escaped."""
    return nh3.clean(fragment, tags=set())
