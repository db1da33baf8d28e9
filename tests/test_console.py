"""The console in plain and live form."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from typing import Any

import pytest
from rich.console import Console as RichConsole

from srppo.console import Console, StageView, duration, figure, percent, rate, sparkline


def ppo_row(step: int, **more: Any) -> dict[str, Any]:
    row = {"step": step, "reward": 1 + step / 10, "kl_sft": step / 10, "kl_base": 2.0, "length": 9.25, "ended": 0.97}
    row |= {"entropy": 1.2, "clip_share": 0.04, "explained_variance": 0.3, "flops": step * 10**9, "grad_norm": 0.5}
    return row | more | {"timing": {"generate_s": 0.5, "update_s": 0.5, "tokens_per_s": 12345.6}}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def plain_run(
    rows: list[dict[str, Any]], *, total: int, seconds_a_row: float = 1.0, name: str = "PPO", quiet: bool = False
):
    clock, out = Clock(), io.StringIO()
    with Console(plain=True, file=out, quiet=quiet, clock=clock).stage(name, total) as view:
        for row in rows:
            clock.now += seconds_a_row
            view.update(row)
    return out.getvalue().splitlines()


def rendered(view: StageView, width: int = 80) -> list[str]:
    out = io.StringIO()
    RichConsole(file=out, width=width, color_system=None).print(view)
    return out.getvalue().splitlines()


def test_plain_line_has_every_figure_in_fixed_order() -> None:
    lines = plain_run([{"step": 0, "dev/unseen": 0.2, "dev/accuracy": 0.2}, ppo_row(1), ppo_row(2)], total=2)
    assert lines == [
        "PPO 0/2  dev  unseen 0.20  all items 0.20",
        "PPO 1/2  reward 1.10  kl_sft 0.10  kl_base 2.00  len 9.25  eos 97%  ent 1.20  clip 4%  ev 0.30  12.3k tok/s"
        "  left 1 s",
        "PPO 2/2  reward 1.20  kl_sft 0.20  kl_base 2.00  len 9.25  eos 97%  ent 1.20  clip 4%  ev 0.30  12.3k tok/s",
        "PPO  2/2 steps, 3 s, reward 1.10 -> 1.20, KL to SFT 0.20, dev accuracy 0.20 -> 0.20",
    ]


def test_plain_sft_line() -> None:
    row = {"step": 1, "loss": 2.5, "grad_norm": 0.8, "lr": 4.5e-4, "timing": {"tokens_per_s": 900}}
    lines = plain_run([row], total=1, name="SFT")
    assert lines == ["SFT 1/1  loss 2.50  grad 0.80  lr 4.5e-04  900 tok/s", "SFT  1/1 steps, 1 s, loss 2.50"]


def test_plain_lines_are_thinned_but_first_last_and_measured_stay() -> None:
    rows = [ppo_row(step, **({"dev/accuracy": 0.5} if step == 7 else {})) for step in range(1, 41)]
    lines = plain_run(rows, total=40, seconds_a_row=0.125)
    steps = [int(line.split()[1].split("/")[0]) for line in lines if "reward" in line and "steps" not in line]
    assert steps == [1, 7, 23, 39, 40]
    assert sum(" dev  all items 0.50" in line for line in lines) == 1


def test_time_left_ignores_resumed_steps() -> None:
    clock = Clock()
    view = StageView(Console(plain=True, file=io.StringIO(), clock=clock), "PPO", 100)
    clock.now += 5000.0  # loading
    view.update(ppo_row(51))
    assert view.seconds_left() == pytest.approx(49.0)  # from its own laps
    for step in (52, 53):
        clock.now += 3.0
        view.update(ppo_row(step))
    assert view.seconds_left() == pytest.approx(47 * 3.0)
    assert "53/100 steps (resumed at 50)" in view.summary()


def test_stopped_stage_says_so() -> None:
    out = io.StringIO()
    with pytest.raises(RuntimeError), Console(plain=True, file=out).stage("PPO", 20) as view:
        view.update(ppo_row(1))
        raise RuntimeError
    assert out.getvalue().splitlines()[-1].startswith("PPO  stopped at 1/20 steps, ")


@pytest.mark.parametrize("width", [20, 40, 64, 80, 200])
@pytest.mark.parametrize(
    "row",
    [
        ppo_row(
            3, **{"dev/demonstrated": 0.1, "dev/prompted": 0.2, "dev/unseen": 0.3, "dev/accuracy": 0.2, "dev/nll": 1.5}
        ),
        ppo_row(3, reward=1e30, kl_sft=-1e-12, kl_base=float("nan"), length=None, ended=float("inf"), entropy=12345678),
        {"step": 3, "reward": None},
        {"step": 3},
        {"step": 3, "loss": 1e-30, "lr": 0.0, "timing": None},
        {"step": 0, **{f"dev/a rather long group name {i}": 0.5 for i in range(20)}},
        {"step": 3, "timing": {"tokens_per_s": None}},
    ],
)
def test_panel_and_plain_lines_keep_their_width(row: dict[str, Any], width: int) -> None:
    view = StageView(Console(plain=True, file=io.StringIO()), "a stage with quite a long name (equal compute)", 10**6)
    view._console._err.width = width
    view.update(row)
    assert max(map(len, rendered(view, width))) <= min(width, 80)
    assert max(map(len, plain_run([row], total=10**6, name="longer SFT (equal compute)"))) < 120


def test_panel_names_what_a_practitioner_looks_for() -> None:
    view = StageView(Console(plain=True, file=io.StringIO()), "PPO", 20)
    for step in range(1, 11):
        view.update(ppo_row(step, **{"dev/demonstrated": 0.4}))
    text = "\n".join(rendered(view))
    for words in (
        "reward",
        "KL to SFT",
        "KL to base",
        "length",
        "ended by EOS",
        "entropy",
        "clip share",
        "expl. variance",
    ):
        assert words in text
    for words in ("tokens/s", "10/20", "left", "dev at step 10", "demonstrated 0.40", "97%", "▁"):
        assert words in text


def test_a_warning_is_shown_once_and_never_read_as_markup(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    with console.stage("PPO", 2):
        for _ in range(3):
            console.warn("set reward.token_clip [bold]5[/bold] " + "x" * 200)
    console.warn("another")
    console.error("no such file")
    out, err = capsys.readouterr()
    assert out == "" and err.count("warning: set reward.token_clip [bold]5[/bold] " + "x" * 200 + "\n") == 1
    assert err.endswith("warning: another\nerror: no such file\n")


def test_quiet_keeps_warnings_and_errors_only() -> None:
    assert plain_run([ppo_row(1)], total=1, quiet=True) == []
    out = io.StringIO()
    console = Console(file=out, quiet=True)
    console.say("hello")
    console.warn("careful")
    assert out.getvalue() == "warning: careful\n"


def test_results_go_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    Console().print("accuracy [0.38, 0.49]")
    assert capsys.readouterr().out == "accuracy [0.38, 0.49]\n"


def test_a_stream_that_cannot_show_a_letter_gets_a_question_mark() -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Console(plain=True, file=out).say("naïve")
    out.seek(0)
    assert out.read() == "na?ve\n"


@pytest.mark.parametrize(("term", "live"), [("xterm-256color", True), ("dumb", False)])
def test_live_on_a_terminal_only(term: str, live: bool) -> None:
    code = (
        "from srppo.console import Console\n"
        "console = Console()\n"
        "with console.stage('PPO', 2) as view:\n"
        "    view.update({'step': 1, 'reward': 1.0}); console.warn('look'); view.update({'step': 2, 'reward': 2.0})\n"
    )
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": term, "PYTHONIOENCODING": "utf-8"}
    subprocess.run([sys.executable, "-c", code], stderr=slave, env=environment, check=True)
    os.close(slave)
    text = os.read(master, 1 << 20).decode()
    assert ("\x1b[?25l" in text) is live  # the cursor is hidden while the panel is up
    assert (text.count("\x1b[?25h") == 1) is live  # and shown again
    assert "warning: look" in text and "PPO  2/2 steps" in text.replace("\x1b[2K", "")


def test_a_step_is_taken_in_without_being_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    view = StageView(Console(plain=False, file=io.StringIO()), "PPO", 10_000)
    monkeypatch.setattr(StageView, "__rich__", lambda view: pytest.fail("a step was drawn as it came"))
    for step in range(1, 1001):
        view.update(ppo_row(step))
    assert view.step == 1000


def test_number_forms() -> None:
    nan = float("nan")
    forms = [figure(x) for x in (0, 0.0, 1.234, -12.345, 123.45, 4321.0, 0.0123, 1e-7, 1e9, None, True, "x", nan)]
    assert " ".join(forms) == "0.00 0.00 1.23 -12.35 123.5 4321 0.012 1.0e-07 1.0e+09 - - - nan"
    assert [percent(0.975), percent(None), percent(nan)] == ["98%", "-", "nan"]
    assert [rate(x) for x in (950, 12345, 4.5e6, 1e30, None)] == ["950", "12.3k", "4.5M", "1.0e+30", "-"]
    assert [duration(s) for s in (None, 0, 59.6, 185, 7500)] == ["-", "0 s", "1:00 min", "3:05 min", "2:05 h"]
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█" and sparkline([1.0]) == "" and sparkline([2, 2]) == "▄▄"
    assert len(sparkline([-1e308, 1e308, float("inf"), 0.0] * 50, 24)) == 24


def test_console_and_trackers_import_no_torch() -> None:
    code = "import sys, srppo.console, srppo.training.trackers\n"
    code += "assert not {'torch', 'accelerate', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
