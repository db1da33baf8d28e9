"""A real pretrained model, from the package that ships it: `make real`. Nothing of it is part of the default suite."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import worlds

from srppo.config import ModelConfig
from srppo.models.loading import load_model, load_tokenizer
from srppo.record.store import Run
from srppo.training.rollout import generate

pytestmark = pytest.mark.real
BASE = "smollm2-135m-instruct"
TOPICS = ("the sea", "a rose", "bread", "the moon", "a bicycle", "winter", "a library", "rain")
NO_COMMAS = "In your entire response, refrain from the use of any commas."
PROMPTS = [f"Write two sentences about {topic}. {NO_COMMAS}" for topic in TOPICS]
ANSWERS = [f"I will tell you about {topic}. It is well worth a closer look." for topic in TOPICS]


def srppo(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "srppo", *words], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_answers() -> None:
    config = ModelConfig(base=BASE)
    model, tokenizer = load_model(BASE, config), load_tokenizer(BASE, config)
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert sum(weight.numel() for weight in model.parameters()) == 134_515_008
    stop, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    said = generate(model, [ids], stop_ids=[stop], pad_id=pad, max_new_tokens=12, seed=0, temperature=None)
    assert "Paris" in tokenizer.decode(said.tokens_BS[0])


def test_it_is_trained_and_asked_what_ifeval_asks(tmp_path: Path) -> None:
    """SFT, two PPO steps with adapters, and eight prompts under IFEval's own checker."""
    rows = [{"prompt": p, "completion": a} for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    demonstrations = worlds.write_rows(tmp_path / "demonstrations.jsonl", rows)
    prompts = worlds.write_rows(tmp_path / "prompts.jsonl", [{"prompt": p} for p in PROMPTS])
    asked = worlds.write_rows(
        tmp_path / "ifeval.jsonl",
        [
            {"key": i, "prompt": p, "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
            for i, p in enumerate(PROMPTS)
        ],
    )
    keys = {
        "model.base": BASE,
        "model.adapters": "lora",
        "data.demonstrations": str(demonstrations),
        "data.prompts": str(prompts),
        "sft.lr": 1e-3,
        "sft.batch": 4,
        "ppo.lr": 1e-5,
        "ppo.value_lr": 1e-4,
        "ppo.steps": 2,
        "rollout.batch": 4,
        "rollout.max_new_tokens": 24,
    }
    sets = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
    run = tmp_path / "run"
    srppo("train", *sets, "--out", str(run))
    (ppo,) = [stage for stage in Run.load(run).stages() if stage.identity["kind"] == "ppo"]
    assert [row["step"] for row in ppo.metrics()] == [0, 1, 2]
    assert all(row["reward"] > 0 for row in ppo.metrics()[1:]), "SFT's gain over the base on its own answers"
    said = srppo("eval", str(run), "--suite", "ifeval", "--data", str(asked), "--score-rest")
    assert "prompt_level_strict_acc" in said and "SRPPO" in said
