"""One task, in this process: what every engine ends in."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from srppo.ablations.ledger import Ledger
from srppo.ablations.plan import Task
from srppo.ablations.warm import Warm
from srppo.console import Console
from srppo.environment import environment
from srppo.models.language_model import load_tokenizer
from srppo.record.store import Stage
from srppo.stages.methods import best_of_n_stage, decoded_stage, extrapolated_stage, resampled_stage, samples_stage
from srppo.stages.run import Pipeline

Execute = Callable[[Task, Ledger], None]


def execute(
    task: Task, ledger: Ledger, *, device: str = "cpu", console: Console | None = None, warm: Warm | None = None
) -> None:
    """Run the task's stage to its commit, or find it committed. Raises what the stage raises.

    warm: what the worker has made ready; it changes no result."""

    def link(stage: Stage) -> None:
        if stage.identity["kind"] in (task.kind, f"given-{task.kind}"):
            ledger.link(task, stage)

    pipeline = Pipeline(
        task.recipe,
        ledger.run.path,
        console or Console(plain=True),
        device=device,
        environment=environment(),
        needs_prompts=task.kind in ("ppo", "longer-sft"),
        shared=ledger.run,
        on_stage=link,
        tokenizer_of=warm.tokenizer if warm else load_tokenizer,
    )
    STAGES[task.kind](pipeline, task)


def _ppo(pipeline: Pipeline) -> tuple[Stage, Stage]:
    sft, path = pipeline.sft_stage()
    return sft, pipeline.ppo_stage(sft, path)


def _samples(pipeline: Pipeline) -> Stage:
    return samples_stage(pipeline, *pipeline.sft_stage())


STAGES: Mapping[str, Callable[[Pipeline, Task], object]] = {
    "base": lambda pipeline, task: pipeline.base_stage(),
    "sft": lambda pipeline, task: pipeline.sft_stage(),
    "ppo": lambda pipeline, task: _ppo(pipeline),
    "longer-sft": lambda pipeline, task: pipeline.longer_sft_stage(*_ppo(pipeline), task.share or 1.0),
    "extrapolated": lambda pipeline, task: extrapolated_stage(pipeline, *pipeline.sft_stage()),
    "decoded": lambda pipeline, task: decoded_stage(pipeline, *pipeline.sft_stage()),
    "samples": lambda pipeline, task: _samples(pipeline),
    "resampled": lambda pipeline, task: resampled_stage(pipeline, _samples(pipeline)),
    "best-of-n": lambda pipeline, task: best_of_n_stage(pipeline, _samples(pipeline)),
}
