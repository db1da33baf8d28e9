"""Which recipe fits one GPU: `python tools/gpus.py` writes the table of docs/models.md, as `srppo plan` has it.

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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--configs", type=Path)
    write_block("docs/models.md", "python tools/gpus.py", table(parser.parse_args().configs))
