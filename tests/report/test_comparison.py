"""What `srppo compare` prints of items that have no score."""

from __future__ import annotations

import io
from pathlib import Path

from records import finish, new_run

from srppo.console import Console
from srppo.evaluation.results import write_result
from srppo.report.comparison import compare_command

REASON = "no punkt"


def test_items_without_a_score_are_said_once_with_their_file(tmp_path: Path) -> None:
    """Three arms, five items that none has a score for: one line, their number, and the file that lists them."""
    run = new_run(tmp_path / "run", [0])
    stage = finish(run.stage("sft", {"seed": 0}), 0, 0.3, [], 0)
    stages = {"SFT": stage, "on-policy distillation": finish(run.stage("distil", {"seed": 0}), 0, 0.1, [], 0)}
    stages["SRPPO"] = finish(run.stage("ppo", {"seed": 0}, [stage.id]), 0, 0.5, [], 0)
    rows = [
        {"item": f"{i:064x}", "sample": 0, "acc": float(i % 2)} | ({"acc": None, "not_scored": REASON} if i < 5 else {})
        for i in range(40)
    ]
    for arm, each in stages.items():
        summary = {"model": arm, "task": "ifeval", "decoding": "greedy", "metric": "acc", "seed": 0, "group": None}
        write_result(each.path / "eval", {**summary, "key": "k"}, rows)
    listed = stage.path / "eval" / "ifeval@k.not-scored.jsonl"
    listed.write_text("")
    out, folder = io.StringIO(), tmp_path / "out"
    compare_command([run.path], task=["ifeval"], out=folder, console=Console(plain=True, file=out))
    printed = out.getvalue()
    line = f"ifeval (greedy): 5 items left out, not scored in SFT, on-policy distillation, SRPPO: {REASON} (listed in "
    for text in (printed, (folder / "comparison.md").read_text().replace("\\", "")):
        flat = " ".join(text.split())
        assert flat.count(REASON) == 1 and line in flat and "0" * 20 not in flat
    assert "".join(str(listed).split()) in "".join(printed.split())
    assert f"{0:064x}" in (folder / "comparison.json").read_text(), "there every item has its name"
    assert max(len(each) for each in printed.splitlines() if str(tmp_path)[:12] not in each) <= 80
