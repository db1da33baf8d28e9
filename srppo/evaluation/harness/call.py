"""lm-eval's own `evaluate`, on requests that are built and checked already."""

from __future__ import annotations

from typing import Any

from srppo.evaluation.harness.model import HarnessModel
from srppo.evaluation.harness.preflight import Prepared
from srppo.evaluation.harness.quiet import quiet
from srppo.evaluation.harness.restate import restating


def evaluate(lm: HarnessModel, prepared: Prepared, seed: int) -> Any:
    """What lm-eval returns for one task; its bootstrap, at 15 s a metric, stays off. Raises DataError, in one line, for
    what its checkers and metrics raise."""
    from lm_eval import evaluator

    task, name = prepared.task.task, prepared.task.task.task_name

    def already_built(**_: Any) -> None:
        for instance in prepared.instances:
            instance.resps, instance.filtered_resps = [], {}
        task._instances = prepared.instances

    task.build_all_requests = already_built
    try:
        with quiet(seed), restating(prepared.task.name, vars(task.config), "scored"):
            count = max(instance.doc_id for instance in prepared.instances) + 1
            chosen = {"limit": count} if prepared.indices is None else {"samples": {name: prepared.indices}}
            return evaluator.evaluate(
                lm, {"tasks": {name: task}}, bootstrap_iters=0, apply_chat_template=prepared.templated, **chosen
            )
    finally:
        del task.build_all_requests
