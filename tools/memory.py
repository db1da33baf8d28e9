"""Planned against measured memory: `python tools/memory.py` appends a row a stage and case to
results/plan-memory.jsonl, and writes the table of docs/models.md.

Each case is a run of its own in a process of its own, SFT and PPO on a random Llama and random words. Measured is the
most resident memory of a stage above that of the idle process with all modules loaded; where a case has several
processes, of the first, which has the longest rows. `--model PATH` takes a model, a file of demonstrations and one of
prompts instead; its rows are appended under the name given with `--as`.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from blocks import ROOT, write_block

ROWS = ROOT / "results" / "plan-memory.jsonl"
SHAPE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 8}
SHAPE |= {"num_key_value_heads": 4, "vocab_size": 32000}
CASES: dict[str, list[str]] = {
    "whole": [],
    "whole, recomputed": ["model.activation_checkpointing=true"],
    "whole, shared critic": ["ppo.critic=shared"],
    "whole, RLOO": ["ppo.advantage=rloo", "rollout.per_prompt=2"],
    "whole, scoring bf16": ["model.scoring=bf16"],
    "LoRA": ["model.adapters=lora"],
    "LoRA, recomputed": ["model.adapters=lora", "model.activation_checkpointing=true"],
    "LoRA, RLOO": ["model.adapters=lora", "ppo.advantage=rloo", "rollout.per_prompt=2"],
    "2 processes, whole": [],
    "2 processes, whole, sharded": ["model.sharding=full"],
    "2 processes, LoRA": ["model.adapters=lora"],
    "2 processes, LoRA, sharded": ["model.adapters=lora", "model.sharding=full"],
}
"""Keys of each; a number of processes begins a name."""
COMMON = ["data.held_out=0", "data.size=16", "data.prompts_size=16", "sft.lr=1e-5", "sft.steps=2", "sft.batch=8"]
COMMON += ["sft.micro_tokens=512", "rollout.batch=8", "rollout.max_new_tokens=32", "ppo.lr=1e-6", "ppo.value_lr=1e-6"]
COMMON += ["ppo.steps=2", "ppo.epochs=1", "ppo.minibatches=1", "ppo.micro_tokens=512", "eval.keep=last"]
MEASURE = """
import json, shutil, sys, tempfile
from pathlib import Path
import peft, psutil, torch
torch.set_num_threads(1)
from srppo.config import load_recipe
from srppo.console import Console
from srppo.stages.memory_plan import lengths_of, plan
from srppo.stages.run import prepare_run, run_stages
from srppo.training import loop, parallel
def bytes_of(key):
    found = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(found.split()[1]) * 1024
recipe, idle, peaks = load_recipe(None, sys.argv[1:]), bytes_of("VmRSS"), {}
def note(phase):
    if stages:
        found = peaks[stages[-1]]
        found[phase] = max(found.get(phase, 0), bytes_of("VmHWM") - idle)
    Path("/proc/self/clear_refs").write_text("5")
def next_stage(name):
    note("end")
    stages.append(name)
    peaks[name] = {}
def lap(watch, name):
    note(name.removesuffix("_s"))
    lapped(watch, name)
stages, lapped, loop.Stopwatch.lap = [], loop.Stopwatch.lap, lap
parallel.start("cpu")
folder = parallel.from_first(tempfile.mkdtemp)
run = prepare_run(recipe, ["ppo"], Path(folder), Console(quiet=True))
run_stages(run, on_stage=lambda name, stage: next_stage(name))
next_stage("end")
planned = plan(recipe, lengths_of(recipe), psutil.virtual_memory().total, "cpu", parallel.size())
rows = [{"stage": s.name, "phase": s.peak[0], "planned": s.peak[1], "measured": max(peaks[s.name.lower()].values()),
         "measured_until": peaks[s.name.lower()], "phases": s.phases, "passes": s.passes, "idle": idle,
         "processes": parallel.size()} for s in planned.stages]
if parallel.is_first():
    shutil.rmtree(folder)
    print(json.dumps(rows))
"""


def make_world(folder: Path) -> list[str]:
    """A random Llama in bf16 with a tokenizer of as many words, and rows of words; the keys of a recipe for them."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    words = ["<s>", "</s>", *(f"w{i}" for i in range(SHAPE["vocab_size"] - 2))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<s>").save_pretrained(folder)
    config: Any = LlamaConfig(**SHAPE, max_position_embeddings=1024, tie_word_embeddings=False, eos_token_id=1)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    draw = random.Random(0)
    said = [[" ".join(draw.choices(words[2:], k=48)) for _ in range(2)] for _ in range(64)]
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in said]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"{folder / 'rows.jsonl'}"
    return [f"model.base={folder}", f"data.demonstrations={data}", f"data.prompts={data}"]


def measure(name: str, case: str, sets: list[str]) -> None:
    """Append a row a stage."""
    import torch

    from srppo.bench.rows import machine

    command, count = [sys.executable, "-c", MEASURE, *sets], case.partition(" processes")[0]
    if count != case:
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", count, "--no-python"]
        command = [sys.executable, "-m", *launcher, *command]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{case}: {done.stderr[-2000:]}")
    facts = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "model": name, "case": case}
    facts |= {"machine": machine("cpu"), "torch": torch.__version__}
    with ROWS.open("a") as file:
        for row in json.loads(done.stdout.splitlines()[-1]):
            print(
                case,
                row["stage"],
                f"planned {row['planned'] / 1e9:.3f} measured {row['measured'] / 1e9:.3f}",
                flush=True,
            )
            file.write(json.dumps(facts | row) + "\n")


def table() -> str:
    """One line a case: planned and measured peaks of both stages, of the newest rows."""
    rows = {(r["model"], r["case"], r["stage"]): r for r in map(json.loads, ROWS.read_text().splitlines())}
    lines = [
        "| model | case | SFT: planned, measured, GB | | PPO: planned, measured, GB | | most in |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, case in dict.fromkeys((model, case) for model, case, _ in rows):
        sft, ppo = (rows[model, case, stage] for stage in ("SFT", "PPO"))
        cells = [model, case]
        for row in (sft, ppo):
            off = row["planned"] / row["measured"] - 1
            cells += [f"{row['planned'] / 1e9:.2f}, {row['measured'] / 1e9:.2f}", f"{off:+.0%}"]
        lines.append(f"| {' | '.join([*cells, ppo['phase']])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs=3, metavar=("MODEL", "DEMONSTRATIONS", "PROMPTS"))
    parser.add_argument("--as", dest="name", default="random Llama, 73M")
    parser.add_argument("--only", default="", help="cases whose name begins so")
    parser.add_argument("--table", action="store_true", help="write the table of the rows that are there")
    options = parser.parse_args()
    if not options.table:
        with TemporaryDirectory() as folder:
            given = make_world(Path(folder)) if options.model is None else []
            for key, value in zip(
                ("model.base", "data.demonstrations", "data.prompts"), options.model or (), strict=False
            ):
                given.append(f"{key}={value}")
            for case, sets in CASES.items():
                if case.startswith(options.only):
                    measure(options.name, case, [*given, *COMMON, *sets])
    write_block("docs/models.md", "python tools/memory.py", table())


if __name__ == "__main__":
    main()
