"""What PPO may be paid by: the one registry of reward kinds, and the terms of each. No torch: configuration reads it.

A new reward is one entry here. `reward.kind` is checked against the registry and explained by it, the sweep `reward`
has an arm for each kind, and whatever needs a reward of a certain form (decode-time extrapolation, resampling, the
forecast) refuses a kind by its facts.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Function = Callable[..., Any] | str
"""A function, or the dotted name of one, which is imported when it is called."""


@dataclass(frozen=True)
class RewardKind:
    """One kind of reward.

    label        its arm in the sweep `reward`
    description  in help
    terms        of the scores (`training.scores.Scores`): what each token is paid before clips and length
                 normalisation; BT fp32, nats. Masked positions may hold anything
    by_token     whether a token's term is known from its own log-probs; decode-time extrapolation needs that
    among        of (terms_BT, mask_BT, seed): what each rollout is paid of those of its batch. Such a reward is no
                 function of the response: it has no closed-form optimum and ranks no samples. None: of its own
    """

    label: str
    description: str
    terms: Function
    by_token: bool = True
    among: Function | None = None


COHERENT = "ratio"
"""The reward that the method is named by; all others are controls."""
REWARD_KINDS: dict[str, RewardKind] = {
    COHERENT: RewardKind("coherent reward", "log pi_sft - log pi_base", lambda scores: scores.log_ratio_BT),
    "zero": RewardKind("zero", "0", lambda scores: scores.sft_logprobs_BT.new_zeros(scores.sft_logprobs_BT.shape)),
    "sft": RewardKind("SFT only", "log pi_sft", lambda scores: scores.sft_logprobs_BT),
    "base": RewardKind("base only", "-log pi_base", lambda scores: -scores.base_logprobs_BT),
    "shuffled": RewardKind(
        "shuffled",
        "the ratio of another rollout of the batch",
        lambda scores: scores.log_ratio_BT,
        among="srppo.training.reward.shuffled",
    ),
}
"""By the value of `reward.kind`, in the order of the sweep `reward`."""


def described(kinds: Mapping[str, RewardKind]) -> str:
    """All kinds in one line of help."""
    return "; ".join(f"{name}: {kind.description}" for name, kind in kinds.items())


def called(function: Function) -> Callable[..., Any]:
    """The function itself, imported where it is named."""
    if callable(function):
        return function
    module, _, name = function.rpartition(".")
    return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]
