"""The frame of every page and its pieces: self-contained HTML, no script, no link, nothing loaded from outside."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from zlib import crc32

from srppo.record.files import storing, write_atomic
from srppo.report.style import GRID, INK, PAPER

RUNS = Path("runs")


def write_page(path: Path, title: str, parts: Sequence[str]) -> Path:
    """Write a whole page and return its path. The title is escaped, the parts are HTML.

    Lone surrogates are replaced. Raises StorageError when the disk refuses.
    """
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    text = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head>"
        f"<body><h1>{escape(title)}</h1>{''.join(parts)}</body></html>\n"
    )
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text.encode("utf-8", "replace").decode("utf-8"))
    return path


def facts(environment: Mapping[str, Any]) -> str:
    """Names and values, those that nest in one line."""
    lines = "".join(
        f"<tr><td>{escape(str(key))}</td><td>{escape(_flat(value))}</td></tr>" for key, value in environment.items()
    )
    return f'<table class="facts"><tbody>{lines}</tbody></table>' if lines else ""


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_flat(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(_flat, value)) or "none"
    return "none" if value is None else str(value)


def plot(caption: str, paths: Sequence[Path]) -> str:
    """A plot of plots.py inlined, given the files that it was written to; nothing where nothing was drawn.

    Where one for phones lies beside the SVG (`narrow_of`) both are in the page, which shows one of them.
    """
    if not paths:
        return ""
    svg, prefix = paths[-1], f"p{crc32(caption.encode('utf-8', 'replace'))}"
    narrow = narrow_of(svg) if narrow_of(svg).exists() else None
    html = f'<div class="{"wide roomy" if narrow else "wide"}">{_inline(caption, svg, prefix)}</div>'
    html += f'<div class="narrow">{_inline(caption, narrow, f"n{prefix}")}</div>' if narrow else ""
    return f'<figure>{html}<figcaption class="soft">{escape(caption)}</figcaption></figure>'


def narrow_of(svg: Path) -> Path:
    """Where a plot's form for phones lies."""
    return svg.with_name(f"{svg.stem}-narrow.svg")


def _inline(caption: str, svg: Path, prefix: str) -> str:
    """Without its prolog, in the page's colours, its ids kept apart from other plots'."""
    drawn = svg.read_text(encoding="utf-8")
    drawn = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", drawn[drawn.index("<svg") :], flags=re.DOTALL)
    drawn = re.sub(r'\s(?:xmlns(?::\w+)?|version)="[^"]*"', "", drawn).replace("xlink:href", "href")
    drawn = re.sub(r'\bid="', f'id="{prefix}-', drawn)
    drawn = re.sub(r'(url\(|href=")#', rf"\1#{prefix}-", drawn)
    for colour, name in ((INK, "--ink"), (GRID, "--line"), (PAPER, "--paper")):
        drawn = drawn.replace(colour, f"var({name})")
    return drawn.replace("<svg", f'<svg role="img" aria-label="{escape(caption)}"', 1)


def bullets(title: str, lines: Sequence[str], kind: str) -> str:
    """A section with a list of plain texts, of CSS class `kind`; nothing without lines."""
    items = "".join(f'<li class="{kind}">{escape(line)}</li>' for line in lines)
    return section(title, f"<ul>{items}</ul>") if lines else ""


def section(title: str, content: str) -> str:
    """A titled section; nothing where there is no content. The title is escaped, the content is HTML."""
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def text(words: str, kind: str = "") -> str:
    """A paragraph, of CSS class `kind`, escaped; nothing without words."""
    css = f' class="{kind}"' if kind else ""
    return f"<p{css}>{escape(words)}</p>" if words else ""


def soft_text(words: str) -> str:
    """A paragraph in the softer colour, escaped."""
    return text(words, "soft")


def details(summary: str, content: str) -> str:
    """Content behind a line to open it; nothing where there is none. The summary is escaped, the content is HTML."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>" if content else ""


def page_folder(kind: str, run: Path | None, sft: str, seed: int | None) -> Path:
    """Where a page goes that no option names a folder for: runs/KIND/NAME, so that none takes another's.

    NAME: the run's (also where its SFT model lies in it), with the training seed that was asked for; of two models
    given by name the SFT model's.
    """
    place = Path(sft)
    if run is None and place.parent.parent.name == "stages":
        run = place.parents[2]
    name = run.resolve().name if run is not None else re.sub(r"[^\w.-]+", "-", sft.strip("/")).strip("-.")
    return RUNS / kind / (name if seed is None else f"{name}-seed-{seed}")
