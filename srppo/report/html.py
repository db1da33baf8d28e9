"""One self-contained HTML page of a run: no script, no link, nothing loaded from outside."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from srppo.report.figures import (
    GROUP_MEANING,
    ArmFigures,
    decodings_of,
    estimate_text,
    group_words,
    groups_of,
    interval_caption,
    kept_text,
    number_text,
    teraflops,
)
from srppo.style import GRID, INK, PAPER

STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#24292f;--soft:#57606a;--line:#d8dee4;--wash:#f6f8fa;--bad:#b42318}
@media(prefers-color-scheme:dark){:root{--paper:#0f1318;--ink:#e6edf3;--soft:#9aa4af;--line:#30363d;--wash:#171c23;
--bad:#ff9a8d}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1040px;padding:1rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:1.6rem;margin:.5rem 0}h2{font-size:1.15rem;margin:2rem 0 .5rem}
p,li{overflow-wrap:anywhere}.soft{color:var(--soft);font-size:.9rem}.bad{color:var(--bad)}
.wide{overflow-x:auto;margin:.6rem 0 1rem}table{border-collapse:collapse;font-size:.9rem;
font-variant-numeric:tabular-nums}
th,td{padding:.3rem .8rem .3rem 0;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap;
vertical-align:top}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:var(--paper)}
thead th{color:var(--soft);font-weight:600}
.facts td:last-child{text-align:left;white-space:normal;overflow-wrap:anywhere}
figure{margin:1rem 0}svg{width:100%;height:auto;min-width:640px}
svg text{font-family:inherit!important}
.sample{border:1px solid var(--line);border-radius:8px;margin:.8rem 0;padding:.7rem .8rem}
.answers{display:grid;grid-template-columns:repeat(auto-fit,minmax(210px,1fr));gap:.6rem;margin-top:.5rem}
.answers div{background:var(--wash);border-radius:6px;padding:.5rem .6rem}
pre{margin:.2rem 0 0;white-space:pre-wrap;overflow-wrap:anywhere;
font:.85rem/1.45 ui-monospace,Menlo,"DejaVu Sans Mono",monospace}
@media(max-width:640px){th:first-child,td:first-child{white-space:normal;min-width:5.6rem;max-width:5.6rem}
th{white-space:normal}body{padding:.8rem}table{font-size:.85rem}.facts td:first-child{min-width:0}}
details{margin:.8rem 0}summary{cursor:pointer;font-weight:600}
details>pre{background:var(--wash);padding:.7rem;border-radius:6px}
"""


@dataclass(frozen=True)
class Sample:
    """A test prompt and what each arm wrote; `right` says which answers were right, where that is known."""

    prompt: str
    responses: Mapping[str, str]
    answer: str | None = None
    group: str = ""
    right: Mapping[str, bool] | None = None


def write_report(
    path: Path,
    *,
    title: str,
    arms: Sequence[ArmFigures],
    differences: Sequence[ArmFigures] = (),
    differences_caption: str = "",
    plots: Mapping[str, Path | str] | None = None,
    samples: Sequence[Sample] = (),
    recipe_toml: str = "",
    environment: Mapping[str, Any] | None = None,
    warnings: Sequence[str] = (),
    missing: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Path:
    """Write the page. plots: caption to SVG (file or text). missing: what should be here and is not, and why."""
    absent = [f"{arm.name}: {arm.problem}" for arm in arms if arm.problem] + list(missing)
    body = [
        f"<h1>{escape(title)}</h1>",
        *(f"<p>{escape(note)}</p>" for note in notes),
        bullets("Missing or failed", absent, "bad"),
        bullets("Warnings", warnings, ""),
        section("Results", _accuracy(arms) + _cost(arms)),
        section(
            "Paired differences: SRPPO minus",
            _estimates(differences, "+") + soft_text(differences_caption) if differences else "",
        ),
        *(inline_plot(caption, svg, i) for i, (caption, svg) in enumerate((plots or {}).items())),
        section("Samples", "".join(_sample(sample) for sample in samples)),
        section("Recipe", f"<details><summary>recipe.toml</summary><pre>{escape(recipe_toml)}</pre></details>")
        if recipe_toml
        else "",
        section("Environment", _facts(environment or {})),
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page.encode("utf-8", "replace").decode("utf-8"), encoding="utf-8")
    return path


def _accuracy(arms: Sequence[ArmFigures]) -> str:
    meanings = "; ".join(GROUP_MEANING[g] for g in groups_of(arms) if g in GROUP_MEANING)
    return _estimates(arms) + soft_text(interval_caption(arms)) + (soft_text(meanings + ".") if meanings else "")


def _estimates(arms: Sequence[ArmFigures], sign: str = "") -> str:
    groups, html = groups_of(arms), ""
    for decoding in decodings_of(arms):
        rows = []
        for arm in arms:
            cells = [estimate_text(arm.figures.get((group, decoding)), sign) for group in groups]
            if arm.problem and not arm.figures:
                cells = ["no result"] + [""] * (len(groups) - 1)
            rows.append([arm.name, *cells])
        html += html_table(
            [f"{decoding} decoding" if decoding == "greedy" else decoding, *map(group_words, groups)], rows
        )
    return html


def _cost(arms: Sequence[ArmFigures]) -> str:
    columns = {
        "TFLOPs": [teraflops(arm.flops) for arm in arms],
        "seconds": [number_text(arm.seconds, ",.0f") for arm in arms],
        "kept step": [kept_text(arm) for arm in arms],
        "length": [number_text(arm.mean_length) for arm in arms],
        "ended by EOS": [number_text(arm.ended_share, ".0%") for arm in arms],
        "held-out NLL": [number_text(arm.nll, ".3f") for arm in arms],
    }
    columns = {head: cells for head, cells in columns.items() if set(cells) != {"-"}}
    if not columns:
        return ""
    rows = [[arm.name, *(cells[i] for cells in columns.values())] for i, arm in enumerate(arms)]
    notes = "".join(soft_text(f"{arm.name}: {arm.note}") for arm in arms if arm.note)
    explained = "TFLOPs: counted training operations, 10^12, SFT included. Length: tokens of a sampled answer. "
    return html_table(["cost and shape", *columns], rows) + soft_text(explained + "NLL: nats a token.") + notes


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain texts, escaped here."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    lines = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _facts(environment: Mapping[str, Any]) -> str:
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


def _sample(sample: Sample) -> str:
    answers = ""
    for arm, text in sample.responses.items():
        verdict = "" if sample.right is None or arm not in sample.right else (" ✓" if sample.right[arm] else " ✗")
        answers += (
            f'<div><span class="soft">{escape(arm)}{verdict}</span><pre>{escape(text) or "(nothing)"}</pre></div>'
        )
    head = " · ".join(
        filter(None, [sample.group, f"right answer: {sample.answer}" if sample.answer is not None else ""])
    )
    return (
        f'<div class="sample"><span class="soft">{escape(head)}</span><pre>{escape(sample.prompt)}</pre>'
        f'<div class="answers">{answers}</div></div>'
    )


def inline_plot(caption: str, svg: Path | str, number: int) -> str:
    """An SVG of plots.py inlined: without its prolog, in the page's colours, its ids kept apart from other plots'."""
    text = svg.read_text(encoding="utf-8") if isinstance(svg, Path) else svg
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'\s(?:xmlns(?::\w+)?|version)="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'\bid="', f'id="p{number}-', text)
    text = re.sub(r'(url\(|href=")#', rf"\1#p{number}-", text)
    for colour, name in ((INK, "--ink"), (GRID, "--line"), (PAPER, "--paper")):
        text = text.replace(colour, f"var({name})")
    label = f'<svg role="img" aria-label="{escape(caption)}"'
    text = text.replace("<svg", label, 1)
    return f'<figure><div class="wide">{text}</div><figcaption class="soft">{escape(caption)}</figcaption></figure>'


def bullets(title: str, lines: Sequence[str], kind: str) -> str:
    """A section with a list of plain texts, of CSS class `kind`; nothing without lines."""
    items = "".join(f'<li class="{kind}">{escape(line)}</li>' for line in lines)
    return section(title, f"<ul>{items}</ul>") if lines else ""


def section(title: str, content: str) -> str:
    """A titled section; nothing where there is no content. The title is escaped, the content is HTML."""
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def soft_text(text: str) -> str:
    """A paragraph in the softer colour, escaped."""
    return f'<p class="soft">{escape(text)}</p>'
