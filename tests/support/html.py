"""An HTML page as a reader's browser gets it, and a text that no page may take for markup."""

from __future__ import annotations

from html.parser import HTMLParser

EVIL = "a <script>alert(\"1\")</script> & a 'cat' {0}"
VOID = {"meta", "img", "br", "circle", "rect", "input"}
BLOCKS = {"p", "div", "table", "ul", "figure", "details", "h1", "h2", "h3"}  # which no paragraph may hold
FETCHING = {"src", "href", "srcset", "poster", "action", "data", "xlink:href", "background"}


class Reader(HTMLParser):
    """Collects tags, text and images; fails on a tag that is closed out of turn, or a block in a paragraph."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.images, self.links, self.text, self._open = [], [], [], "", []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert not (tag in BLOCKS and "p" in self._open), f"{tag} in a paragraph"
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in FETCHING and not value.startswith(("data:", "#"))]
        self.images += [dict(attrs)] if tag == "img" else []

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data
