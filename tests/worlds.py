"""A whole run small enough for a test: a one-layer Llama and a byte tokenizer on disk, a few rows, and its outcome."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from srppo.config import Recipe, build_recipe, canonical_json, load_recipe, to_toml, with_overrides
from srppo.console import Console
from srppo.errors import Diverged
from srppo.stages.run import PreparedRun, prepare_run, run_stages

EOS, PAD, VOCAB = 256, 257, 258
LIKELY = {" ": 5.5, "a": 6.0, "b": 5.0, "c": 4.5}  # logits above those of other bytes
TEMPLATE = (  # of few characters, since each is a token
    "{% if brief is defined and brief %}B {% endif %}{% for m in messages %}{{ m.role[0] }}:{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
PARTS = ("data", "sft", "ppo", "figures")
BOOKKEEPING = ("timing", "flops", "selection_flops", "lr", "curve")  # rather than what was trained


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, and EOS and PAD."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>", "<pad>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def byte_llama(seed: int, *, vocab: int = VOCAB, eos_logit: float = 5.5) -> LlamaForCausalLM:
    """One layer, width 16. Its first dimension is a constant, so that the head can favour EOS and a few letters."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
    )
    head, embedding = model.lm_head.weight.data, model.get_input_embeddings().weight.data
    head.normal_(0, 0.15)
    embedding.normal_(0, 0.3)
    embedding[:, 0] = 1.0
    letters = byte_tokenizer().convert_tokens_to_ids
    for char, logit in LIKELY.items():
        head[letters("Ġ" if char == " " else char), 0] += logit / 2.5
    if vocab > EOS:
        head[EOS, 0] += eos_logit / 2.5
    return model


def save_model(folder: Path, model: LlamaForCausalLM, *, tokenizer: bool = True) -> Path:
    """What from_pretrained loads."""
    model.save_pretrained(folder)
    if tokenizer:
        byte_tokenizer().save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """A jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@dataclass(frozen=True)
class World:
    """Paths of everything a recipe names."""

    folder: Path

    def __getattr__(self, name: str) -> str:
        found = [path for path in self.folder.iterdir() if path.stem == name]
        if len(found) != 1:
            raise AttributeError(name)
        return str(found[0])

    def tree(self) -> dict[str, dict[str, Any]]:
        """The smallest recipe: 2 SFT steps, 2 PPO steps of 8 rollouts, all metrics on."""
        return {
            "model": {"base": self.base},
            "data": {
                "demonstrations": [self.demonstrations],
                "prompts": [self.prompts],
                "held_out": 0.2,
                "max_prompt_tokens": 30,
                "max_tokens": 48,
            },
            "sft": {"batch": 6, "lr": 0.01},
            "rollout": {"batch": 8, "max_new_tokens": 5},
            "ppo": {"steps": 2, "lr": 0.01, "value_lr": 0.05, "micro_tokens": 8},
            "eval": {"items": self.items, "every": 1, "samples": 2},
        }

    def recipe(self, overrides: Mapping[str, Any] | None = None) -> Recipe:
        return with_overrides(build_recipe(self.tree()), overrides or {})

    def recipe_file(self, path: Path, overrides: Mapping[str, Any] | None = None) -> Path:
        path.write_text(to_toml(self.recipe(overrides)))
        assert load_recipe(path) == self.recipe(overrides)
        return path


def make_world(folder: Path) -> World:
    """Two bases, an SFT model, demonstrations, conversations, a chat template, prompts and items.

    One prompt equals a demonstration's, one is long.
    """
    words = ["cab", "abc", "bca", "acb", "bac", "cba", "aab", "bbc", "cca", "abb", "bcc", "caa", "aca", "bab"]
    for name, seed in (("base", 0), ("base2", 1), ("sft", 2)):
        save_model(folder / name, byte_llama(seed))
    demonstrations = [{"prompt": f"Name {word}", "completion": word[0]} for word in words]
    demonstrations.append({"prompt": "Spell it", "completion": "a b c a b c a b c"})  # cut where max_tokens is small
    write_rows(folder / "demonstrations.jsonl", demonstrations)
    write_rows(folder / "demonstrations2.jsonl", [*demonstrations[2:], {"prompt": "Name it", "completion": "c"}])
    pairs = [[{"role": role, "content": word[i]} for i in (0, 1) for role in ("user", "assistant")] for word in words]
    write_rows(folder / "talks.jsonl", [{"messages": talk} for talk in pairs])
    (folder / "chat.jinja").write_text(TEMPLATE)
    prompts = [{"prompt": f"Say {word} please"[: 8 + i]} for i, word in enumerate(words[:9])]
    prompts += [{"prompt": "Name cab"}, {"prompt": "Say all of it, please"}]
    write_rows(folder / "prompts.jsonl", prompts)
    write_rows(folder / "prompts2.jsonl", [*prompts[1:], {"prompt": "Say nothing"}])
    for name, shift in (("items", 0), ("items2", 1)):
        rows = [
            {
                "prompt": f"Name {word}",
                "answer": word[shift],
                "group": "demonstrated" if i % 3 else "unseen",
                "split": "dev" if i % 2 else "test",
            }
            for i, word in enumerate(words[:8])
        ]
        write_rows(folder / f"{name}.jsonl", rows)
    return World(folder)


@dataclass(frozen=True)
class Outcome:
    """What a run left behind: a digest of each part (PARTS) and of the last trained weights, and the record itself."""

    folder: Path
    run: PreparedRun
    digests: dict[str, str]
    weights: dict[str, str]
    diverged: str | None

    def stage(self, kind: str) -> Path:
        (found,) = [s.path for s in self.run.record.stages() if s.identity["kind"] == kind]
        return found

    def metrics(self, kind: str) -> list[dict[str, Any]]:
        (found,) = [s for s in self.run.record.stages() if s.identity["kind"] == kind]
        return found.metrics()


def run_world(recipe: Recipe, folder: Path, *, ppo: bool = True) -> Outcome:
    """A whole run in this process, or without `ppo` base and SFT alone.

    `data` holds the token ids and which are trained, `sft` and `ppo` what training did, `figures` what was measured:
    development items, the kept step, test figures and verdicts. No digest sees a path or the recipe itself.
    """
    run = prepare_run(recipe, ["base", "ppo" if ppo else "sft"], folder, Console(plain=True, file=io.StringIO()))
    diverged = None
    try:
        run_stages(run)
    except Diverged as error:
        diverged = str(error)
    data = run.data
    weights: dict[str, str] = {}
    parts: dict[str, list[Any]] = {name: [] for name in PARTS}
    taught = [[[row.ids, row.spans] for row in rows] for rows in (data.demonstrations, data.held_out)]
    parts["data"] = [*taught, data.prompts]
    for stage in sorted(run.record.stages(), key=lambda s: s.identity["kind"]):
        kind = stage.identity["kind"]
        part = "sft" if kind in ("sft", "given-sft") else "ppo" if kind == "ppo" else "figures"
        rows = [{k: v for k, v in row.items() if k not in BOOKKEEPING} for row in stage.metrics()]
        parts[part].append([kind, [{k: v for k, v in row.items() if not k.startswith("dev/")} for row in rows]])
        parts["figures"].append([kind, [{k: v for k, v in row.items() if k.startswith("dev/")} for row in rows]])
        result = stage.result()
        parts["figures"].append(
            result and {k: v for k, v in result["figures"].items() if k not in ("reason", *BOOKKEEPING)}
        )
        for file in sorted(stage.path.glob("eval/*/samples.jsonl")):
            parts["figures"].append([file.parent.name, file.read_text()])
        parts["figures"] += [hashlib.sha256(f.read_bytes()).hexdigest() for f in stage.path.glob("model/*.safetensors")]
        last = stage.latest_checkpoint()
        if last:
            weights[part] = hashlib.sha256((last[1] / "policy.safetensors").read_bytes()).hexdigest()
            parts[part].append([last[0], weights[part]])
    digests = {name: hashlib.sha256(canonical_json(value).encode()).hexdigest() for name, value in parts.items()}
    return Outcome(folder, run, digests, weights, diverged)
