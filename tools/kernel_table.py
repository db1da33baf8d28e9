"""The table of docs/kernels.md from rows: `python tools/kernel_table.py results/kernel-cpu.jsonl "COMMAND"`."""

import json
import sys
from pathlib import Path
from typing import Any

from blocks import write_block

WORDS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def table(rows: list[dict[str, Any]]) -> str:
    """One line a case: ours against the bare products, against the nearest rival that is not ours, memory, error."""
    lines = [
        "| N, D, V, inputs | ms | of the bare GEMMs | nearest rival | it takes | extra MB: ours, its "
        "| RMS error: ours, its |",
        "|---|---|---|---|---|---|---|",
    ]
    cases = dict.fromkeys((row["n"], row["d"], row["v"], row["dtype"]) for row in rows)
    for case in cases:
        found = [row for row in rows if (row["n"], row["d"], row["v"], row["dtype"]) == case and not row["missing"]]
        (ours,) = [row for row in found if row["kind"] == "ours"]
        rivals = [row for row in found if row["kind"] == "outside"]
        best = min(rivals, key=lambda row: row["times_ours"])
        n, d, v, dtype = case
        cells = (
            f"{n}, {d}, {v}, {WORDS[dtype]}",
            f"{ours['latency_ms']:.0f}",
            f"{ours['ratio']:.2f} [{ours['ratio_q20']:.2f}, {ours['ratio_q80']:.2f}]",
            f"{best['words']} (of {len(rivals)})",
            f"{best['times_ours']:.2f}x",
            f"{ours['peak_extra_bytes'] / 1e6:.0f}, {best['peak_extra_bytes'] / 1e6:.0f}",
            f"{ours['rms_error']:.0e}, {best['rms_error']:.0e}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    first = rows[0]
    versions = f"torch {first['torch']}, commit {(first['commit'] or '')[:7]}"
    lines += [
        "",
        f"{first['cpu']} ({first['cpu_flags']}), {first['threads']} threads, {versions}, {first['date'][:10]}.",
    ]
    return "\n".join(lines)


def main(file: Path, command: str) -> None:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [row for row in rows if row["op"] == "linear_logprob_diff"]
    write_block("docs/kernels.md", command, table(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
