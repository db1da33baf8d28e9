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
    terms        of (scores, written), a `training.scores.Scores` and a `training.reward.Written`: what each token is
                 paid before clips and length normalisation; BT fp32, nats. Masked positions may hold anything
    by_token     whether a token's term is known from its own log-probs, its id and whether it ends the response;
                 decode-time extrapolation needs that
    among        of (terms_BT, mask_BT, seed): what each rollout is paid of those of its batch. Such a reward is no
                 function of the response: it has no closed-form optimum and ranks no samples. None: of its own
    swept        whether it has a curve in the sweep `reward` unless others are asked for
    of_length    whether it pays for length alone, so that going with length is no fault of it
    """

    label: str
    description: str
    terms: Function
    by_token: bool = True
    among: Function | None = None
    swept: bool = True
    of_length: bool = False


def _constant(nats: float) -> Function:
    """The same for every token, whatever the models say."""
    return lambda scores, _: scores.log_ratio_BT.new_full(scores.log_ratio_BT.shape, nats)


def _ratio(scores: Any, _: Any) -> Any:
    """log pi_sft - log pi_base of each token, BT, nats."""
    return scores.log_ratio_BT


NATS_A_TOKEN = 0.1
"""What the two length rewards pay or take for each token; beta sets their strength."""
COHERENT = "ratio"
"""The reward that the method is named by; all others are controls."""
REWARD_KINDS: dict[str, RewardKind] = {
    COHERENT: RewardKind("coherent reward", "log pi_sft - log pi_base", _ratio),
    "zero": RewardKind("zero", "0", _constant(0.0), swept=False),
    "sft": RewardKind("sharpening (log pi_sft)", "log pi_sft", lambda scores, _: scores.sft_logprobs_BT),
    "base": RewardKind("base only", "-log pi_base", lambda scores, _: -scores.base_logprobs_BT, swept=False),
    "no-eos": RewardKind(
        "ratio without EOS",
        "the ratio of all tokens but the stop token",
        lambda scores, written: scores.log_ratio_BT.masked_fill(written.stop_BT, 0.0),
    ),
    "eos": RewardKind(
        "EOS's ratio alone",
        "the ratio of the stop token alone",
        lambda scores, written: scores.log_ratio_BT.masked_fill(~written.stop_BT, 0.0),
    ),
    "brevity": RewardKind("brevity", f"-{NATS_A_TOKEN} nats a token", _constant(-NATS_A_TOKEN), of_length=True),
    "verbosity": RewardKind(
        "verbosity", f"{NATS_A_TOKEN} nats a token", _constant(NATS_A_TOKEN), swept=False, of_length=True
    ),
    "random": RewardKind(
        "random",
        "a standard normal number that the response's tokens alone decide",
        "srppo.training.reward.random_terms",
        by_token=False,
    ),
    "shuffled": RewardKind(
        "shuffled",
        "the ratio of another rollout of the batch",
        _ratio,
        among="srppo.training.reward.shuffled",
    ),
    "by-length": RewardKind(
        "by length",
        "what a straight line over length gives of the ratio in a batch",
        _ratio,
        among="srppo.training.reward.by_length",
        swept=False,
        of_length=True,
    ),
    "beyond-length": RewardKind(
        "beyond length",
        "the ratio less that line, at its mean",
        _ratio,
        among="srppo.training.reward.beyond_length",
        swept=False,
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
