"""An arm's model out of a run's record, as a folder of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from srppo.config import ModelConfig
from srppo.console import Console
from srppo.errors import RecordError, UserError
from srppo.evaluation.harness.targets import Target, find_targets
from srppo.models.adapters import AdaptedModel, is_adapter
from srppo.models.loading import load_model, load_tokenizer, no_bars
from srppo.record.folder import check_place, placing
from srppo.stages.arms import stages_by_arm

ARM = "SRPPO"


def export_arm(
    run: Path, out: Path | None, *, arm: str | None, seed: int | None, merged: bool, dtype: str, console: Console
) -> Path:
    """Copy the model of an arm (SRPPO's first seed, unless said) out of a run; the folder.

    An adapter stays one, in PEFT's format, unless `merged`: then it is added to its base's weights in fp32, and the sum
    is written in `dtype`. Raises UserError for an arm or seed that the run has not, RecordError for a folder in use.
    """
    target = _chosen(find_targets(str(run), None, console.say, stages_by_arm), arm or ARM, seed)
    folder = out or run / "export" / f"{target.label.replace(' ', '-').replace(',', '')}-seed-{target.seed}"
    check_place(folder)
    if folder.exists() and any(folder.iterdir()):
        raise RecordError(f"{folder} is not empty; give --out a new folder")
    source = Path(target.spec)
    if run.absolute() not in source.absolute().parents:
        raise UserError(f"{target.title} is {target.spec} itself: nothing was trained")
    if dtype != "fp32" and not merged:
        raise UserError(
            f"--dtype {dtype} is of merged weights; add --merged, or leave it out: files are copied as they are"
        )
    if merged and not is_adapter(source):
        raise UserError(f"{target.title} has all its weights already; leave out --merged")
    with placing(folder), no_bars():
        folder.mkdir(parents=True, exist_ok=True)
        if merged:
            _merge(target, folder, dtype)
        else:
            shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
    return folder


def _chosen(targets: list[Target], arm: str, seed: int | None) -> Target:
    arms = list(dict.fromkeys(target.label for target in targets))
    ours = [target for target in targets if target.label == arm]
    if not ours:
        raise UserError(
            f"the run has no finished arm {arm!r} with a model; it has {', '.join(arms)}: give one to --arm"
        )
    found = [target for target in ours if seed is None or target.seed == seed]
    if not found:
        raise UserError(f"{arm} has no seed {seed}; it has {', '.join(str(target.seed) for target in ours)}")
    return found[0]


def _merge(target: Target, folder: Path, dtype: str) -> None:
    config: ModelConfig = target.config
    tokenizer = load_tokenizer(target.spec, config)
    role = load_model(target.spec, config, vocab_size=len(tokenizer))
    assert isinstance(role, AdaptedModel)
    whole = role.merged()
    whole.model.to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    whole.save(folder)
    tokenizer.save_pretrained(folder)
    card = Path(target.spec) / "README.md"
    if card.is_file():
        shutil.copy(card, folder / card.name)
