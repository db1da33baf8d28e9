"""The folder that `from_pretrained` loads: weights, tokenizer, chat template, generation config and a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from srppo.config import Recipe, to_toml
from srppo.models.language_model import LanguageModel
from srppo.models.loading import no_bars

CARD = """---
library_name: transformers
tags: [srppo, {kind}]
base_model: {quoted_base}
---

# {kind} from {base}

Trained with srppo (Self-Rewarding PPO, arXiv 2510.21090) from demonstrations only. The figures are exact-match accuracy
on test items, with 95% intervals over items; one training seed says nothing about other seeds.

{figures}

{choice}

## Recipe

```toml
{recipe}```
"""


def export_model(
    folder: Path,
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    stop_ids: Sequence[int],
    card: str,
) -> None:
    """Write weights (fp32 safetensors; an adapter in PEFT's format), tokenizer with its chat template, generation
    config and card into a folder."""
    model.generation_config = GenerationConfig(
        eos_token_id=list(stop_ids), pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id
    )
    with no_bars():
        model.save(folder)
        tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


def model_card(recipe: Recipe, kind: str, figures: Mapping[str, Any]) -> str:
    """The model card of one export; `figures` are those of its stage's result."""
    rows = ["| items | decoding | accuracy | 95% | n |", "|---|---|---|---|---|"]
    for group, by_decoding in figures.get("test", {}).items():
        for decoding, e in by_decoding.items():
            rows.append(f"| {group} | {decoding} | {e['mean']:.3f} | {e['low']:.3f} to {e['high']:.3f} | {e['n']} |")
    table = "\n".join(rows) if len(rows) > 2 else "No test items were given (`eval.items`)."
    return CARD.format(
        kind=kind,
        base=recipe.model.base,
        quoted_base=json.dumps(recipe.model.base, ensure_ascii=False),  # a path may hold what YAML takes for syntax
        figures=table,
        choice=_choice(figures),
        recipe=to_toml(recipe),
    )


def _choice(figures: Mapping[str, Any]) -> str:
    """What was picked on development items, in a sentence."""
    if "alpha" in figures:
        tried = ", ".join(f"{row['alpha']:g}" for row in figures["alphas"])
        return (
            f"The weights are sft + alpha (sft - base) with alpha = {figures['alpha']:g}, chosen of {tried} "
            "(`methods.alphas`) by `eval.metric`; nothing was trained."
        )
    return (
        f"Step {figures['kept_step']} of {figures['steps']} was kept; the rule is in the recipe (`eval.keep`, "
        "`eval.metric`)."
    )
