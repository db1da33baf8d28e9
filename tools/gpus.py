"""Which recipe fits one GPU, and how many whole models need: `python tools/gpus.py` writes the tables of
docs/models.md, as `srppo plan` has it.

The models are fetched by their hub names (config.json alone), or read from `--configs DIR`, which has a folder for each
recipe by its name.
"""

import argparse
from pathlib import Path

from blocks import ROOT, write_block

from srppo.config import load_recipe
from srppo.stages.memory_plan import lengths_of, plan

RECIPES = ("mistral-7b", "llama3-8b", "qwen2.5-0.5b")
CHOICES = {
    "as it is": [],
    "`model.activation_checkpointing=false`": ["model.activation_checkpointing=false"],
    "`model.adapters=none`, `model.activation_checkpointing=true`, `ppo.critic=shared`": [
        "model.adapters=none",
        "model.activation_checkpointing=true",
        "ppo.critic=shared",
    ],
}
SIZES = (24, 48, 80)
WHOLE = ["model.adapters=none", "model.sharding=full", "model.activation_checkpointing=true"]
SEVERAL = {"`ppo.critic=own`": ["ppo.critic=own"], "`ppo.critic=shared`": ["ppo.critic=shared"]}
PROCESSES = (4, 8)


def table(configs: Path | None) -> str:
    """A row a recipe and choice: GB of the peak on each size, in bold where it fits."""
    heads = " | ".join(f"{size} GB" for size in SIZES)
    lines = [f"| recipe | | most in | {heads} |", f"|---|---|---|{'---|' * len(SIZES)}"]
    for name in RECIPES:
        for words, sets in CHOICES.items():
            base = [] if configs is None else [f"model.base={configs / name}"]
            recipe = load_recipe(ROOT / "recipes" / f"{name}.toml", [*base, *sets])
            cells = []
            for size in SIZES:
                found = plan(recipe, lengths_of(recipe), size * 10**9, "cuda")
                stage, phase, most = found.peak
                cells.append(f"**{most / 1e9:.1f}**" if found.fits else f"no: {most / 1e9:.1f}")
            lines.append(f"| `{name}` | {words} | {stage} {phase} | {' | '.join(cells)} |")
    return "\n".join(lines)


def several_table(configs: Path | None) -> str:
    """A row a model and critic, all of whose weights are trained and spread: GB of the peak in each of so many
    processes, in bold where it fits 80 GB."""
    heads = " | ".join(f"most in | {count} GPUs of 80 GB" for count in PROCESSES)
    lines = [f"| recipe | | {heads} |", f"|---|---|{'---|---|' * len(PROCESSES)}"]
    for name in RECIPES[:2]:
        for words, sets in SEVERAL.items():
            base = [] if configs is None else [f"model.base={configs / name}"]
            recipe = load_recipe(ROOT / "recipes" / f"{name}.toml", [*base, *WHOLE, *sets])
            cells = []
            for count in PROCESSES:
                found = plan(recipe, lengths_of(recipe), 80 * 10**9, "cuda", count)
                stage, phase, most = found.peak
                cells += [f"{stage} {phase}", f"**{most / 1e9:.1f}**" if found.fits else f"no: {most / 1e9:.1f}"]
            lines.append(f"| `{name}` | {words} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--configs", type=Path)
    parser.add_argument("--several", action="store_true", help="the table of several GPUs")
    options = parser.parse_args()
    if options.several:
        write_block("docs/models.md", "python tools/gpus.py --several", several_table(options.configs))
    else:
        write_block("docs/models.md", "python tools/gpus.py", table(options.configs))
