"""Blocks of README.md and docs/ that a command fills: `<!-- from: COMMAND -->`, its figures, `<!-- end -->`."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def write_block(page: str, command: str, text: str) -> None:
    """Put `text` between the markers of `command` on a page, which has them once, and name the command below it."""
    path = ROOT / page
    start, end = f"<!-- from: {command} -->", "<!-- end -->"
    found = re.compile(re.escape(start) + r"\n.*?" + re.escape(end), re.DOTALL)
    block = f"{start}\n{text}\n\nCommand: `{command}`.\n{end}"
    written, count = found.subn(lambda _: block, path.read_text())
    assert count == 1, f"{page} has {count} blocks `{start}`, not one"
    path.write_text(written)
