"""A run from end to end: a recipe made ready, then its stages in order, each skipped when its result is there.

base -> SFT -> PPO          the arms "base", "SFT", "SRPPO"
base -> longer SFT          at shares of the counted compute of SFT and PPO together; development items choose one
chosen longer SFT -> PPO    the arm "SRPPO from chosen SFT"
base, SFT -> ...            what else is made of the two (`extrapolation`, `resampling`, `self_training`)

What each kind of stage is stands in `kinds`; the functions that run the trained ones are below.
"""

from __future__ import annotations

import gc
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from transformers import PreTrainedTokenizerBase

from srppo.config import Recipe, canonical_json, derive_seed, free_settings, recipe_warnings, resolved
from srppo.console import Console
from srppo.data.chat import ensure_chat_template, stop_ids
from srppo.data.prepare import PreparedData, prepare
from srppo.errors import (
    ConfigError,
    Diverged,
    Interrupted,
    OtherEnded,
    OutOfMemory,
    RecordError,
    RunError,
    StorageError,
)
from srppo.evaluation.development import Development, Verdict, accuracy_by_group, answer_in_ways, answer_nll
from srppo.evaluation.items import load_items
from srppo.models.export import export_model, model_card
from srppo.models.heap import give_back
from srppo.models.language_model import LanguageModel
from srppo.models.loading import bf16_slowdown, context_length, fingerprint, load_over, to_train
from srppo.models.memory import is_out_of_memory, total_bytes
from srppo.models.pair import load_models
from srppo.record.files import write_atomic
from srppo.record.store import Attempt, OnlookerAttempt, Run, Stage
from srppo.stages.arms import figures_of
from srppo.stages.kinds import KINDS, Kind, check, in_order, kind_of, stage_settings
from srppo.stages.memory_plan import least_bytes
from srppo.training import parallel
from srppo.training.batch import Generated
from srppo.training.loop import Session, Workbench, load_weights
from srppo.training.optimizers import check_optimizer
from srppo.training.rollout import generate
from srppo.training.sft import steps_within, train_sft
from srppo.training.trackers import trackers
from srppo.world.items import Item

Figures = dict[str, Any]
Stages = Mapping[str, Stage]  # by the name of their kind
SLOW_BF16 = 2.0  # times as long as in fp32, beyond which this is said
UNTRAINED: Figures = {"kept_step": 0, "steps": 0, "flops": 0}


@dataclass(frozen=True)
class PreparedRun:
    """A recipe made ready: what all its stages share. Nothing has been run.

    kinds: what is to be run, parents first. given_sft: the SFT model that the recipe names, None where one is trained.
    base_id, sft_id: the models by their content. items_sha: the items of development and test, likewise.
    """

    recipe: Recipe
    kinds: tuple[str, ...]
    record: Run
    console: Console
    device: str
    environment: Mapping[str, Any]
    track: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase
    stops: list[int]
    base: LanguageModel
    given_sft: LanguageModel | None
    base_id: str
    sft_id: str | None
    data: PreparedData
    development: Development
    test_items: list[Item]
    items_sha: str

    @property
    def pad_id(self) -> int:
        """The padding id; masks never look at it."""
        return int(self.tokenizer.pad_token_id)


def prepare_run(
    recipe: Recipe,
    kinds: Iterable[str],
    place: Path | Run,
    console: Console,
    *,
    device: str = "cpu",
    environment: Mapping[str, Any] | None = None,
    seeds: Sequence[int] = (),
    track: Sequence[str] = (),
) -> PreparedRun:
    """Load the models, encode the data and open the record, so that every mistake of a user's shows before any work.

    kinds: the stages wanted; what they need comes with them. place: a folder, or the open record of a sweep, where runs
    of many recipes meet. seeds: of all runs that share the folder. track: names of trackers. Raises UserError.
    """
    if len(seeds) > 1:
        console.say(f"seed {recipe.seed}, {[*seeds].index(recipe.seed) + 1} of {len(seeds)}")
    trackers(track, "", Path(), {})  # an unknown or missing one is said now; none starts before it is used
    for warning in recipe_warnings(recipe):
        console.warn(warning)
    for section in (recipe.sft, recipe.ppo):
        check_optimizer(section.optimizer)
    if "bf16" in (recipe.model.precision, recipe.model.scoring) and (times := bf16_slowdown(device)) > SLOW_BF16:
        console.warn(
            f"a layer in bf16 takes {times:.0f} times as long as one in fp32 on this {device}: where memory allows it, "
            'set model.precision = "fp32", and leave model.scoring out'
        )
    recipe, kinds = resolved(recipe), tuple(in_order(kinds))
    check(kinds, recipe)
    parallel.check_rows(rollout__batch=recipe.rollout.batch, sft__batch=recipe.sft.batch)
    tokenizer, base, given_sft = load_models(recipe.model, recipe.model.sft, device)
    if ensure_chat_template(tokenizer):
        console.say("the tokenizer has no chat template; ours (`Q: ... A: ...`) is used and saved with the models")
    for model in filter(None, (base, given_sft)):
        if not model.head.linear:
            console.warn(
                f"the head of {type(model.model).__name__} is not linear, or does more than scale and softcap: whole "
                "logits are built, which costs memory; results are the same"
            )
    if (least := least_bytes(recipe, base, kinds)) > (total := total_bytes(base.device)):
        console.warn(
            f"weights, gradients and moments alone take {least / 1e9:.1f} GB, and {device} has {total / 1e9:.1f} GB: "
            "this will not fit; srppo plan says what to change"
        )
    stops = stop_ids(tokenizer, (given_sft or base).generation_config)
    limit = recipe.rollout.max_new_tokens
    sample = partial(sample_texts, base, tokenizer, stops, limit)
    length = context_length(base)
    data = prepare(recipe.data, tokenizer, recipe.seed, length, max_new_tokens=limit, stop=stops, sample=sample)
    for line in data.report.lines():
        console.say(line)
    base_id = fingerprint(recipe.model.base, recipe.model)
    sft_id = fingerprint(recipe.model.sft, recipe.model) if recipe.model.sft is not None else None
    if sft_id == base_id:
        raise ConfigError("model.sft is the base itself: the reward would be 0 everywhere; give a fine-tuned model")
    test_items = load_items(recipe, "test")
    check_needs(kinds, data, test_items)
    if recipe.eval.curve and not test_items:
        raise ConfigError("eval.curve measures test items, and there are none; set eval.items, or leave it out")
    development = Development(recipe, tokenizer, data.held_out, stops, sample)
    if recipe.eval.keep == "best" and not development.ranks:
        console.warn(
            f"nothing measures eval.metric = {recipe.eval.metric} here (accuracy needs eval.items, nll needs "
            "data.held_out): the last step of each arm is kept, and the longest of longer SFT"
        )
    tree = recipe.model_dump(mode="json", exclude={"seed"})
    record = place if isinstance(place, Run) else Run.open(place, {"recipe": tree, "seeds": seeds or [recipe.seed]})
    decides = [tree["data"], tree["model"], tree["rollout"]["max_new_tokens"]]  # what the manifest holds
    choice = f"{_sha(decides)[:8]}-" if place is record else ""  # a sweep has several
    record.write_data_manifest(data.manifest, f"manifest-{choice}seed-{recipe.seed}")
    return PreparedRun(
        recipe,
        kinds,
        record,
        console,
        device,
        environment or {},
        tuple(track),
        tokenizer,
        stops,
        base,
        given_sft,
        base_id,
        sft_id,
        data,
        development,
        test_items,
        _sha([asdict(item) for item in (*load_items(recipe, "dev"), *test_items)])[:16],
    )


def check_needs(kinds: Iterable[str], data: PreparedData, test_items: Sequence[Item]) -> None:
    """Raises ConfigError where a kind that is to be run has no prompts or no test items to work on."""
    needed = [KINDS[name] for name in in_order(kinds)]
    if any(kind.needs_prompts for kind in needed) and not data.prompts:
        raise ConfigError(
            "PPO needs prompts: set data.prompts to files with prompts (answers in them are not read), for example "
            "the demonstrations' own file"
        )
    if any(kind.needs_items for kind in needed) and not test_items:
        raise ConfigError("there are no test items to answer; set eval.items to a file with prompts and answers")


def _sha(value: Any) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def sample_texts(
    base: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    stops: Sequence[int],
    max_new_tokens: int,
    prompts: Sequence[tuple[int, ...]],
    seed: int,
) -> list[str]:
    """What the base says to each prompt (token ids), sampled at temperature 1, without stop tokens and outer white
    space: the wrong answers of data.noise = "base-answers"."""
    if not prompts:
        return []
    pad = int(tokenizer.pad_token_id)
    said = generate(base, prompts, stop_ids=stops, pad_id=pad, max_new_tokens=max_new_tokens, seed=seed).responses()
    kept = [[token for token in ids if token not in stops] for ids in said]
    return [str(tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in kept]


# ---- stages in order


def run_stages(
    run: PreparedRun, *, on_stage: Callable[[str, Stage], None] = lambda name, stage: None
) -> dict[str, Stage]:
    """Run every stage of a prepared run to its commit, or find it committed; the stages by kind.

    on_stage hears of each stage before it runs. Raises what a stage raises; what was committed before stays.
    """
    done: dict[str, Stage] = {}
    for name in run.kinds:
        kind = kind_of(name, run.recipe)
        stage = open_stage(run, kind, done)
        on_stage(name, stage)
        if not parallel.from_first(partial(_is_finished, run, kind, stage)):
            own = replace(run, recipe=kind.recipe(run.recipe))
            with at_work(own, kind, stage) as bench:
                bench.attempt.commit("ok", kind.function()(own, bench, done), map(Path, kind.files))
            parallel.wait()  # others read what the first has written
            gc.collect()  # models and optimizers that know each other go before the next stage's come
            give_back()
        done[name] = stage
    return done


def open_stage(run: PreparedRun, kind: Kind, done: Stages) -> Stage:
    """The stage of a kind: known by its settings, the content of data and items, the base and its own parents."""
    config = stage_settings(run.recipe, kind.name) | {"eval_items": run.items_sha}
    parents = [run.sft_id if kind.name == "given-sft" else run.base_id]
    if kind.share:  # it starts from the base: of its parents it takes no more than their compute
        budget = sum(figures_of(done[name])["flops"] for name in kind.parents)
        model = trained_base(run) if run.recipe.model.adapters == "lora" else run.base  # what a step costs
        whole = steps_within(model, run.data.demonstrations, run.recipe, budget)
        config["steps"] = max(round(whole * kind.share), 1)
    else:
        parents += [done[name].id for name in kind.parents]
    data_sha = run.data.sha if kind.needs_prompts else run.data.manifest["demonstrations"]["sha256"]
    return run.record.stage(kind.name, config, [str(parent) for parent in parents], data_sha)


def _is_finished(run: PreparedRun, kind: Kind, stage: Stage) -> bool:
    """Whether nothing is left to do. What diverged raises again; what failed otherwise is opened for another try."""
    result = stage.result()
    if result and result["status"] == "ok":
        stage.verify()
        run.console.say(f"{_title(kind, stage)}: finished before, in {stage.path}")
        return True
    if result and result["status"] == "diverged":
        raise Diverged(f"{_title(kind, stage)} in {stage.path} diverged before, at {result['figures']['reason']}")
    stage.reopen()
    return False


def _title(kind: Kind, stage: Stage) -> str:
    steps = f" ({stage.identity['config']['steps']} steps)" if kind.share else ""
    return f"{kind.label or kind.name}{steps}"


@contextmanager
def at_work(run: PreparedRun, kind: Kind, stage: Stage) -> Iterator[Workbench]:
    """One attempt at a stage. What it was told beside its identity is written down, and so is how it failed; trackers
    are finished whatever happens. What is stopped on purpose, or cannot write any more, leaves no result."""
    name, folder = _title(kind, stage), run.record.path
    watching = trackers(run.track, f"{folder.name}-{stage.id}", stage.path, run.recipe.model_dump(mode="json"))
    with ExitStack() as closing:
        attempt = _attempt(run, stage, closing)
        for tracker in watching:
            closing.callback(tracker.finish)
        attempt.log_event("settings", **free_settings(run.recipe))
        try:
            yield Workbench(stage, attempt, run.tokenizer, run.console, name, watching)
        except (Interrupted, OtherEnded, RecordError, StorageError):
            raise
        except Diverged as error:
            survivor = stage.latest_checkpoint()
            kept = f"the last good checkpoint is {survivor[1]}" if survivor else "there was no checkpoint yet"
            attempt.commit("diverged", {"reason": str(error)})
            raise Diverged(f"{name} diverged at {error}; {kept}") from error
        except OutOfMemory as error:  # in generation, which says itself what helps
            attempt.commit("oom", {"reason": str(error)})
            raise
        except Exception as error:
            if parallel.is_end_of_other(error):  # within a pass, which gathers weights
                raise parallel.other_ended() from error
            reason = str(error).partition("\n")[0] or type(error).__name__
            if is_out_of_memory(error):
                attempt.commit("oom", {"reason": f"out of memory ({reason})"})
                raise RunError(f"{name} ran out of memory ({reason}); {_what_helps(run, kind)}") from error
            attempt.commit("failed", {"reason": f"{type(error).__name__}: {reason}"})
            raise


def _attempt(run: PreparedRun, stage: Stage, closing: ExitStack) -> Attempt:
    """The attempt of this run, which the first of its processes makes."""
    made: list[Attempt] = []
    parallel.from_first(
        lambda: made.append(closing.enter_context(stage.attempt({**run.environment, "processes": parallel.size()})))
    )
    return made[0] if made else OnlookerAttempt(stage)


def _what_helps(run: PreparedRun, kind: Kind) -> str:
    for section in ("ppo", "sft"):
        tokens = getattr(run.recipe, section).micro_tokens
        if tokens > 1 and any(read.startswith(section) for read in kind.reads):
            return (
                f"lower {section}.micro_tokens ({tokens}), which changes memory and rounding alone, and run the same "
                "command: finished stages stay, and this one goes on from its last checkpoint"
            )
    return "free memory, or take another --device, and run the same command: finished stages stay"


# ---- the trained stages, and those that are only measured


def untrained_stage(run: PreparedRun, bench: Workbench, done: Stages) -> Figures:
    """The base as it is, or the SFT model that the recipe names: nothing to train, only to measure."""
    given = bench.stage.identity["kind"] == "given-sft"
    return UNTRAINED | measure(run, bench, sft_model(run, done) if given else run.base)


def sft_stage(run: PreparedRun, bench: Workbench, done: Stages) -> Figures:
    """SFT from the base: for as long as the recipe says, or for the steps that a longer SFT is known by."""
    model, total = trained_base(run), bench.stage.identity["config"].get("steps")
    rows = run.data.demonstrations
    session = train_sft(run.recipe, bench, model, rows, run.development, pad_id=run.pad_id, total=total)
    return finish(run, bench, model, session)


def trained_base(run: PreparedRun) -> LanguageModel:
    """What SFT trains: it starts as the base."""
    return to_train(run.base, run.recipe.model, derive_seed(run.recipe.seed, "adapter"))


def chosen_sft_stage(run: PreparedRun, bench: Workbench, done: Stages) -> Figures:
    """The length of longer SFT that scored best on development items: measured, and exported."""
    names = KINDS["chosen-sft"].parents
    chosen, figures = choose_length({name: figures_of(done[name]) for name in names})
    figures["chosen"] = done[chosen].id
    model = sft_model(run, done, chosen)
    figures |= measure(run, bench, model)
    export(run, bench, model, figures)
    return figures


def choose_length(lengths: Mapping[str, Figures]) -> tuple[str, Figures]:
    """(the best score's name, the shorter of equals; figures); without scores the first, which is the whole.

    selection_flops: what the others took, trained and measured. What the chosen one took is its own stage's.
    """
    scored = None not in [each["score"] for each in lengths.values()]
    chosen = min(lengths, key=lambda name: (-lengths[name]["score"], lengths[name]["steps"]) if scored else 0)
    dropped = sum(each["flops"] + each["selection_flops"] for name, each in lengths.items() if name != chosen)
    known = {key: lengths[chosen][key] for key in ("kept_step", "steps", "score")}
    return chosen, UNTRAINED | known | {"selection_flops": dropped}


def sft_model(run: PreparedRun, done: Stages, name: str = "sft") -> LanguageModel:
    """The SFT model of that kind as it is exported, or the given one; who changes it takes a copy."""
    return run.given_sft or load_over(
        str(done[name].path / "model"), run.base, run.recipe.model, vocab_size=len(run.tokenizer)
    )


# ---- what a stage leaves behind


def finish(run: PreparedRun, bench: Workbench, model: LanguageModel, session: Session) -> Figures:
    """Measure the kept step (and the last, where it is another) on test items, and export the kept one."""
    counters = session.state.counters
    kept = int(counters["kept_step"])
    figures: Figures = {"kept_step": kept, "steps": session.total}
    figures |= {key: counters[key] for key in ("flops", "selection_flops")}
    figures["score"] = counters["kept_score"] if math.isfinite(counters["kept_score"]) else None
    if session.harm:
        bench.console.warn(f"{bench.name}: {session.harm}")
    if kept != session.total:
        figures["last"] = measure(run, bench, model, "last")
        try:
            checkpoint = bench.stage.checkpoint(kept)
        except RecordError as error:  # later ones cannot stand in for it, so a damaged one costs the stage
            reason = str(error).partition(";")[0]
            again = f"remove {bench.stage.path} to train that stage again"
            raise RecordError(f"{reason}; it holds the kept step: {again}") from error
        load_weights(model, checkpoint)
    figures |= measure(run, bench, model)
    if parallel.is_first():
        for name, rows in (("metrics", bench.stage.metrics()), ("rollouts", bench.stage.rollouts())):
            write_atomic(bench.stage.path / f"{name}.jsonl", "".join(canonical_json(row) + "\n" for row in rows))
    export(run, bench, model, figures)
    return figures


def export(run: PreparedRun, bench: Workbench, model: LanguageModel, figures: Figures) -> None:
    """Publish a model, with a card that tells its figures, in the stage's folder `model`."""
    card = model_card(run.recipe, bench.name, figures)
    write = partial(export_model, model=model, tokenizer=run.tokenizer, stop_ids=run.stops, card=card)
    with model.gathered_to_save():
        bench.attempt.publish("model", write)


def measure(run: PreparedRun, bench: Workbench, model: LanguageModel, which: str = "kept") -> Figures:
    """Held-out NLL and test figures of one model, as far as there is anything to measure them on.

    What is no arm by itself, such as a length of longer SFT that may not be chosen, answers no test items.
    """
    figures: Figures = {}
    if run.data.held_out:
        figures["held_out_nll"] = answer_nll(model, run.data.held_out, micro_tokens=run.recipe.sft.micro_tokens)
    if run.test_items and KINDS[bench.stage.identity["kind"]].label:
        figures |= publish_answers(bench.attempt, answers_of(run, model), which)
    return figures


def answers_of(
    run: PreparedRun, model: LanguageModel, decode: Callable[..., Generated] = generate
) -> dict[str, list[Verdict]]:
    """A model's answers to the test items, greedy and sampled."""
    ways = {"greedy": None, "sampled": run.recipe.eval.samples}
    return answer_in_ways(model, run.tokenizer, run.test_items, run.recipe, ways, stops=run.stops, decode=decode)


def publish_answers(attempt: Attempt, answers: Mapping[str, list[Verdict]], which: str = "kept") -> Figures:
    """Figures of answers by decoding; the answers go to eval/<which>-<decoding>/samples.jsonl."""
    figures: Figures = {}
    for decoding, verdicts in answers.items():
        for group, estimate in accuracy_by_group(verdicts).items():
            figures.setdefault("test", {}).setdefault(group, {})[decoding] = estimate._asdict()
        figures[f"{decoding}_ended"] = mean(end for verdict in verdicts for end in verdict.ended)
        figures[f"{decoding}_tokens"] = mean(count for verdict in verdicts for count in verdict.tokens)
        attempt.publish(f"eval/{which}-{decoding}", partial(_write_verdicts, verdicts))
    return figures


def _write_verdicts(verdicts: Sequence[Verdict], folder: Path) -> None:
    """One JSON line an item, in the order of the items."""
    (folder / "samples.jsonl").write_text("".join(canonical_json(vars(v)) + "\n" for v in verdicts))
