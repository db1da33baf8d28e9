"""The tables of `srppo plan`: memory by part and phase, what to change where it does not fit, disk and time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from srppo.console import duration
from srppo.report.table import Row, Table

if TYPE_CHECKING:
    from srppo.stages.memory_plan import Advice, MemoryPlan, StagePlan

PARTS = ("weights", "gradients", "optimizer", "gathered", "libraries", "keys and values", "activations", "heap")


def memory_table(plan: MemoryPlan) -> Table:
    """A row a part, a column a phase, GB of 10^9 bytes."""
    columns = [(f"{stage.name} {phase}", parts) for stage in plan.stages for phase, parts in stage.phases.items()]
    shown = [part for part in PARTS if any(part in parts for _, parts in columns)]
    rows = [Row([part, *(gigabytes(parts.get(part, 0)) for _, parts in columns)]) for part in shown]
    rows.append(Row(["together", *(gigabytes(sum(parts.values())) for _, parts in columns)], "own"))
    rows.append(Row(["logits", *("never" for _ in columns)]))
    lengths, counts = plan.lengths, plan.counts
    longest = lengths.longest_prompt
    source = "as the data are" if lengths.counted else f"assumed, on average {lengths.prompts[0]}"
    many = f", in each of {plan.processes} processes" if plan.processes > 1 else ""
    return Table.of(
        f"Memory on {plan.device}{many}, GB",
        ["", *(head for head, _ in columns)],
        rows,
        [
            f"{counts['weights'] / 1e6:,.1f}M weights, of which or beside which {counts['trained'] / 1e6:,.1f}M are "
            "trained a role. Largest passes: " + "; ".join(f"{s.name} {s.passes}" for s in plan.stages) + ".",
            f"Prompts of up to {longest} tokens ({source}), answers of rollout.max_new_tokens = "
            f"{plan.recipe.rollout.max_new_tokens}: the most that can come.",
            "heap: what glibc keeps of freed memory; libraries: what they grow by. Estimates (docs/models.md)."
            if any(parts.get("heap") for _, parts in columns)
            else "",
            "gathered: weights that other processes hold parts of, and their gradients before they are added up."
            if any("gathered" in parts for _, parts in columns)
            else "",
            "Not counted: what CUDA itself takes, and what its allocator keeps. Nothing of this was measured on a GPU."
            if plan.device.startswith("cuda")
            else "Not counted: the idle process, with all modules loaded.",
        ],
    )


def verdict(plan: MemoryPlan) -> str:
    """One line: the most, where, and whether it fits."""
    stage, phase, most = plan.peak
    shared = f", {gigabytes(plan.on_device * most)} in all" if plan.on_device > 1 else ""
    said = f"{stage} {phase} takes most: {gigabytes(most)} GB{shared} of {gigabytes(plan.memory)} GB"
    return f"{said}, which fits" if plan.fits else f"{said}, which does not fit"


def advice_table(plan: MemoryPlan, advice: Advice) -> Table:
    """A row a change, with the peak that it alone would leave."""
    now = plan.peak[2]
    rows = [
        Row([f"{name} ({advice.changes[name].words})", gigabytes(peak), f"-{gigabytes(now - peak)}"])
        for name, peak in sorted(advice.bytes.items(), key=lambda pair: pair[1])
    ]
    if advice.together:
        keys = " ".join(f"--set {word}" for name in advice.together for word in name.split())
        caption = f"Fits, with {gigabytes(advice.together_bytes)} GB: {keys}"
    else:
        caption = (
            f"All of these together leave {gigabytes(advice.together_bytes)} GB: take a smaller model, or a device "
        )
        caption += "with more memory"
        caption += "." if plan.on_device > 1 else ", or more processes (--processes, model.sharding=full)."
    return Table.of("What to change", ["", "GB", "saves"], rows, [caption])


def cost_lines(plan: MemoryPlan, gflops: float | None, share: float, source: str) -> Iterator[str]:
    """Disk, operations and time, a line each. gflops: of bare matrix products, of which a run reaches `share`."""
    checkpoints = ", ".join(f"{stage.name} {gigabytes(stage.checkpoint_bytes)} GB" for stage in plan.stages)
    models = gigabytes(sum(stage.model_bytes for stage in plan.stages))
    yield (
        f"Disk: up to {gigabytes(plan.disk_bytes)} GB. A checkpoint: {checkpoints}; three of each stay, and one more "
        f"while it is written. Models: {models} GB."
    )
    for stage in plan.stages:
        yield _time(stage, gflops, share, " in each process" if plan.processes > 1 else "")
    if gflops is not None:
        yield (
            f"Time: {share:.0%} of {gflops:,.0f} GF/s ({source}), without measuring development and test items; every "
            "answer as long as it may be."
        )


def _time(stage: StagePlan, gflops: float | None, share: float, each: str) -> str:
    if stage.flops is None:
        return f"{stage.name}: operations unknown without the number of demonstrations; set data.size or sft.steps"
    seconds = "" if gflops is None else f", about {duration(stage.flops / (gflops * 1e9 * share))}"
    return f"{stage.name}: {stage.steps} steps, {stage.flops:.2e} operations{each}{seconds}"


def gigabytes(count: int) -> str:
    """Of 10^9 bytes: two to four digits."""
    return f"{count / 1e9:.2f}" if count < 1e11 else f"{count / 1e9:.0f}"
