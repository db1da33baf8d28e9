"""recipes/*.toml: each hub recipe runs dry, on random weights of its architecture made small and on local rows."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, MistralConfig, Qwen2Config

from srppo.config import load_recipe, recipe_warnings
from srppo.console import Console
from srppo.stages.run import prepare_run, run_stages
from srppo.world import base_path

ROOT = Path(__file__).parent.parent


def small_smollm2(folder: Path) -> None:
    """SmolLM2-135M's architecture (Llama, grouped-query attention, tied embeddings, rope theta 1e5), made small."""
    tokenizer = AutoTokenizer.from_pretrained(base_path("xs"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=36,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=4,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


SHAPE: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 112, "num_hidden_layers": 2}
SMALL: dict[str, Callable[..., Any]] = {
    "mistral-7b": lambda **ids: MistralConfig(
        **SHAPE, **ids, num_attention_heads=8, num_key_value_heads=2, sliding_window=16, tie_word_embeddings=False
    ),
    "llama3-8b": lambda **ids: LlamaConfig(
        **SHAPE,
        **ids,
        num_attention_heads=8,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
    ),
    "qwen2.5-0.5b": lambda **ids: Qwen2Config(
        **SHAPE, **ids, num_attention_heads=8, num_key_value_heads=1, tie_word_embeddings=True
    ),
}
"""Each recipe's architecture: heads, head sizes and ties as in its config.json, made small."""


@pytest.mark.parametrize("name", SMALL)
def test_recipes_with_adapters_run_dry(name: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(base_path("xs"))
    torch.manual_seed(0)
    ids = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    AutoModelForCausalLM.from_config(SMALL[name](**ids)).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    recipe = load_recipe(ROOT / "recipes" / f"{name}.toml", shrunk(tmp_path))
    assert recipe.model.adapters == "lora" and recipe.model.precision == "bf16" and recipe.ppo.lam == 1
    assert recipe.data.overlap == "minimum" and recipe_warnings(recipe) == []
    console = Console(plain=True, file=io.StringIO())
    stages = run_stages(prepare_run(recipe, ["ppo"], tmp_path / "run", console))
    figures = {kind: (stage.result() or {})["figures"] for kind, stage in stages.items()}
    assert figures["ppo"]["kept_step"] == 2
    assert (stages["ppo"].path / "model" / "adapter_model.safetensors").is_file()


def shrunk(folder: Path) -> list[str]:
    """Overrides that run a recipe on few local rows and the model of a folder."""
    words = ["red", "blue", "green", "cat", "dog", "fox", "sun", "moon", "star"]
    chats = [
        {"messages": [{"role": "user", "content": f"say {a} {b}"}, {"role": "assistant", "content": f"{a} {b}"}]}
        for a in words
        for b in words
    ]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"repeat {w} twice"}) for w in words))
    return [
        f"model.base={folder / 'model'}",
        f"data.demonstrations={folder / 'chats.jsonl'}",
        f"data.prompts={folder / 'prompts.jsonl'}",
        *("data.size=40", "data.prompts_size=8", "data.held_out=0.1", "sft.epochs=1", "sft.batch=16"),
        *("rollout.batch=8", "rollout.max_new_tokens=6", "ppo.steps=2", "ppo.critic_warmup=1", "eval.every=1"),
    ]


def test_smollm2_recipe_runs_dry(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    small_smollm2(tmp_path / "model")
    recipe = load_recipe(ROOT / "recipes" / "smollm2-135m.toml", shrunk(tmp_path))
    assert recipe.model.precision == "bf16" and recipe.data.overlap == "minimum" and recipe.reward.token_clip == 5.0
    console = Console(plain=True, file=io.StringIO())
    run = prepare_run(recipe, ["base", "ppo", "chosen-sft"], tmp_path / "run", console)
    figures = {kind: (stage.result() or {})["figures"] for kind, stage in run_stages(run).items()}
    assert {"base", "sft", "ppo", "longer-sft-1/256", "chosen-sft"} <= figures.keys()
    assert figures["sft"]["held_out_nll"] < figures["base"]["held_out_nll"]
    assert figures["ppo"]["kept_step"] == 2


def test_smollm2_ifeval_recipe_runs_dry(tmp_path: Path) -> None:
    """With adapters, over items of instructions, development items measured on the way."""
    torch.set_num_threads(1)
    small_smollm2(tmp_path / "model")
    rows = [
        {
            "prompt": f"Say {word}. Leave out every comma.",
            "instruction_id_list": ["punctuation:no_comma"],
            "kwargs": [{}],
        }
        for word in ("red", "blue", "sun", "moon")
    ]
    items = [row | {"group": group, "task": group} for row in rows for group in ("demonstrated", "unseen")]
    split = [row | {"split": "dev" if row["group"] == "demonstrated" else "test"} for row in items]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, split)))
    overrides = [*shrunk(tmp_path), f"eval.items={tmp_path / 'items.jsonl'}", "ppo.critic_warmup=0"]
    recipe = load_recipe(ROOT / "recipes" / "smollm2-ifeval.toml", overrides)
    assert recipe.model.adapters == "lora" and recipe.ppo.lam == 1 and recipe_warnings(recipe) == []
    run = prepare_run(recipe, ["ppo"], tmp_path / "run", Console(plain=True, file=io.StringIO()))
    stages = run_stages(run)
    figures = (stages["ppo"].result() or {})["figures"]
    assert figures["kept_step"] == 2 and set(figures["test"]) == {"unseen"}
    measured = [row for row in stages["ppo"].metrics() if "dev/accuracy" in row]
    assert measured and all(0 <= row["dev/demonstrated"] <= 1 for row in measured)
