"""Reads an HTML page as a browser without network would, and fails where it is not whole on its own."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path


class Page(HTMLParser):
    """Collects tags and attributes, and checks that tags close in order."""

    VOID = ("meta", "br", "img", "link", "input")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += [(tag, key, value or "") for key, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def offline_page(path: Path) -> Page:
    """The page, read; asserts that its tags close, its ids are unique, and that nothing is loaded or run."""
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    assert page.open == []
    assert not {"script", "img", "link", "iframe", "a", "object", "image"} & set(page.seen)
    for _, key, value in page.attributes:
        assert not key.startswith("on") and key != "src"
        assert key != "href" or value.startswith("#")
        assert "url(" not in value or "url(#" in value
    assert "url(" not in "".join(page.words) and "@import" not in "".join(page.words)
    ids = [value for _, key, value in page.attributes if key == "id"]
    assert len(ids) == len(set(ids))
    assert {value[1:] for _, key, value in page.attributes if key == "href"} <= set(ids)
    return page
