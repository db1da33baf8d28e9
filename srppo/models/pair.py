"""The two models whose difference is the reward, from a run or by name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from srppo.config import ModelConfig, Recipe, build_recipe, resolved
from srppo.data.chat import ensure_chat_template, stop_ids
from srppo.errors import ModelError, RecordError, UserError
from srppo.models.language_model import LanguageModel
from srppo.models.loading import context_length, load_model, load_over, load_tokenizer
from srppo.record.arms import is_sweep, one_run
from srppo.record.store import Run, Stage


@dataclass(frozen=True)
class Pair:
    """SFT model and base, with the tokenizer and the recipe that say how a prompt is put and where an answer ends.

    `stage` is the SFT stage of a run, None where the models were given by path.
    """

    sft: LanguageModel
    base: LanguageModel
    tokenizer: PreTrainedTokenizerBase
    recipe: Recipe
    sft_name: str
    base_name: str
    run: Run | None = None
    stage: Stage | None = None

    @cached_property
    def stops(self) -> list[int]:
        """Token ids that end a response."""
        return stop_ids(self.tokenizer, self.sft.generation_config)

    @property
    def pad_id(self) -> int:
        """The padding id; masks never look at it."""
        return int(self.tokenizer.pad_token_id)

    @property
    def context(self) -> int:
        """Tokens of prompt and answer that both models take."""
        return min(context_length(self.sft), context_length(self.base))

    def ppo_stages(self) -> list[Stage]:
        """The PPO stages of every arm and training seed that started from this SFT model, finished or not, by seed.

        A given SFT model is one for all training seeds, each of which measured it in a stage of its own.
        """
        if self.run is None or self.stage is None:
            return []
        kind, origin = self.stage.identity["kind"], self.stage.identity["parents"]
        stages = self.run.stages()
        given = [s for s in stages if kind == "given-sft" == s.identity["kind"] and s.identity["parents"] == origin]
        same = {self.stage.id, *(stage.id for stage in given)}
        ours = [s for s in stages if s.identity["kind"] == "ppo" and same & {*s.identity["parents"]}]
        return sorted(ours, key=lambda stage: int(stage.identity["config"]["seed"]))

    def load(self, spec: str) -> LanguageModel:
        """A third model under the same settings, on the same device."""
        return load_over(spec, self.base, self.recipe.model, vocab_size=len(self.tokenizer))


def load_pair(
    run: Path | None = None,
    *,
    sft: str | None = None,
    base: str | None = None,
    seed: int | None = None,
    device: str = "cpu",
) -> Pair:
    """The pair of a run folder (its SFT model of one seed, the first by default, and its recipe's base), or two models.

    With neither, the newest run below `runs/` that has a finished SFT model. Raises UserError saying what to give.
    """
    if run is not None and (sft or base):
        raise UserError("give a run folder or --sft and --base, not both")
    if (sft is None) != (base is None):
        raise UserError("the reward is log pi_sft - log pi_base: give both --sft and --base, or a run folder")
    if sft is not None and base is not None:
        recipe = build_recipe({"model": {"base": base, "sft": sft}})
        return _load(recipe, sft, device)
    found = one_run(run if run is not None else _newest())
    stage = _sft_stage(found, seed)
    recipe = build_recipe({**found.spec["recipe"], "seed": stage.identity["config"]["seed"]})
    path = str(stage.path / "model") if stage.identity["kind"] == "sft" else str(recipe.model.sft)
    return replace(_load(resolved(recipe), path, device), run=found, stage=stage)


def _load(recipe: Recipe, sft: str, device: str) -> Pair:
    tokenizer, base, policy = load_models(recipe.model, sft, device)
    ensure_chat_template(tokenizer)
    assert policy is not None
    return Pair(policy, base, tokenizer, recipe, sft, recipe.model.base)


def load_models(
    config: ModelConfig, sft: str | None, device: str
) -> tuple[PreTrainedTokenizerBase, LanguageModel, LanguageModel | None]:
    """(tokenizer, base, SFT model, None where there is none yet); the tokenizer is the SFT model's, whose template it
    knows, else the base's. Raises ModelError for two models that do not have the same tokens."""
    tokenizer = load_tokenizer(sft or config.base, config)
    if sft is not None:
        check_same_tokens(load_tokenizer(config.base, config), tokenizer)
    size = len(tokenizer)
    base = load_model(config.base, config, device=device, vocab_size=size)
    if sft is None:
        return tokenizer, base, None
    policy = load_over(sft, base, config, vocab_size=size)
    check_same_vocabulary(base.model, policy.model)
    return tokenizer, base, policy


def _newest() -> Path:
    runs = sorted(Path("runs").glob("*/sweep.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in runs:
        found = Run.load(path.parent)
        if not is_sweep(found.spec) and any(_is_sft(stage) for stage in found.stages()):
            return path.parent
    raise UserError("no run with a finished SFT model below runs/; give a run folder, or --sft and --base")


def _is_sft(stage: Stage) -> bool:
    return stage.identity["kind"] in ("sft", "given-sft") and stage.done


def _sft_stage(run: Run, seed: int | None) -> Stage:
    stages = {stage.identity["config"]["seed"]: stage for stage in run.stages() if _is_sft(stage)}
    if not stages:
        raise RecordError(f"{run.path} has no finished SFT model; finish the run, or give --sft and --base")
    if seed is not None and seed not in stages:
        raise UserError(f"{run.path} has no finished SFT model of seed {seed}; it has {sorted(stages)}")
    return stages[min(stages) if seed is None else seed]


def check_same_vocabulary(base: PreTrainedModel, sft: PreTrainedModel) -> None:
    """The reward compares log-probs of the same token ids, so both models must have one vocabulary."""
    sizes = [model.get_output_embeddings().weight.shape[0] for model in (base, sft)]
    if sizes[0] != sizes[1]:
        raise ModelError(
            f"the base has a vocabulary of {sizes[0]}, the SFT model of {sizes[1]}; log pi_sft - log pi_base needs the "
            "same tokens: use an SFT model trained from this base"
        )


def check_same_tokens(base: PreTrainedTokenizerBase, sft: PreTrainedTokenizerBase) -> None:
    """The same id must be the same token for both models; equal sizes do not make it so."""
    ours, theirs = base.get_vocab(), sft.get_vocab()
    if ours != theirs:
        differing = min(ours.items() ^ theirs.items(), key=lambda pair: (pair[1], pair[0]))
        raise ModelError(
            f"base and SFT model number their tokens differently ({len(ours)} and {len(theirs)} tokens, the first that "
            f"differs is {differing[0]!r}, id {differing[1]}); log pi_sft - log pi_base needs the same tokens: use "
            "an SFT model trained from this base"
        )
