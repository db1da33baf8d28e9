"""A run from end to end: stages in order, each skipped when its result is there, then figures for every arm.

base -> SFT -> PPO          the arms "base", "SFT", "SRPPO"
base -> longer SFT          the baselines, at the counted compute of SFT and PPO together
base, SFT -> (no training)  what else is made of the two (`methods`)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from statistics import mean
from typing import Any

from transformers import PreTrainedTokenizerBase

from srppo.config import ModelConfig, Recipe, canonical_json, recipe_warnings, resolved
from srppo.console import Console
from srppo.data.memo import Memo
from srppo.data.prepare import PreparedData, ensure_chat_template, prepare, stop_ids
from srppo.errors import ConfigError, Diverged, RecordError
from srppo.evaluation.development import (
    Development,
    EvalItem,
    Verdict,
    accuracy_by_group,
    answer_items,
    answer_nll,
    load_items,
)
from srppo.models.export import export_model, model_card
from srppo.models.language_model import (
    LanguageModel,
    check_same_tokens,
    check_same_vocabulary,
    context_length,
    fingerprint,
    load_model,
    load_tokenizer,
    resolve,
)
from srppo.record.files import write_atomic
from srppo.record.store import Attempt, Run, Stage
from srppo.stages.base_answers import sample_texts
from srppo.stages.baselines import SHARES, longer_sft_steps
from srppo.stages.kinds import stage_settings
from srppo.training.batch import Generated
from srppo.training.loop import Session, Tracker, Workbench, load_weights
from srppo.training.ppo import train_ppo
from srppo.training.rollout import generate
from srppo.training.sft import train_sft

Figures = dict[str, Any]
UNTRAINED: Figures = {"kept_step": 0, "steps": 0, "flops": 0}


@dataclass
class Pipeline:
    """One recipe in one folder. Loads what stages share once; each method runs (or finds) one stage.

    `seeds`, where several pipelines share the folder, lists the seeds of all of them. `shared`: the open record of a
    sweep, where pipelines of many recipes meet; `on_stage` hears of each stage before it runs. `memo` and
    `tokenizer_of`: what the worker of a sweep keeps for all its stages.
    """

    recipe: Recipe
    folder: Path
    console: Console
    device: str = "cpu"
    environment: Mapping[str, Any] = field(default_factory=dict)
    seeds: Sequence[int] = ()
    needs_prompts: bool = True
    make_trackers: Callable[[Stage], tuple[Tracker, ...]] = lambda stage: ()
    shared: Run | None = None
    on_stage: Callable[[Stage], None] = lambda stage: None
    memo: Memo | None = None
    tokenizer_of: Callable[[str, ModelConfig], PreTrainedTokenizerBase] = load_tokenizer

    def __post_init__(self) -> None:
        for warning in recipe_warnings(self.recipe):
            self.console.warn(warning)
        self.recipe = resolved(self.recipe)
        self.data: PreparedData = prepare(
            self.recipe.data,
            self.tokenizer,
            self.recipe.seed,
            context_length(self.base),
            max_new_tokens=self.recipe.rollout.max_new_tokens,
            stop=self.stop_ids,
            sample=partial(sample_texts, self.base, self.tokenizer, self.stop_ids, self.recipe.rollout.max_new_tokens),
            memo=self.memo,
        )
        for line in self.data.report.lines():
            self.console.say(line)
        # Mistakes in what is needed later are found now: nothing is measured in vain, and no folder is left behind.
        if self.recipe.model.sft is not None:
            check_same_vocabulary(self.base.model, self.given_sft.model)
            if fingerprint(self.recipe.model.sft, self.recipe.model) == self.base_id:
                raise ConfigError(
                    "model.sft is the base itself: the reward would be 0 everywhere; give a fine-tuned model"
                )
        if self.needs_prompts and not self.data.prompts:
            raise ConfigError(
                "PPO needs prompts: set data.prompts to files with prompts (answers in them are not read), for example "
                "the demonstrations' own file"
            )
        self.development = Development(self.recipe, self.tokenizer, self.data.held_out, self.stop_ids)
        if self.recipe.eval.keep == "best" and not self.development.ranks:
            self.console.warn(
                f"nothing measures eval.metric = {self.recipe.eval.metric} here (accuracy needs eval.items, nll needs "
                "data.held_out): the last step of each arm is kept"
            )
        self.items_sha = items_sha(self.recipe)
        recipe = self.recipe.model_dump(mode="json", exclude={"seed"})
        self.run = self.shared or Run.open(self.folder, {"recipe": recipe, "seeds": self.seeds or [self.recipe.seed]})
        decides = [recipe["data"], recipe["model"], recipe["rollout"]["max_new_tokens"]]  # what the manifest holds
        choice = f"{_sha(decides)[:8]}-" if self.shared else ""  # a sweep has several
        self.run.write_data_manifest(self.data.manifest, f"manifest-{choice}seed-{self.recipe.seed}")

    @cached_property
    def base(self) -> LanguageModel:
        """The frozen base."""
        return self.load(self.recipe.model.base)

    def fresh_base(self) -> LanguageModel:
        """Another copy of the base, to be trained."""
        return self.base.copy()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the model that PPO starts from, whose template it knows; with ours where it has none."""
        config = self.recipe.model
        tokenizer = self.tokenizer_of(config.sft or config.base, config)
        if config.sft is not None:
            check_same_tokens(self.tokenizer_of(config.base, config), tokenizer)
        if ensure_chat_template(tokenizer):
            self.console.say(
                "the tokenizer has no chat template; ours (`Q: ... A: ...`) is used and saved with the models"
            )
        return tokenizer

    @cached_property
    def stop_ids(self) -> list[int]:
        """Token ids that end a response."""
        model = self.base if self.recipe.model.sft is None else self.given_sft
        return stop_ids(self.tokenizer, model.model.generation_config)

    @cached_property
    def given_sft(self) -> LanguageModel:
        """The SFT model that the recipe names."""
        return self.load(str(self.recipe.model.sft))

    @property
    def pad_id(self) -> int:
        """The padding id; masks never look at it."""
        return int(self.tokenizer.pad_token_id)

    # ---- stages

    @cached_property
    def base_id(self) -> str:
        """The base by its content."""
        return fingerprint(self.recipe.model.base, self.recipe.model)

    def base_stage(self) -> Stage:
        """The base as it is: nothing to train, only to measure."""
        return self._only_measure("base", [self.base_id], lambda: self.base)

    def sft_stage(self) -> tuple[Stage, Path]:
        """(stage, folder of the SFT model): the given one, or one trained from the base."""
        given = self.recipe.model.sft
        if given is not None:
            path = Path(resolve(given))
            content = fingerprint(given, self.recipe.model)
            return self._only_measure("given-sft", [content], lambda: self.load(given)), path
        stage = self.run.stage(
            "sft", self._identity("sft"), [self.base_id], self.data.manifest["demonstrations"]["sha256"]
        )

        def train(model: LanguageModel, bench: Workbench) -> Session:
            return train_sft(self.recipe, bench, model, self.data.demonstrations, self.development, pad_id=self.pad_id)

        self._train(stage, "SFT", self.fresh_base, train)
        return stage, stage.path / "model"

    def ppo_stage(self, sft: Stage, sft_path: Path) -> Stage:
        """SRPPO from an SFT model."""
        stage = self.run.stage("ppo", self._identity("ppo"), [self.base_id, sft.id], self.data.sha)

        def train(policy: LanguageModel, bench: Workbench) -> Session:
            check_same_vocabulary(self.base.model, policy.model)
            return train_ppo(
                self.recipe,
                bench,
                policy,
                policy.copy(),  # the SFT model, while nothing is trained or resumed
                self.base,
                self.data.prompts,
                self.development,
                stop_ids=self.stop_ids,
                pad_id=self.pad_id,
            )

        return self._train(stage, "SRPPO", lambda: self.load(str(sft_path)), train)

    def longer_sft_stages(self, sft: Stage, ppo: Stage) -> list[Stage]:
        """The baselines; their budget is the counted compute of the two stages they are compared with."""
        return [self.longer_sft_stage(sft, ppo, share) for share in SHARES]

    def longer_sft_stage(self, sft: Stage, ppo: Stage, share: float) -> Stage:
        """SFT anew from the base, for a share of the counted compute of the two stages."""
        budget = sum((stage.result() or {})["figures"]["flops"] for stage in (sft, ppo))
        return self._longer_sft_stage(longer_sft_steps(self.recipe, self.base, self.data.demonstrations, budget, share))

    def _longer_sft_stage(self, steps: int) -> Stage:
        identity = self._identity("longer-sft") | {"steps": steps}
        stage = self.run.stage("longer-sft", identity, [self.base_id], self.data.manifest["demonstrations"]["sha256"])

        def train(model: LanguageModel, bench: Workbench) -> Session:
            rows = self.data.demonstrations
            return train_sft(self.recipe, bench, model, rows, self.development, pad_id=self.pad_id, total=steps)

        return self._train(stage, f"longer SFT ({steps} steps)", self.fresh_base, train)

    # ---- shared

    def _only_measure(self, kind: str, parents: Sequence[str], load: Callable[[], LanguageModel]) -> Stage:
        return self.untrained(kind, parents, lambda attempt: self.measure(attempt, load(), "kept"))

    def untrained(
        self, kind: str, parents: Sequence[str], measure: Callable[[Attempt], Figures], files: Iterable[Path] = ()
    ) -> Stage:
        """Run a stage that trains nothing to its commit, or find it done."""
        stage = self.run.stage(kind, self._identity(kind), parents, self.data.manifest["demonstrations"]["sha256"])
        self.on_stage(stage)
        if stage.done:
            stage.verify()
            return stage
        stage.reopen()
        with stage.attempt(self.environment) as attempt:
            attempt.commit("ok", UNTRAINED | measure(attempt), files)
        return stage

    def _identity(self, kind: str) -> dict[str, Any]:
        """What enters a stage's id beside parents and data: settings that decide its outcome, and no path."""
        return stage_settings(self.recipe, kind) | {"eval_items": self.items_sha}

    def load(self, spec: str) -> LanguageModel:
        """A model on this pipeline's device."""
        model = load_model(spec, self.recipe.model, device=self.device, vocab_size=len(self.tokenizer))
        if not model.head.linear:
            self.console.warn(
                f"the head of {type(model.model).__name__} is not linear, or does more than scale and softcap: whole "
                "logits are built, which costs memory; results are the same"
            )
        return model

    def _train(
        self,
        stage: Stage,
        name: str,
        load: Callable[[], LanguageModel],
        train: Callable[[LanguageModel, Workbench], Session],
    ) -> Stage:
        """Run one stage to its commit, or find it done. A diverged one raises again; a failed one is tried again."""
        self.on_stage(stage)
        result = stage.result()
        if result and result["status"] == "ok":
            stage.verify()
            self.console.say(f"{name}: finished before, in {stage.path}")
            return stage
        if result and result["status"] == "diverged":
            raise Diverged(f"{name} in {stage.path} diverged before, at {result['figures']['reason']}")
        stage.reopen()
        with stage.attempt(self.environment) as attempt:
            model = load()
            bench = Workbench(stage, attempt, self.tokenizer, self.console, name, self.make_trackers(stage))
            try:
                session = train(model, bench)
            except Diverged as error:
                survivor = stage.latest_checkpoint()
                kept = f"the last good checkpoint is {survivor[1]}" if survivor else "there was no checkpoint yet"
                attempt.commit("diverged", {"reason": str(error)})
                raise Diverged(f"{name} diverged at {error}; {kept}") from error
            attempt.commit("ok", self._finish(bench, model, session), files=[Path("model")])
            for tracker in bench.trackers:
                tracker.finish()
        return stage

    def _finish(self, bench: Workbench, model: LanguageModel, session: Session) -> Figures:
        """Measure the kept step (and the last, where it is another) on test items, and export the kept one."""
        kept = int(session.state.counters["kept_step"])
        counters = session.state.counters
        figures: Figures = {"kept_step": kept, "steps": session.total, "flops": counters["flops"]}
        figures["score"] = counters["kept_score"] if math.isfinite(counters["kept_score"]) else None
        if kept != session.total:
            figures["last"] = self.measure(bench.attempt, model, "last")
            load_weights(model.model, kept_checkpoint(bench.stage, kept) / "policy.safetensors")
        figures |= self.measure(bench.attempt, model, "kept")
        for name, rows in (("metrics", bench.stage.metrics()), ("rollouts", bench.stage.rollouts())):
            write_atomic(bench.stage.path / f"{name}.jsonl", "".join(canonical_json(row) + "\n" for row in rows))
        self.export(bench.attempt, model, bench.name, figures)
        return figures

    def export(self, attempt: Attempt, model: LanguageModel, name: str, figures: Figures) -> None:
        """Publish a model, with a card that tells its figures, in the stage's folder `model`."""
        card = model_card(self.recipe, name, figures)
        attempt.publish(
            "model", lambda folder: export_model(folder, model, self.tokenizer, stop_ids=self.stop_ids, card=card)
        )

    def measure(self, attempt: Attempt, model: LanguageModel, which: str) -> Figures:
        """Held-out NLL and test figures of one model."""
        figures: Figures = {}
        if self.data.held_out:
            figures["held_out_nll"] = answer_nll(model, self.data.held_out, micro_batch=self.recipe.sft.micro_batch)
        if load_items(self.recipe, "test"):
            figures |= self.test(attempt, which, partial(self.answers, model, generate))[0]
        return figures

    def test(
        self, attempt: Attempt, which: str, answer: Callable[[int | None], list[Verdict]]
    ) -> tuple[Figures, dict[str, list[Verdict]]]:
        """Test figures, greedy (None samples) and sampled; verdicts go to eval/<which>-<decoding>/samples.jsonl."""
        figures: Figures = {}
        found: dict[str, list[Verdict]] = {}
        for decoding, samples in (("greedy", None), ("sampled", self.recipe.eval.samples)):
            verdicts = found[decoding] = answer(samples)
            for group, estimate in accuracy_by_group(verdicts).items():
                figures.setdefault("test", {}).setdefault(group, {})[decoding] = estimate._asdict()
            figures[f"{decoding}_ended"] = mean(end for verdict in verdicts for end in verdict.ended)
            figures[f"{decoding}_tokens"] = mean(count for verdict in verdicts for count in verdict.tokens)
            attempt.publish(f"eval/{which}-{decoding}", partial(write_verdicts, verdicts))
        return figures, found

    def answers(self, model: LanguageModel, decode: Callable[..., Generated], samples: int | None) -> list[Verdict]:
        """A model's answers to the test items."""
        items, stops = self.test_items(), self.stop_ids
        return answer_items(model, self.tokenizer, items, self.recipe, samples=samples, stops=stops, decode=decode)

    def test_items(self) -> list[EvalItem]:
        """The test items, which a method without a model of its own cannot do without."""
        items = load_items(self.recipe, "test")
        if not items:
            raise ConfigError("there are no test items to answer; set eval.items to a file with prompts and answers")
        return items


def items_sha(recipe: Recipe) -> str:
    """What the items of development and test are, by content."""
    items = [vars(item) for split in ("dev", "test") for item in load_items(recipe, split)]
    return _sha(items)[:16]


def _sha(value: Any) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def kept_checkpoint(stage: Stage, step: int) -> Path:
    """The checkpoint of the kept step; later ones cannot stand in for it, so a damaged one costs the stage."""
    try:
        return stage.checkpoint(step)
    except RecordError as error:
        reason = str(error).partition(";")[0]
        raise RecordError(f"{reason}; it holds the kept step: remove {stage.path} to train that stage again") from error


def write_verdicts(verdicts: Sequence[Verdict], folder: Path) -> None:
    """One JSON line an item, in the order of the items."""
    (folder / "samples.jsonl").write_text("".join(canonical_json(vars(v)) + "\n" for v in verdicts))


def run_sft(pipeline: Pipeline) -> None:
    """Base figures and SFT."""
    pipeline.base_stage()
    pipeline.sft_stage()


def run_train(pipeline: Pipeline, *, baselines: bool) -> None:
    """SFT (unless one is given), PPO, and with `baselines` the equal-compute SFT."""
    if baselines and pipeline.recipe.model.sft is not None:
        raise ConfigError(
            "--baselines compares with SFT at the compute of SFT and PPO together, and what the given model.sft took "
            "is not known; leave out --baselines, or leave out model.sft so that it is trained here"
        )
    pipeline.base_stage()
    sft, sft_path = pipeline.sft_stage()
    ppo = pipeline.ppo_stage(sft, sft_path)
    if baselines:
        pipeline.longer_sft_stages(sft, ppo)
