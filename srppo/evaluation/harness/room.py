"""Whether prompts fit the model's context: lm-eval cuts them without a word, or fails at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from srppo.errors import DataError
from srppo.evaluation.harness.model import HarnessModel
from srppo.evaluation.harness.tasks import Loaded

Build = Callable[[], list[Any]]  # the requests of a task as it is configured now


def too_long(
    loaded: Loaded,
    instances: list[Any],
    model: HarnessModel,
    build: Build,
    score_rest: bool,
    warn: Callable[[str], None],
) -> dict[int, str]:
    """Items whose request exceeds the context, with the reason. Raises DataError for them unless the rest is scored."""
    found, cut = _beyond(instances, model)
    if cut:
        warn(f"task {loaded.name}: {cut} of {len(instances)} prompts exceed the context and lose their beginning")
    if found and not score_rest:
        ways = [*_shorter(instances, model), *_fewer_shots(loaded, model, build)]
        ways += ["--score-rest to score the others and list these"]
        doc, reason = min(found.items())
        raise DataError(
            f"task {loaded.name}: {len(found)} prompts do not fit, the first ({doc}): {reason}; "
            f"pass {', or '.join(ways)}"
        )
    return found


def _beyond(instances: list[Any], model: HarnessModel) -> tuple[dict[int, str], int]:
    """(reason by item that does not fit, number of contexts that lose their beginning)."""
    found, cut = dict[int, str](), 0
    model.encode_all([instance.args[0] for instance in instances if instance.request_type == "generate_until"])
    for instance in instances:
        if instance.request_type == "generate_until":
            asked = model.decoding(instance.args[1]).max_new_tokens
            prompt = len(model.tok_encode(instance.args[0]))
            if prompt + asked > model.context:
                found[instance.doc_id] = f"{prompt} prompt and {asked} new tokens exceed the context of {model.context}"
        elif instance.request_type == "loglikelihood" and instance.args[0]:
            context, continuation = model._encode_pair(*instance.args[:2])
            if not continuation or len(continuation) > model.context:
                found[instance.doc_id] = f"a continuation of {len(continuation)} tokens in a context of {model.context}"
            cut += len(context) + len(continuation) > model.context + 1
    return found, cut


def _shorter(instances: list[Any], model: HarnessModel) -> list[str]:
    """How many new tokens there is room for beside the longest prompt."""
    prompts = [i.args[0] for i in instances if i.request_type == "generate_until"]
    room = model.context - max((len(model.tok_encode(prompt)) for prompt in prompts), default=model.context)
    return [f"--max-new-tokens {room} or less"] if room > 0 else []


def _fewer_shots(loaded: Loaded, model: HarnessModel, build: Build) -> list[str]:
    """The most examples with which all prompts fit; where none do, how many fit without any."""
    shots = loaded.task.config.num_fewshot or 0
    fits = ""
    for fewer in range(shots - 1, -1, -1):
        loaded.task.set_config("num_fewshot", fewer)
        instances = build()
        items, beyond = len({instance.doc_id for instance in instances}), len(_beyond(instances, model)[0])
        fits = (
            f"--num-fewshot {fewer} (then {f'all {items:,}' if not beyond else f'{items - beyond:,} of {items:,}'} fit)"
        )
        if not beyond:
            break
    loaded.task.set_config("num_fewshot", shots)
    return [fits] if fits else []
