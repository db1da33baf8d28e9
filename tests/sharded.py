"""What tests/training/test_sharding.py runs in one process, and in several by a launcher, to compare.

    python -m torch.distributed.run --standalone --nproc_per_node N tests/sharded.py find|resume FOLDER

FOLDER holds the models of CASES; what each process finds is written to FOLDER/found-<rank>.pt.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import srppo.models.narrow
from srppo.config import ModelConfig, PpoConfig, Recipe, build_recipe
from srppo.data.types import EncodedDemonstration
from srppo.models.adapters import AdaptedModel
from srppo.models.language_model import Head, LanguageModel
from srppo.models.loading import load_model, to_train
from srppo.models.memory import weight_bytes
from srppo.models.sharding import whole
from srppo.models.value_model import ValueModel
from srppo.stages.extrapolation import extrapolate, generate_decoded
from srppo.training import parallel
from srppo.training.batch import Generated, answer_nll_sum, collate, extents, micro_batches
from srppo.training.distil import add_gradient
from srppo.training.loop import TrainState, clip_gradients, parameters
from srppo.training.optimizers import make_optimizer
from srppo.training.rollout import generate
from srppo.training.scores import score_log_ratio

ROWS = [EncodedDemonstration(tuple(range(3, 3 + n)), 2) for n in (4, 9, 5)]
"""Three demonstrations: of two processes the second has one, of four the last has none."""
PASS = 9  # tokens: each row has a pass of its own
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "untied": ("untied", {}),
    "tied": ("tied", {}),
    "recomputed": ("tied", {"activation_checkpointing": True}),
    "bf16": ("narrow", {"precision": "bf16"}),
    "adapters": ("narrow", {"adapters": "lora"}),
    "logits": ("tied", {}),  # with a head that is not taken for linear
}
NLL = Callable[[list[EncodedDemonstration]], Tensor]


def config_of(folder: Path, case: str) -> ModelConfig:
    name, keys = CASES[case]
    return build_recipe({"model": {"base": str(folder / name), "sharding": "full", **keys}}).model


def models(folder: Path, case: str) -> tuple[LanguageModel, LanguageModel]:
    """(base, what is trained): spread over the processes, where there are several."""
    config = config_of(folder, case)
    base = load_model(config.base, config)
    if case == "logits":
        base.head = Head(linear=False)
    return base, to_train(base, config)


def accumulate(loss_sum: NLL, *trained: Any) -> float:
    """Add the gradient of the mean of a loss over all answer tokens to what is trained; the mean."""
    count, total = sum(row.trained for row in ROWS), 0.0
    for part in micro_batches(extents(ROWS)[0], PASS, shared=True):
        loss = loss_sum([ROWS[i] for i in part.tolist()]) / count
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    for model in trained:
        parallel.add_up_gradients(parameters(model))
    return parallel.add_up_numbers({"loss": total})["loss"]


def tensors(model: Any, *, gradients: bool = False) -> dict[str, Tensor]:
    """Whole weights by name, or the gradients of those that have any."""
    found = {name: x.grad if gradients else x.detach() for name, x in model.weights().items()}
    return {name: whole(x).clone() for name, x in found.items() if x is not None}


def bytes_of_part(weight: Tensor) -> int:
    """In the memory of this process: of all that its part is a view of."""
    part = weight.to_local() if isinstance(weight, DTensor) else weight
    return part.untyped_storage().nbytes()


def gradient_storages(model: Any) -> dict[int, int]:
    """Bytes of each piece of this process's memory in which gradients lie: FSDP2 has those of a layer in one."""
    grads = [x.grad.to_local() if isinstance(x.grad, DTensor) else x.grad for x in parameters(model)]
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in grads}


def learn(folder: Path, case: str) -> dict[str, Any]:
    """Loss, gradients and their norm, the weights after two steps of Adam, and what is written with them."""
    base, model = models(folder, case)
    frozen = [weight for name, weight in base.model.named_parameters() if ".lora_" not in name]
    held = {"frozen": frozen, "trained": parameters(model)}
    found: dict[str, Any] = {name: sum(map(bytes_of_part, weights)) for name, weights in held.items()}
    found["reckoned"] = weight_bytes(base)
    nll: NLL = lambda rows: answer_nll_sum(model, rows, 0)[0]  # noqa: E731
    found["loss"] = accumulate(nll, model)
    found["gradients"] = tensors(model, gradients=True)
    found["gradient_bytes"] = sum(gradient_storages(model).values())
    found["norm"] = clip_gradients(model, 0.1, 1)
    optimizer = make_optimizer("adamw", parameters(model), 0.01)
    optimizer.step()
    optimizer.zero_grad()
    accumulate(nll, model)
    optimizer.step()
    kept = [value for each in optimizer.state.values() for value in each.values() if value.dim()]
    found["adam_bytes"] = sum(map(bytes_of_part, kept))
    found["weights"] = tensors(model)
    found["copy"] = tensors(model.copy())
    with torch.no_grad():
        found["base"] = float(answer_nll_sum(base, ROWS, 0)[0])
    prompts = [ROWS[0].ids[:2], ROWS[1].ids, ROWS[2].ids]
    written = generate(model, prompts, stop_ids=[1], pad_id=0, max_new_tokens=6, seed=3)
    found["written"] = written.responses()
    with model.gathered_to_save():
        if parallel.is_first():
            model.save(folder / f"{case}-of-{parallel.size()}")
    return found


def criticise(folder: Path, case: str, shared: bool) -> dict[str, Any]:
    """Gradients of the critic, whose head has been moved, and of a trunk that it shares; its values after a step."""
    _, policy = models(folder, case)
    value = ValueModel(policy, shared=shared)
    value.start_at(0.5, torch.ones((1, 1), dtype=torch.bool))
    optimizer = make_optimizer("adam", parameters(value), 0.01)

    def loss(rows: list[EncodedDemonstration]) -> Tensor:
        tokens_BS, mask_BS, width = collate(rows, 0)
        hidden_ND = policy.hidden_rows(tokens_BS, mask_BS, width) if shared else None
        values_BT = value.response_values(tokens_BS, mask_BS, width, hidden_ND=hidden_ND)
        return (values_BT - 1).square().sum() if len(rows) else values_BT.sum()

    trained = (value, policy) if shared else (value,)
    accumulate(loss, *trained)
    optimizer.step()  # from here on the head is not 0, and its gradient reaches the trunk
    for model in trained:
        for weight in parameters(model):
            weight.grad = None
    found: dict[str, Any] = {"loss": accumulate(loss, *trained)}
    found["gradients"] = [tensors(model, gradients=True) for model in trained]
    layers = value.trunk.decoder.layers
    found["recomputed"] = [layer.gradient_checkpointing for layer in layers]
    return found


def compare(folder: Path, case: str) -> dict[str, Any]:
    """What is done with two or three models at once: scores, distillation, extrapolated weights and decoding."""
    base, sft = models(folder, case)
    for weight in sft.weights().values():
        weight.data.mul_(1.1)
    policy = to_train(sft, config_of(folder, case))
    tokens_BS, mask_BS, width = collate(ROWS, 0)
    batch = Generated(tokens_BS, mask_BS, mask_BS[:, -width:], torch.ones(len(ROWS), dtype=torch.bool))
    recipe = Recipe(ppo=PpoConfig(micro_tokens=PASS))
    found: dict[str, Any] = {"scores": list(score_log_ratio(sft, base, batch, micro_tokens=PASS))}
    found["kl"] = add_gradient(recipe, policy, sft, base, batch, stop_ids=[1])
    found["gradients"] = tensors(policy, gradients=True)
    with torch.no_grad():
        extrapolate(policy, sft, base, 0.5)
    found["extrapolated"] = tensors(policy)
    decode = {"stop_ids": [1], "pad_id": 0, "max_new_tokens": 4, "seed": 0}
    prompts = [row.ids[:3] for row in ROWS]
    found["decoded"] = generate_decoded(sft, prompts, base=base, config=recipe.reward, **decode).responses()
    assert parallel.size() == 1 or base._narrow is None, "the whole head stays in memory"
    if isinstance(sft, AdaptedModel):
        found["merged"] = tensors(sft.merged())
    return found


def checkpoint(folder: Path) -> None:
    """Save after two steps of Adam and a third that is not saved; the step that follows is `go_on`'s."""
    state = trained_state(folder)
    for _ in range(2):
        step(state)
    at = folder / f"saved-by-{parallel.size()}"
    if parallel.is_first():
        at.mkdir()
        state.save(at)
    else:
        state.join_save()
    parallel.wait()


def go_on(folder: Path, saved: str) -> dict[str, Any]:
    """The third step after a checkpoint: weights and what Adam keeps."""
    state = trained_state(folder)
    state.load(folder / saved)
    step(state)
    (optimizer,) = state.optimizers.values()
    kept = [{key: whole(x) for key, x in each.items()} for each in optimizer.state_dict()["state"].values()]
    return {"weights": tensors(state.models["policy"]), "adam": kept, "counters": state.counters}


def trained_state(folder: Path) -> TrainState:
    _, model = models(folder, "tied")
    return TrainState({"policy": model}, {"policy": make_optimizer("adamw", parameters(model), 0.01)}, {"steps": 0})


def step(state: TrainState) -> None:
    model, optimizer = state.models["policy"], state.optimizers["policy"]
    assert isinstance(model, LanguageModel)
    optimizer.zero_grad()
    accumulate(lambda rows: answer_nll_sum(model, rows, 0)[0], model)
    optimizer.step()
    state.counters["steps"] += 1


def find(folder: Path) -> dict[str, Any]:
    """All of the above, and every checkpoint that lies in the folder gone on from."""
    found: dict[str, Any] = {case: learn(folder, case) for case in CASES}
    for case in ("untied", "recomputed", "adapters"):
        for shared in (False, True):
            found[f"{case}, {'shared' if shared else 'own'}"] = criticise(folder, case, shared)
    for case in ("untied", "bf16", "adapters"):
        found[f"{case}, compared"] = compare(folder, case)
    checkpoint(folder)
    return found | resume(folder)


def resume(folder: Path) -> dict[str, Any]:
    """Every checkpoint that lies in the folder gone on from."""
    return {path.name: go_on(folder, path.name) for path in sorted(folder.glob("saved-by-*"))}


if __name__ == "__main__":
    torch.set_num_threads(1)
    parallel.start("cpu")
    srppo.models.narrow.WORTH = 0  # narrow weights are kept however few they are
    what, where = {"find": find, "resume": resume}[sys.argv[1]], Path(sys.argv[2])
    torch.save(what(where), where / f"found-{parallel.rank()}.pt")
