"""Everything that would fail after an hour, found before the first token: requests are built, measured and checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from srppo.errors import DataError, SrppoError
from srppo.harness import ifeval
from srppo.harness.decode import Decoding
from srppo.harness.digest import code_of, config_of, content_of, digest_of
from srppo.harness.model import HarnessModel
from srppo.harness.restate import restate
from srppo.harness.tasks import Loaded

FEWSHOT_SEED = 1234  # lm-eval's own
MULTITURN = True  # examples under a chat template are turns of their own, as in lm-eval's own call
TRIAL = "One is 1.\n\nTwo is 2."  # a response for checkers to chew on before there is a real one


@dataclass(frozen=True)
class Prepared:
    """A task's requests for one tokenizer. skipped: reason by document; digest: of all that makes the score; content:
    of what the task is beside its items and the command's options; decoding: of the first request, None for scoring;
    fewshot_seed: None where no examples are drawn.
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
) -> Prepared:
    """Build and check the requests of one task. Raises DataError, in one line, for what cannot be evaluated here."""
    task, name = loaded.task, loaded.name
    if getattr(task, "UNSAFE_CODE", False):
        raise DataError(f"task {name} runs code that a model wrote, which is not done here; leave it out")
    if getattr(task, "MULTIMODAL", False):
        raise DataError(f"task {name} needs images or sound; models here read text: leave it out")
    shots = _few_shot(loaded, num_fewshot, warn)
    model.templated = templated
    try:
        count = min(len(task.eval_docs), limit or len(task.eval_docs))
        docs = [doc for _, doc in task.doc_iterator(limit=count)]
        instances = _build(loaded, model, templated, seed, limit=count, indices=None)
        skipped = _unscorable(loaded, docs) | _too_long(loaded, instances, model, score_rest, warn)
        if not skipped:
            _try_checker(loaded, docs[0], instances)
    except SrppoError:
        raise
    except Exception as error:  # templates, columns and functions of a task may raise anything
        raise DataError(restate(name, error, vars(task.config))) from error
    if skipped and not score_rest:
        doc, reason = min(skipped.items())
        raise DataError(
            f"task {name}: {len(skipped)} of {count} prompts cannot be scored, the first ({doc}): {reason}; "
            "pass --score-rest to score the others and list these"
        )
    indices = [i for i in range(count) if i not in skipped] if skipped else None
    if indices == []:
        raise DataError(f"task {name}: none of {count} prompts can be scored: {skipped[0]}")
    if indices is not None:
        instances = _build(loaded, model, templated, seed, limit=None, indices=indices)
        _try_checker(loaded, docs[indices[0]], instances)
    asked = [i.args[1] for i in instances if i.request_type == "generate_until"]
    decoding = model.decoding(asked[0]) if asked else None
    config, code = config_of(task), code_of(task)
    digest = digest_of(config, code, instances, skipped, docs)
    drawn = shots and getattr(task.fewshot_cfg, "sampler", None) != "first_n"
    return Prepared(
        loaded,
        instances,
        indices,
        skipped,
        digest,
        templated,
        shots,
        FEWSHOT_SEED + seed if drawn else None,
        content_of(config, code, shots),
        decoding,
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
    loaded: Loaded, model: HarnessModel, templated: bool, seed: int, *, limit: int | None, indices: list[int] | None
) -> list[Any]:
    loaded.task.set_fewshot_seed(FEWSHOT_SEED + seed)
    type(loaded.task).build_all_requests(
        loaded.task,
        limit=limit,
        samples=indices,
        apply_chat_template=templated,
        fewshot_as_multiturn=MULTITURN and templated,
        chat_template=model.apply_chat_template if templated else None,
        tokenizer_name="",
    )
    return list(loaded.task.instances)


def _unscorable(loaded: Loaded, docs: list[Any]) -> dict[int, str]:
    """Prompts whose checker lacks something here."""
    absent = ifeval.missing() if loaded.ifeval else []
    reasons = {i: ifeval.reason_not_scored(doc, absent) for i, doc in enumerate(docs)} if absent else {}
    return {i: reason for i, reason in reasons.items() if reason}


def _too_long(
    loaded: Loaded, instances: list[Any], model: HarnessModel, score_rest: bool, warn: Callable[[str], None]
) -> dict[int, str]:
    """Requests beyond the model's context; lm-eval cuts a prompt without a word, or fails at the end."""
    found: dict[int, str] = {}
    longest, asked, cut = 0, 0, 0
    model.encode_all([instance.args[0] for instance in instances if instance.request_type == "generate_until"])
    for instance in instances:
        if instance.request_type == "generate_until":
            asked = model.decoding(instance.args[1]).max_new_tokens
            prompt = len(model.tok_encode(instance.args[0]))
            longest = max(longest, prompt)
            if prompt + asked > model.context:
                found[instance.doc_id] = f"{prompt} prompt and {asked} new tokens exceed the context of {model.context}"
        elif instance.request_type == "loglikelihood" and instance.args[0]:
            context, continuation = model._encode_pair(*instance.args[:2])
            if not continuation or len(continuation) > model.context:
                found[instance.doc_id] = f"a continuation of {len(continuation)} tokens in a context of {model.context}"
            cut += len(context) + len(continuation) > model.context + 1
    if cut:
        warn(f"task {loaded.name}: {cut} of {len(instances)} prompts exceed the context and lose their beginning")
    if found and not score_rest:
        room = model.context - longest
        ways = [f"--max-new-tokens {room} or less"] if asked and room > 0 else []
        ways += ["fewer --num-fewshot"] if loaded.task.config.num_fewshot else []
        ways += ["--score-rest to score the others and list these"]
        doc, reason = min(found.items())
        raise DataError(
            f"task {loaded.name}: {len(found)} prompts do not fit, the first ({doc}): {reason}; "
            f"pass {', or '.join(ways)}"
        )
    return found


def _try_checker(loaded: Loaded, doc: Any, instances: list[Any]) -> None:
    """Score an invented response of the first item: what the checker lacks comes out now."""
    task = loaded.task
    if instances[0].request_type != "generate_until":
        return
    trial = instances[0]
    trial.resps = [TRIAL] * max(trial.repeats or 1, 1)
    for ensemble in getattr(task, "_filters", []):
        ensemble.apply([trial])
    for answer in trial.filtered_resps.values():
        task.process_results(doc, [answer])
    trial.resps, trial.filtered_resps = [], {}
