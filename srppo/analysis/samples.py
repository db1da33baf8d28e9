"""Responses with their rewards, for whatever weighs or ranks samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from srppo.analysis.optimum import Draws, Floats
from srppo.analysis.questions import Question, as_generated
from srppo.config import RewardConfig
from srppo.models.language_model import LanguageModel
from srppo.models.pair import Pair
from srppo.training.reward import rewards_before_kl
from srppo.training.scores import score_log_ratio, score_logprobs

SCORE_BATCH = 128  # rows of one forward pass, fewer where the memory has it


def rewarded(
    pair: Pair,
    questions: Sequence[Question],
    responses: Sequence[Sequence[tuple[int, ...]]],
    config: RewardConfig,
    *,
    policy: LanguageModel | None = None,
    temperature: float = 1.0,
) -> Draws:
    """Rewards by `config` of as many responses (token ids) to each question; `policy` drew them, None: pi_sft did.

    Short answers repeat: each distinct one is scored once.
    """
    rows = distinct(responses)
    values = _score(pair, policy, temperature, questions, rows, config)
    place = {row: j for j, row in enumerate(rows)}
    index_QK = np.array([[place[i, ids] for ids in each] for i, each in enumerate(responses)])
    reward_QK, log_ratio_QK, log_policy_sft_QK, length_QK, right_QK = (column[index_QK] for column in values)
    known = all(question.answer is not None for question in questions)
    return Draws(reward_QK, log_ratio_QK, length_QK, right_QK if known else None, log_policy_sft_QK)


def distinct(responses: Sequence[Sequence[tuple[int, ...]]]) -> list[tuple[int, tuple[int, ...]]]:
    """(question, response) of each distinct response, in the order they came."""
    return list(dict.fromkeys((i, ids) for i, each in enumerate(responses) for ids in each))


@torch.no_grad()
def _score(
    pair: Pair,
    policy: LanguageModel | None,
    temperature: float,
    questions: Sequence[Question],
    rows: Sequence[tuple[int, tuple[int, ...]]],
    config: RewardConfig,
) -> list[Floats]:
    """reward r', log-ratio r, log pi - log pi_sft (0 without a policy), length and rightness of each row."""
    order = sorted(range(len(rows)), key=lambda j: (len(questions[rows[j][0]].ids), len(rows[j][1])))
    columns = [np.zeros(len(rows)) for _ in range(3)]
    for start in range(0, len(rows), SCORE_BATCH):
        chunk = order[start : start + SCORE_BATCH]
        batch = as_generated(pair, [questions[rows[j][0]].ids for j in chunk], [rows[j][1] for j in chunk])
        scores = score_log_ratio(pair.sft, pair.base, batch)
        columns[0][chunk] = rewards_before_kl(config, scores, batch).sum(dim=1).double().cpu()
        columns[1][chunk] = scores.log_ratio_BT.double().sum(dim=1).cpu()
        if policy is not None:
            theirs_BT = score_logprobs(policy, batch, temperature=temperature)
            columns[2][chunk] = (theirs_BT - scores.sft_logprobs_BT).double().sum(dim=1).cpu()
    texts = pair.tokenizer.batch_decode([list(ids) for _, ids in rows], skip_special_tokens=True)
    right = [float(bool(questions[i].is_right(text))) for (i, _), text in zip(rows, texts, strict=True)]
    return [*columns, np.array([float(len(ids)) for _, ids in rows]), np.array(right)]
