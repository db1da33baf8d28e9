"""The command line as people meet it: exit codes, one line for each mistake, and runs that stop and go on.

Most commands are forked by a server (`commands`). Where the process itself matters (start time, what is imported,
signals) the installed `srppo` script is run.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
import worlds
from commands import ENVIRONMENT, PATIENCE_S, SCRIPT, Cli, Done
from typer.testing import CliRunner
from worlds import World

import srppo.cli.app
from srppo.config import all_keys


class Trainer(Cli):
    """Also trains on a world of tiny models."""

    def __init__(self, folder: Path, world: World) -> None:
        super().__init__(folder)
        self.world = world

    def train(self, out: Path, *more: object, command: str = "train", **overrides: Any) -> Done:
        """`srppo train` on the world's recipe with `section__key=value` overrides."""
        return self(command, *self.arguments(out, **overrides), *more)

    def arguments(self, out: Path, **overrides: Any) -> list[object]:
        changed = {key.replace("__", "."): value for key, value in overrides.items()}
        recipe = out.with_name(f"{out.name}.toml")
        return [self.world.recipe_file(recipe, changed), "--out", out, "--plain", "--device", "cpu"]


@pytest.fixture(scope="module")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    found = Trainer(tmp_path_factory.mktemp("cli"), worlds.make_world(tmp_path_factory.mktemp("world")))
    yield found
    found.close()


# ---- help


def test_help_answers_without_heavy_imports() -> None:
    done = subprocess.run([SCRIPT, "--help"], capture_output=True, text=True, env=ENVIRONMENT, timeout=PATIENCE_S)
    assert done.returncode == 0 and all(word in done.stdout for word in ("demo", "sft", "train", "env"))
    code = "import sys, srppo.cli.app, srppo.config, srppo.console; print(*sys.modules)"
    listed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, check=True)
    heavy = {"torch", "transformers", "datasets", "numpy", "scipy", "matplotlib", "accelerate", "pandas"}
    assert heavy.isdisjoint(listed.stdout.split())


@pytest.mark.parametrize("command", ["demo", "sft", "train", "env"])
def test_each_command_has_help(command: str, cli: Trainer) -> None:
    done = cli(command, "--help")
    assert done.code == 0 and f"srppo {command}" in done.out and done.err == ""


def test_env_states_facts(cli: Trainer) -> None:
    done = cli("env")
    assert done.code == 0 and all(re.search(rf"\b{name}\W+\d", done.out) for name in ("python", "srppo", "torch"))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train", "--outt", "x"], "--outt; did you mean --out?"),
        (["ablate", "reward", "--sedes", "3"], "--sedes; did you mean --seeds?"),
        (["trian"], "did you mean 'train'?"),
        (["bench", "kernle"], "did you mean 'kernel'?"),
        (["demo", "--seeds", "0"], "'--seeds'"),
        (["ablate", "reward", "--seeds", "few"], "srppo ablate --help`"),
        (["ablate"], "argument 'NAME'; see `srppo ablate --help`"),
        (["train", "a", "b"], "(b)"),
        (["sft", "--out"], "'--out' requires an argument"),
        (["bench", "kernel", "-x"], "-x"),
    ],
)
def test_a_mistyped_command_is_one_line(argv: list[str], words: str, cli: Trainer) -> None:
    done = cli(*argv)
    assert words.lower() in done.error().lower() and len(done.err.splitlines()) == 1


@pytest.mark.parametrize(("argv", "code"), [([], 2), (["bench"], 2), (["--help"], 0), (["bench", "kernel", "-h"], 0)])
def test_help_stays_help(argv: list[str], code: int, cli: Trainer) -> None:
    done = cli(*argv)
    assert done.code == code and "Usage: srppo" in done.out and done.err == ""


# ---- the version, completion, and how wide help is


def test_the_version_is_the_packages(cli: Trainer) -> None:
    done = cli("--version")
    assert (done.code, done.out, done.err) == (0, f"srppo {srppo.__version__}\n", "")


def test_a_shell_completes_commands_and_options() -> None:
    inside = [shutil.which("bash") or "sh", "-c", f"{SCRIPT} --show-completion; exit $?"]  # typer asks for its parent
    asked = subprocess.run(inside, capture_output=True, text=True, env=ENVIRONMENT, timeout=PATIENCE_S)
    assert asked.returncode == 0 and "_SRPPO_COMPLETE=complete_bash" in asked.stdout, asked.stderr
    for words, found in (("srppo fore", "forecast"), ("srppo train --base", "--baselines")):
        so_far = {"_SRPPO_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        shell = subprocess.run(
            [SCRIPT], capture_output=True, text=True, env={**ENVIRONMENT, **so_far}, timeout=PATIENCE_S
        )
        assert found in shell.stdout.split(), shell.stderr


def every_command() -> dict[str, Any]:
    """By the words that ask for it: `bench kernel`."""
    group = typer.main.get_command(srppo.cli.app.app)
    commands = dict(getattr(group, "commands", {}))
    benches = getattr(commands.pop("bench"), "commands", {})
    return commands | {f"bench {name}": command for name, command in benches.items()}


def test_help_fits_eighty_columns_and_nothing_is_cut() -> None:
    runner = CliRunner()
    for words, command in {"": None, "bench": None, **every_command()}.items():
        shown = runner.invoke(srppo.cli.app.app, [*words.split(), "--help"], env={"COLUMNS": "80"}).stdout
        assert max(map(len, shown.splitlines())) <= 80 and "..." not in shown.partition("Options:")[2], words
        for parameter in command.params if command else ():
            assert all(name in shown for name in parameter.opts if name.startswith("--")), (words, parameter.name)


@pytest.mark.parametrize("argv", [["train"], ["sft", "no-such.toml"], ["data", "no-such.jsonl"]])
def test_the_keys_of_a_recipe_are_listed_before_anything_is_read(argv: list[str], cli: Trainer) -> None:
    done = cli(*argv, "--keys")
    assert (done.code, done.err) == (0, "") and max(map(len, done.out.splitlines())) <= 80
    assert "\nppo.lr = 0.0003\n    policy learning rate\n" in done.out
    assert set(all_keys()) <= {line.partition(" = ")[0] for line in done.out.splitlines()}
    assert cli(argv[0], "--set", "zzz=1").error().endswith("in --set; `srppo train --keys` lists all")


def test_every_command_has_debug_and_it_is_read(cli: Trainer) -> None:
    without = [words for words, each in every_command().items() if "debug" not in {p.name for p in each.params}]
    assert without == ["env"]  # it raises nothing on purpose
    done = cli("report", "nowhere", "--debug")
    assert "Traceback" in done.err and "srppo.errors.RecordError" in done.err
    assert "Traceback" not in cli("score", "--prompt", "--debug").err, "here it is a prompt's text, not an option"


# ---- mistakes


def test_an_unknown_key_names_the_nearest(cli: Trainer) -> None:
    assert cli("train", "--set", "ppo.lrr=1").error() == "error: unknown key 'ppo.lrr' in --set; did you mean 'ppo.lr'?"


def test_debug_shows_the_traceback(cli: Trainer) -> None:
    done = cli("train", "--set", "ppo.lrr=1", "--debug")
    assert done.code != 0 and "Traceback" in done.err and "srppo.errors.ConfigError: unknown key" in done.err


def test_a_missing_recipe_and_a_wrong_value(cli: Trainer) -> None:
    assert "recipe no.toml does not exist" in cli("train", "no.toml").error()
    assert "greater than 0, found -1" in cli("train", "--set", "ppo.lr=-1").error()


def test_data_that_cannot_be_read(cli: Trainer, tmp_path: Path) -> None:
    missing = tmp_path / "no.jsonl"
    folder = tmp_path / "empty"
    folder.mkdir()
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "comp\n')
    for source, says in ((missing, "no.jsonl"), (folder, "holds no data file"), (broken, "broken.jsonl:2: not JSON")):
        line = cli.train(tmp_path / "run", data__demonstrations=[str(source)]).error()
        assert says in line and str(source) in line
    line = cli.train(tmp_path / "run", data__prompts=[str(missing)]).error()
    assert str(missing) in line


def test_data_that_cannot_be_used(cli: Trainer, tmp_path: Path) -> None:
    rows = worlds.write_rows(tmp_path / "empty.jsonl", [{"prompt": "a", "completion": ""}] * 3)
    line = cli.train(tmp_path / "run", data__demonstrations=[str(rows)]).error()
    assert "none of the 3 rows" in line and "empty answer" in line and "empty.jsonl:1" in line
    rows = worlds.write_rows(tmp_path / "odd.jsonl", [{"frage": "a", "antwort": "b"}])
    line = cli.train(tmp_path / "run", data__demonstrations=[str(rows)]).error()
    assert "no columns known for demonstrations: found frage, antwort" in line and "prompt + completion" in line
    line = cli.train(tmp_path / "run", data__size=99).error()
    assert "data.size asks for 99" in line and "lower it or add data" in line
    items = worlds.write_rows(tmp_path / "items.jsonl", [{"prompt": "a"}])
    assert "items.jsonl:1: not an item" in cli.train(tmp_path / "run", eval__items=str(items)).error()
    items = worlds.write_rows(tmp_path / "dev.jsonl", [{"prompt": "a", "answer": "b", "split": "dev"}])
    assert "no rows of split 'test'" in cli.train(tmp_path / "run", eval__items=str(items)).error()
    assert not (tmp_path / "run").exists()  # a mistake leaves nothing behind


def test_models_that_cannot_be_loaded(cli: Trainer, tmp_path: Path) -> None:
    def line(folder: Path, key: str = "model__base") -> str:
        return cli.train(tmp_path / "run", **{key: str(folder)}).error()

    assert "is neither a folder here nor a hub name" in line(tmp_path / "nothing")
    pickled = tmp_path / "pickled"
    shutil.copytree(cli.world.base, pickled)
    torch.save(worlds.byte_llama(0).state_dict(), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    assert "not safetensors (pytorch_model.bin)" in line(pickled) and "model.allow_pickle=true" in line(pickled)
    own = tmp_path / "own"
    shutil.copytree(cli.world.base, own)
    config = json.loads((own / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    (own / "config.json").write_text(json.dumps(config))
    (own / "own.py").write_text("raise SystemExit('this code ran')\n")
    assert "set model.trust_remote_code=true" in line(own)
    torn = worlds.save_model(tmp_path / "torn", worlds.byte_llama(0))
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:1000])
    assert "cannot be loaded" in line(torn)


def test_base_and_sft_need_one_vocabulary(cli: Trainer, tmp_path: Path) -> None:
    other = worlds.save_model(tmp_path / "other", worlds.byte_llama(3, vocab=worlds.VOCAB + 6))
    line = cli.train(tmp_path / "run", model__sft=str(other)).error()
    assert "the base has a vocabulary of 258, the SFT model of 264" in line
    assert not (tmp_path / "run").exists()


def test_a_hub_name_without_a_network_fails_at_once(cli: Trainer, tmp_path: Path) -> None:
    """Also where nobody said so by HF_HUB_OFFLINE: the libraries would retry for a minute."""
    line = cli.train(tmp_path / "run", model__base="srppo-test/no-such-model").error()  # without "Retrying"
    assert "'srppo-test/no-such-model' cannot be loaded" in line
    if "the hub cannot be reached" not in line:
        pytest.skip("there is a network here")
    line = cli.train(tmp_path / "run", data__demonstrations=["srppo-test/no-such-set"]).error()
    assert "srppo-test/no-such-set" in line and "cannot be reached" in line
    argv = [SCRIPT, "train", *cli.arguments(tmp_path / "run", model__base="srppo-test/no-such-model")]
    done = subprocess.run(
        argv, capture_output=True, text=True, env={**ENVIRONMENT, "HF_HUB_OFFLINE": "1"}, timeout=PATIENCE_S
    )
    assert "the hub cannot be reached" in Done(done.returncode, done.stdout, done.stderr).error()


def test_a_device_that_is_not_here(cli: Trainer, tmp_path: Path) -> None:
    line = cli.train(tmp_path / "run", "--device", "nonsense").error()
    assert "device 'nonsense' is unknown" in line and "cuda, cuda:1, mps, or auto" in line
    line = cli.train(tmp_path / "run", "--device", "cuda:7").error()
    assert "device 'cuda:7' cannot be used here" in line and "--device cpu" in line


def test_a_folder_that_is_not_ours(cli: Trainer, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    line = cli.train(tmp_path / "full").error()
    assert "give --out a new or empty folder" in line
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]


# ---- runs that diverge


def result(run: Path, kind: str) -> tuple[Path, dict[str, Any] | None]:
    """A stage's folder and its result."""
    (path,) = [p.parent for p in run.glob("stages/*/config.json") if json.loads(p.read_text())["kind"] == kind]
    return path, json.loads((path / "result.json").read_text()) if (path / "result.json").exists() else None


def test_a_run_beyond_its_kl_limit_stops_as_diverged(cli: Trainer, tmp_path: Path) -> None:
    settings = {"ppo__max_kl": 1e-4, "ppo__steps": 4, "ppo__checkpoint_every": 1}
    done = cli.train(tmp_path / "run", **settings)
    line = done.error(code=1)
    assert "diverged" in done.out and "base" in done.out
    assert re.search(r"SRPPO diverged at step 2: KL to the SFT model is .* beyond ppo\.max_kl = 0\.0001; raise", line)
    stage, found = result(tmp_path / "run", "ppo")
    assert found and found["status"] == "diverged" and "ppo.max_kl" in found["figures"]["reason"]
    assert line.endswith(f"the last good checkpoint is {stage / 'checkpoints' / 'step-1'}")
    assert (stage / "checkpoints" / "step-1" / "policy.safetensors").exists()
    again = cli.train(tmp_path / "run", **settings).error(code=1)
    assert "diverged before, at step 2" in again
    assert len(list((stage / "attempts").iterdir())) == 1


def test_a_run_whose_numbers_end_stops_as_diverged(cli: Trainer, tmp_path: Path) -> None:
    line = cli.train(tmp_path / "run", sft__lr=1e30).error(code=1)
    assert re.search(r"SFT diverged at step \d: the gradient norm is (nan|inf); lower the learning rate", line)
    stage, found = result(tmp_path / "run", "sft")
    assert found and found["status"] == "diverged" and not (stage / "model").exists()


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        ("MemoryError('no room')", 1, "oom: out of memory (no room)"),
        ("srppo.errors.OutOfMemory('no room to generate')", 1, "oom: no room to generate"),
        ("ZeroDivisionError('a bug')", 1, "failed: ZeroDivisionError: a bug"),
        ("srppo.errors.ConfigError('no such thing')", 2, "failed: ConfigError: no such thing"),
        ("srppo.errors.StorageError('the disk is full')", 1, ""),
        ("srppo.errors.Interrupted('stopped')", 130, ""),
    ],
)
def test_a_run_whose_stage_fails_is_reported_with_the_reason(
    error: str, code: int, reason: str, cli: Trainer, tmp_path: Path
) -> None:
    """However it failed; but not where it stopped on purpose, or nothing more can be written."""
    out = tmp_path / "run"
    lines = (
        "import sys, srppo.errors, srppo.stages.policy, srppo.cli.app",
        f"def fail(*_, **__): raise {error}",
        "srppo.stages.policy.train_ppo = fail",
        f"sys.argv = {['srppo', 'train', *map(str, cli.arguments(out))]}",
        "srppo.cli.app.main()",
    )
    done = cli("-c", "\n".join(lines))
    assert done.code == code and error.partition("'")[2].partition("'")[0] in done.err
    assert (out / "report" / "index.html").exists() == ("Test items" in done.out) == bool(reason)
    if reason:
        said = f"SRPPO: seed 0 {reason}"
        assert said in " ".join(done.out.split()) and said in (out / "report" / "index.html").read_text()


# ---- runs that stop and go on


def wait_for(condition: Any, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)


def test_ctrl_c_saves_and_the_same_command_finishes(cli: Trainer, tmp_path: Path) -> None:
    """Meanwhile a second process and another recipe are kept out of the folder; a finished run is only shown."""
    out = tmp_path / "run"
    settings = {"ppo__steps": 60, "ppo__epochs": 1, "eval__every": 0}
    argv = [SCRIPT, "train", *cli.arguments(out, **settings)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    try:
        wait_for(
            lambda: any('"kl_sft"' in p.read_text() for p in out.glob("stages/*/attempts/*/metrics.jsonl")), process
        )
        process.send_signal(signal.SIGSTOP)  # alive, and standing still while others try
        second = cli.train(out, **settings).error()
        assert "is being run by" in second and str(process.pid) in second
        other = cli.train(out, **{**settings, "reward__beta": 9.0}).error()
        assert "was made with other settings" in other and "reward.beta" in other and "--out" in other
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGCONT)
        stdout, stderr = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    line = Done(process.returncode, stdout, stderr).error(code=130)
    stopped = re.search(r"stopped at step (\d+) of 60; the state is saved: run the same command to go on", line)
    assert stopped
    stage, found = result(out, "ppo")
    assert found is None and (stage / "checkpoints" / f"step-{stopped[1]}").is_dir()

    finished = cli.train(out, **settings)
    assert finished.code == 0, finished.err
    assert f"resumed from step {stopped[1]}" in finished.err and "SFT: finished before" in finished.err
    _, found = result(out, "ppo")
    assert found and found["status"] == "ok" and found["figures"]["steps"] == 60
    assert all(arm in finished.out for arm in ("base", "SFT", "SRPPO"))

    shown = cli.train(out, **settings)
    assert shown.code == 0 and shown.out == finished.out  # the same table, from the record
    assert "SRPPO: finished before" in shown.err and "steps" not in shown.err
    assert len(list((stage / "attempts").iterdir())) == 2


def test_ctrl_c_while_loading_is_no_traceback(cli: Trainer, tmp_path: Path) -> None:
    argv = [SCRIPT, "train", *cli.arguments(tmp_path / "run")]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert process.stderr
    assert "run folder" in process.stderr.readline()  # torch is being imported now
    if sys.platform == "linux":
        wait_for(lambda: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text(), process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130 and "Traceback" not in stderr
    assert stderr.splitlines()[-1] == "interrupted; the same command goes on from what is saved"


def test_sft_alone(cli: Trainer, tmp_path: Path) -> None:
    done = cli.train(tmp_path / "run", command="sft")
    assert done.code == 0 and "SRPPO was not run (srppo train)" in done.out and "SRPPO" not in done.err
    stage, found = result(tmp_path / "run", "sft")
    assert found and found["status"] == "ok" and (stage / "model" / "model.safetensors").exists()


def test_without_out_the_run_goes_to_runs_and_says_so(cli: Trainer, tmp_path: Path) -> None:
    recipe = cli.world.recipe_file(tmp_path / "mine.toml")
    done = cli("sft", recipe, "--plain")
    (folder,) = (cli.folder / "runs").iterdir()
    assert done.code == 0 and re.fullmatch(r"mine-[0-9a-f]{8}", folder.name)
    assert done.err.startswith(f"run folder: runs/{folder.name}\n")


def test_every_option_has_a_help_text() -> None:
    helps = [(words, p.name, p.help) for words, each in every_command().items() for p in each.params if p.name]
    assert len(helps) > 60 and [each for each in helps if not each[2]] == []
