"""recipes/*.toml: the hub recipe runs dry, on random weights of its architecture made small and on local rows."""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from srppo.config import load_recipe
from srppo.console import Console
from srppo.stages.run import prepare_run, run_stages
from srppo.world import base_path

ROOT = Path(__file__).parent.parent


def small_smollm2(folder: Path) -> None:
    """SmolLM2-135M's architecture (Llama, grouped-query attention, tied embeddings, rope theta 1e5), made small."""
    from transformers import AutoTokenizer

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


def test_smollm2_recipe_runs_dry(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    small_smollm2(tmp_path / "model")
    words = ["red", "blue", "green", "cat", "dog", "fox", "sun", "moon", "star"]
    chats = [
        {"messages": [{"role": "user", "content": f"say {a} {b}"}, {"role": "assistant", "content": f"{a} {b}"}]}
        for a in words
        for b in words
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"repeat {w} twice"}) for w in words))
    shrink = [
        f"model.base={tmp_path / 'model'}",
        f"data.demonstrations={tmp_path / 'chats.jsonl'}",
        f"data.prompts={tmp_path / 'prompts.jsonl'}",
        *("data.size=40", "data.prompts_size=8", "data.held_out=0.1", "sft.epochs=1", "sft.batch=16"),
        *("rollout.batch=8", "rollout.max_new_tokens=6", "ppo.steps=2", "ppo.critic_warmup=1", "eval.every=1"),
    ]
    recipe = load_recipe(ROOT / "recipes" / "smollm2-135m.toml", shrink)
    assert recipe.model.precision == "bf16" and recipe.data.overlap == "minimum" and recipe.reward.token_clip == 5.0
    console = Console(plain=True, file=io.StringIO())
    run = prepare_run(recipe, ["base", "ppo", "chosen-sft"], tmp_path / "run", console)
    figures = {kind: (stage.result() or {})["figures"] for kind, stage in run_stages(run).items()}
    assert {"base", "sft", "ppo", "longer-sft-1/256", "chosen-sft"} <= figures.keys()
    assert figures["sft"]["held_out_nll"] < figures["base"]["held_out_nll"]
    assert figures["ppo"]["kept_step"] == 2
