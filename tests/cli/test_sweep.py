"""One small sweep through the command line, from its plan to its report; what its arms share; a second look."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from commands import Cli, Done

from srppo.ablations.estimate import Pace, task_seconds
from srppo.ablations.ledger import Ledger
from srppo.ablations.plan import Task
from srppo.ablations.progress import LEGEND, LiveTable, Watch
from srppo.ablations.run import LEAST_TIMEOUT_S, load_sweep
from srppo.cli.sweep import SMALL
from srppo.config import build_recipe, load_recipe, with_overrides
from srppo.console import Console
from srppo.record.json import read_lines
from srppo.record.store import Run
from srppo.stages.kinds import KINDS

SETTINGS = ["ppo.steps=1", "ppo.epochs=1", "ppo.minibatches=1", "rollout.batch=8", "data.size=8", "eval.limit=4"]
SETS = [f"--set={each}" for each in (*SETTINGS, "eval.every=0", "eval.samples=1", "eval.items=items.jsonl")]
GRID = [
    "ablate",
    "grid",
    "--axis",
    "reward.kind=ratio,zero",
    "--arms",
    "SFT,SRPPO",
    "--seeds",
    "2",
    *SETS,
    "--out",
    "sweep",
    "--plain",
]


@dataclass(frozen=True)
class Swept:
    """The command line, the sweep's folder, and how the first run of it ended."""

    cli: Cli
    folder: Path
    first: Done


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swept]:
    folder = tmp_path_factory.mktemp("swept")
    rows = [{"prompt": f"Say {w}", "answer": w, "group": "unseen"} for w in ("a", "b", "c", "d", "e", "f", "g", "h")]
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cli = Cli(folder)
    yield Swept(cli, folder / "sweep", cli(*GRID))
    cli.close()


def identities(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.parent.name: json.loads(path.read_text()) for path in folder.glob("stages/*/config.json")}


def attempts(folder: Path) -> int:
    return len(list(folder.glob("stages/*/attempts/*")))


def test_the_plan_is_said_and_all_of_it_is_run(swept: Swept) -> None:
    assert swept.first.code == 0, swept.first.err
    for words in (
        "2 points x 2 arms x 2 seeds = 8 cells; 6 stages after sharing (2 sft, 4 ppo)",
        "kind: ratio, zero",
        "arms: SFT, SRPPO; seeds 0 to 1",
        "fixed now: unseen items, greedy; 2 paired differences, exact sign-flip over seeds and t, Holm at 0.05, "
        "the same below 0.05",
        "warning: with 2 seeds no difference can be significant",
        "6 of 6 stages",
    ):
        assert words in swept.first.err, words
    assert re.search(r"estimated from a measured short step: \d+\.\d\d core-hours", swept.first.err)
    assert "SRPPO cannot be told from SFT at any of 2 kinds" in re.sub(r"\s+", " ", swept.first.out)
    report = {path.name for path in (swept.folder / "report").iterdir()}
    assert {"index.html", "rows.csv", "rows.parquet", "cells.csv", "differences.csv", "table.tex"} <= report
    assert len(swept.first.out.splitlines()) > 10 and "report/index.html" in swept.first.out + swept.first.err
    assert sorted(each["kind"] for each in identities(swept.folder).values()) == ["ppo"] * 4 + ["sft"] * 2


def test_a_finished_sweep_is_shown_and_nothing_is_run_again(swept: Swept) -> None:
    before = attempts(swept.folder)
    again = swept.cli(*GRID)
    assert again.code == 0 and again.out == swept.first.out and "6 of 6 stages" in again.err
    joined = swept.cli("worker", swept.folder, "--plain")
    assert joined.code == 0 and joined.err.splitlines()[-1] == "6 of 6 stages"
    assert attempts(swept.folder) == before == 6
    shown = swept.cli("report", swept.folder)
    assert shown.code == 0 and "SRPPO cannot be told from SFT" in re.sub(r"\s+", " ", shown.out)


def test_a_worker_that_joins_has_the_sweeps_own_time_limit(swept: Swept, tmp_path: Path) -> None:
    _, ledger = load_sweep(swept.folder)
    assert ledger.limits["timeout_s"] >= LEAST_TIMEOUT_S
    endless = with_overrides(build_recipe(ledger.run.spec["recipe"]), {"sft.steps": 100_000}).model_dump(mode="json")
    other = Run.open(tmp_path / "other", {**ledger.run.spec, "seeds": [0], "recipe": endless})
    Ledger(other, 3).limit(0.5, build_recipe(endless))
    done = swept.cli("worker", other.path, "--plain", "--slots", "1")
    assert "3 of 3 stages failed or diverged" in done.error(code=1)
    assert "timed out after 0.5 s" in done.err


def test_arms_of_a_seed_share_sft_prompts_and_sampling_seeds(swept: Swept) -> None:
    """Before its first update a policy is the SFT model: whatever the reward, it samples the same."""
    stages = identities(swept.folder)
    first: dict[tuple[int, str], tuple[list[str], list[tuple[str, str]], list[float]]] = {}
    for name, identity in stages.items():
        if identity["kind"] == "ppo":
            logs = (swept.folder / "stages" / name).glob("attempts/*/rollouts.jsonl")
            rows = [row for log in logs for row in read_lines(log)]
            said = [(row["prompt"], row["response"]) for row in rows]
            kind, seed = identity["config"]["reward"]["kind"], identity["config"]["seed"]
            first[seed, kind] = (identity["parents"], said, [row["reward"] for row in rows])
    assert set(first) == {(seed, kind) for seed in (0, 1) for kind in ("ratio", "zero")}
    for seed in (0, 1):
        (parents, said, rewards), (others, saw, zeros) = first[seed, "ratio"], first[seed, "zero"]
        assert parents == others and any(stages[each]["kind"] == "sft" for each in parents if each in stages)
        assert said == saw and said and rewards != zeros
    assert first[0, "ratio"][0] != first[1, "ratio"][0] and first[0, "ratio"][1] != first[1, "ratio"][1]


def test_the_live_table_fits_a_terminal(swept: Swept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    plan, ledger = load_sweep(swept.folder)
    stream = io.StringIO()
    table = LiveTable(plan, Watch(plan, ledger), Console(plain=False, file=stream), slots=2)
    with table.shown():
        table()
    lines = stream.getvalue().splitlines()
    assert all(len(line) <= 80 for line in lines) and "6 of 6 stages" in lines[0]
    assert sum("SRPPO" in line and "\u25cf\u25cf" in line for line in lines) == 2
    assert LEGEND.split("  ")[0] in stream.getvalue()


def test_every_kind_of_stage_takes_time_by_the_measured_pace(swept: Swept) -> None:
    sets = [*SMALL, *(each.removeprefix("--set=") for each in SETS)]
    program = (
        "import json; from dataclasses import asdict; from srppo.ablations.estimate import measure_pace; "
        "from srppo.config import load_recipe; "
        f"print(json.dumps(asdict(measure_pace(load_recipe(None, {sets}), 'cpu'))))"
    )
    done = swept.cli("-c", program)
    pace = Pace(**json.loads(done.out.splitlines()[-1]))
    assert min(pace.start_s, pace.sft_step_s, pace.ppo_step_s, pace.answer_s) > 0
    assert (pace.dev_items, pace.test_items) == (4, 4) and pace.rows > 0
    recipe = load_recipe(None, sets)
    found = {kind: task_seconds(Task("k", kind, recipe, ()), pace) for kind in KINDS}
    assert all(seconds > 0 for seconds in found.values())
    assert found["ppo"] > found["base"] and found["sft"] > found["base"]
