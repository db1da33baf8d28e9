"""Everything that would fail after an hour, found before the first token: requests are built, measured and checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from srppo.errors import DataError, ModelError
from srppo.evaluation.harness import ifeval
from srppo.evaluation.harness.decode import Decoding
from srppo.evaluation.harness.digest import code_of, config_of, content_of, digest_of
from srppo.evaluation.harness.model import HarnessModel
from srppo.evaluation.harness.restate import restating
from srppo.evaluation.harness.room import too_long
from srppo.evaluation.harness.tasks import Loaded
from srppo.evaluation.harness.trial import try_scoring

FEWSHOT_SEED = 1234  # lm-eval's own
MULTITURN = True  # examples under a chat template are turns of their own, as in lm-eval's own call


@dataclass(frozen=True)
class Prepared:
    """A task's requests for one tokenizer. skipped: reason by document; digest: of all that makes the score; content:
    of what the task is beside its items and the command's options; decoding: of the first request, None for scoring;
    fewshot_seed: None where no examples are drawn. system: the system message. cluster: the items' field that says
    which of them belong together.
    """

    task: Loaded
    instances: list[Any]
    indices: list[int] | None
    skipped: dict[int, str] = field(default_factory=dict)
    digest: str = ""
    templated: bool = False
    few_shot: int = 0
    fewshot_seed: int | None = None
    content: str = ""
    decoding: Decoding | None = None
    system: str | None = None
    cluster: str | None = None

    @property
    def generates(self) -> bool:
        """Whether the model writes text, so that samples of it differ."""
        return any(instance.request_type == "generate_until" for instance in self.instances)

    @property
    def sampled(self) -> bool:
        """Whether the model samples: the task says so, or the command."""
        return self.decoding is not None and self.decoding.temperature is not None


def prepare(
    loaded: Loaded,
    model: HarnessModel,
    *,
    templated: bool,
    num_fewshot: int | None,
    limit: int | None,
    seed: int,
    score_rest: bool,
    warn: Callable[[str], None],
    system: str | None = None,
    cluster: str | None = None,
) -> Prepared:
    """Build and check the requests of one task. Raises DataError, in one line, for what cannot be evaluated here."""
    task, name = loaded.task, loaded.name
    if getattr(task, "UNSAFE_CODE", False):
        raise DataError(f"task {name} runs code that a model wrote, which is not done here; leave it out")
    if getattr(task, "MULTIMODAL", False):
        raise DataError(f"task {name} needs images or sound; models here read text: leave it out")
    shots = _few_shot(loaded, num_fewshot, warn)
    model.templated = templated
    cluster = cluster or (task.config.metadata or {}).get("cluster")
    build = partial(_build, loaded, model, templated, seed, system)
    with restating(name, vars(task.config)):
        count = min(len(task.eval_docs), limit or len(task.eval_docs))
        docs = [doc for _, doc in task.doc_iterator(limit=count)]
        _check_clusters(name, docs, cluster)
        instances = build(limit=count)
        again = partial(build, limit=count)
        skipped = _unscorable(loaded, docs) | too_long(loaded, instances, model, again, score_rest, warn)
        indices = _scorable(name, count, skipped, score_rest)
        if indices is not None:
            instances = build(indices=indices)
        try_scoring(loaded, instances)
    asked = [i.args[1] for i in instances if i.request_type == "generate_until"]
    config, code = config_of(task), code_of(task)
    drawn = shots and getattr(task.fewshot_cfg, "sampler", None) != "first_n"
    return Prepared(
        loaded,
        instances,
        indices,
        skipped,
        digest=digest_of(config, code, instances, skipped, docs),
        templated=templated,
        few_shot=shots,
        fewshot_seed=FEWSHOT_SEED + seed if drawn else None,
        content=content_of(config, code, shots),
        decoding=model.decoding(asked[0]) if asked else None,
        system=system,
        cluster=cluster,
    )


def _scorable(name: str, count: int, skipped: dict[int, str], score_rest: bool) -> list[int] | None:
    """Indices of the items that are left; None where all are. Raises DataError where that was not asked for."""
    if not skipped:
        return None
    if not score_rest:
        doc, reason = min(skipped.items())
        raise DataError(
            f"task {name}: {len(skipped)} of {count} prompts cannot be scored, the first ({doc}): {reason}; "
            "pass --score-rest to score the others and list these"
        )
    if len(skipped) == count:
        raise DataError(f"task {name}: none of {count} prompts can be scored: {skipped[0]}")
    return [i for i in range(count) if i not in skipped]


def _check_clusters(name: str, docs: list[Any], cluster: str | None) -> None:
    """Every item must say which others it belongs with."""
    if cluster is None:
        return
    lacking = [i for i, doc in enumerate(docs) if doc.get(cluster) is None]
    if lacking:
        raise DataError(
            f"task {name}: {len(lacking)} of {len(docs)} items, the first {lacking[0]}, have no {cluster!r} to be "
            f"clustered by; they have {', '.join(docs[lacking[0]])}: name another with --cluster, or leave it out"
        )


def _few_shot(loaded: Loaded, asked: int | None, warn: Callable[[str], None]) -> int:
    """Set and return the number of examples, by lm-eval's rule: a task that fixes 0 keeps 0."""
    task = loaded.task
    own = task.get_config("num_fewshot")
    if asked is not None and own == 0 and asked != 0:
        warn(f"task {loaded.name} fixes zero few-shot examples: --num-fewshot {asked} is not used for it")
    shots = own if asked is None or own == 0 else asked
    task.set_config("num_fewshot", shots or 0)
    config, few = task.config, getattr(task, "fewshot_cfg", None)
    source = few is not None and (few.split is not None or few.samples is not None)
    if shots and not (source or task.has_training_docs() or task.has_validation_docs()):
        beside = "put train.jsonl beside the file of --data" if loaded.name == "gsm8k" else "give it a fewshot_split"
        raise DataError(
            f"task {loaded.name} has no examples for {shots} shots (lm-eval would take them from the test items): "
            f"pass --num-fewshot 0, or {beside}"
        )
    if shots and config.test_split is None and few is not None and few.split == config.validation_split:
        warn(f"task {loaded.name} takes its examples from the items it is tested on, without the item itself")
    return int(shots or 0)


def _build(
    loaded: Loaded,
    model: HarnessModel,
    templated: bool,
    seed: int,
    system: str | None,
    *,
    limit: int | None = None,
    indices: list[int] | None = None,
) -> list[Any]:
    loaded.task.set_fewshot_seed(FEWSHOT_SEED + seed)
    try:
        type(loaded.task).build_all_requests(
            loaded.task,
            limit=limit,
            samples=indices,
            system_instruction=system,
            apply_chat_template=templated,
            fewshot_as_multiturn=MULTITURN and templated,
            chat_template=model.apply_chat_template if templated else None,
            tokenizer_name="",
        )
    except ModelError as error:
        turns = ", or --num-fewshot 0: examples are turns of the chat" if loaded.task.config.num_fewshot else ""
        raise ModelError(f"task {loaded.name}: {error}{turns}") from None
    return list(loaded.task.instances)


def _unscorable(loaded: Loaded, docs: list[Any]) -> dict[int, str]:
    """Prompts whose checker lacks something here."""
    absent = ifeval.missing() if loaded.ifeval else []
    reasons = {i: ifeval.reason_not_scored(doc, absent) for i, doc in enumerate(docs)} if absent else {}
    return {i: reason for i, reason in reasons.items() if reason}
