"""A look inside the reward: which tokens carry it, which responses it likes, and whether it is right.

    r(x, y) = sum_t [log pi_sft(y_t|x,y_<t) - log pi_base(y_t|x,y_<t)]        nats, at temperature 1

as in `training/reward.py`, unclipped and without the recipe's variants: this is what the two models say.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from srppo.analysis.samples import Question, load_questions, question_of, sample, scored_batches, turns_of
from srppo.console import Console
from srppo.data.chat import encode_demonstrations
from srppo.data.types import Demonstration
from srppo.errors import DataError, UserError
from srppo.evaluation.items import checked_item, read_rows
from srppo.models.pair import Pair, load_pair
from srppo.statistics.association import Floats, auc, auc_within, over_prompts, rank_correlation
from srppo.statistics.intervals import Estimate, item_interval
from srppo.training.reward import OFF_SUPPORT_NATS, reward_diagnostics, reward_warnings

SAMPLES = 4  # fresh ones a prompt
FEWEST = 20  # responses from which diagnostics over all of them mean something
INCOMPLETE = "\ufffd"  # how decoders write the bytes of an unfinished character


class Token(NamedTuple):
    """One token: its text ("" where it holds only part of a character), log-ratio and base log-prob in nats."""

    text: str
    log_ratio: float
    base_logprob: float
    special: bool = False

    @property
    def off_support(self) -> bool:
        """Whether the base gives it less than e^OFF_SUPPORT_NATS."""
        return self.base_logprob < OFF_SUPPORT_NATS


@dataclass(frozen=True)
class Scored:
    """A response with its tokens. Their texts, special ones aside, join to `response` exactly."""

    prompt: str
    response: str
    tokens: tuple[Token, ...]
    ended: bool
    answer: str | None = None
    correct: bool | None = None
    group: str = "all"

    @property
    def reward(self) -> float:
        """The coherent reward, nats."""
        return sum(token.log_ratio for token in self.tokens)

    @property
    def per_token(self) -> float:
        """Nats a token."""
        return self.reward / max(len(self.tokens), 1)

    @property
    def base_logprob(self) -> float:
        """log pi_base(y|x), nats."""
        return sum(token.base_logprob for token in self.tokens)

    def carriers(self, most: int = 5) -> list[tuple[int, float]]:
        """(place, share of sum |log-ratio|) of the tokens that carry the reward, the largest first."""
        total = sum(abs(token.log_ratio) for token in self.tokens) or 1.0
        order = sorted(range(len(self.tokens)), key=lambda i: -abs(self.tokens[i].log_ratio))
        return [(i, abs(self.tokens[i].log_ratio) / total) for i in order[:most]]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; a token is [text, log-ratio, base log-prob]."""
        sums = {"reward": self.reward, "per_token": self.per_token, "base_logprob": self.base_logprob}
        kept = ("prompt", "response", "ended", "answer", "correct", "group")
        tokens = [[token.text, token.log_ratio, token.base_logprob] for token in self.tokens]
        return {**{name: getattr(self, name) for name in kept}, **sums, "tokens": tokens}


@dataclass(frozen=True)
class ScoreResult:
    """Scored responses with what is known of the reward over all of them. `findings`: see `findings_of`."""

    responses: tuple[Scored, ...]
    sft: str
    base: str
    origin: str
    findings: Mapping[str, Estimate] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def score_command(
    run: Path | None = None,
    *,
    sft: str | None = None,
    base: str | None = None,
    seed: int | None = None,
    prompt: str | None = None,
    response: str | None = None,
    answer: str | None = None,
    file: Path | None = None,
    prompts: Path | None = None,
    samples: int = SAMPLES,
    limit: int | None = None,
    device: str = "cpu",
    console: Console,
) -> ScoreResult:
    """Score one response (`prompt`, `response`), those of a JSONL `file` (prompt, response, and may hold answer, group,
    ended), or `samples` fresh ones of the SFT model to each prompt of `prompts` (default: the development items)."""
    if (prompt is None) != (response is None):
        raise UserError("give both a prompt and a response, a --file of them, or neither for fresh samples")
    if sum(given is not None for given in (prompt, file, prompts)) > 1:
        raise UserError("give one of a prompt with its response, --file, or --prompts")
    pair = load_pair(run, sft=sft, base=base, seed=seed, device=device)
    if prompt is not None:
        rows = [given_row(pair, {"prompt": prompt, "response": response, "answer": answer}, "the response")]
        origin = "given on the command line"
    elif file is not None:
        rows = [given_row(pair, row, place) for place, row in read_rows(file, "--file")]
        origin = f"given in {file.name}"
    else:
        questions = load_questions(pair, prompts, limit, console)
        drawn = sample(pair, pair.sft, questions, samples, purpose="score")
        rows = [(question, ids) for question, each in zip(questions, drawn, strict=True) for ids in each]
        origin = f"sampled from the SFT model at temperature 1, {samples} a prompt"
    scored = tuple(score_rows(pair, rows))
    return ScoreResult(scored, pair.sft_name, pair.base_name, origin, findings_of(scored), tuple(_warnings(scored)))


def given_row(pair: Pair, row: Mapping[str, object], place: str) -> tuple[Question, tuple[int, ...]]:
    """A row with `prompt` and `response` as token ids, by the template as in SFT: EOS at the end, unless `ended` is
    false. Raises DataError where it cannot be encoded or does not fit the context."""
    turns, response = turns_of(row, place), row.get("response")
    if not isinstance(response, str):
        raise DataError(f"{place}: response is no text; a row holds prompt and response")
    encoded = encode_demonstrations(
        pair.tokenizer,
        [Demonstration(turns, response, place)],
        system=pair.recipe.data.system,
        max_tokens=pair.context + 1,  # one more, so that a cut shows
        max_prompt_tokens=pair.context,
        stop=pair.stops,
    )[0]
    if isinstance(encoded, str):
        raise DataError(f"{place}: {encoded}")
    if len(encoded.ids) > pair.context:
        raise DataError(f"{place}: prompt and response are longer than the models' context of {pair.context} tokens")
    prompt_ids, ids = encoded.ids[: encoded.prompt_tokens], encoded.ids[encoded.prompt_tokens :]
    if row.get("ended") is False:
        ids = ids[:-1]
    item = checked_item(row, turns[-1].content, place)
    return question_of(turns, item, row.get("group", "all"), prompt_ids), ids


def score_rows(pair: Pair, rows: Sequence[tuple[Question, tuple[int, ...]]]) -> list[Scored]:
    """Scored responses, in the order of rows."""
    special = {*pair.tokenizer.all_special_ids, *pair.stops}
    found: dict[int, Scored] = {}
    for places, _, scores in scored_batches(pair, rows):
        ratios, bases = scores.log_ratio_BT.tolist(), scores.base_logprobs_BT.tolist()
        for i, ratios_T, bases_T in zip(places, ratios, bases, strict=True):
            question, ids = rows[i]
            texts = pieces(pair.tokenizer, ids, special)
            parts = zip(texts, ratios_T, bases_T, ids, strict=False)  # columns beyond a row's length are padding
            tokens = tuple(Token(text, ratio, logprob, each in special) for text, ratio, logprob, each in parts)
            response = "".join(token.text for token in tokens if not token.special)
            ended, right = bool(ids) and ids[-1] in pair.stops, question.is_right(response)
            found[i] = Scored(question.text, response, tokens, ended, question.answer, right, question.group)
    return [found[i] for i in range(len(rows))]


def _warnings(scored: Sequence[Scored]) -> list[str]:
    """About the reward over all responses; none where they are too few."""
    if len(scored) < FEWEST:
        return []
    rows = [torch.tensor([(t.log_ratio, t.base_logprob) for t in each.tokens]).view(-1, 2) for each in scored]
    log_ratio_BT, base_BT = pad_sequence(rows, batch_first=True).unbind(dim=2)
    mask_BT = torch.arange(log_ratio_BT.shape[1]) < torch.tensor([[len(row)] for row in rows])
    return reward_warnings(reward_diagnostics(log_ratio_BT, base_BT, log_ratio_BT.sum(dim=1), mask_BT))


def findings_of(scored: Sequence[Scored]) -> dict[str, Estimate]:
    """What can be said over all responses, 95% intervals over prompts; keys are left out where there is nothing.

    `reward`, `length`: means over prompts. `length correlation`: Spearman, reward with tokens. Where answers are known:
    `accuracy`, `AUC` over all responses, `AUC within a prompt`, and `rank correlation` of reward with being right.
    """
    known = [each for each in scored if each.correct is not None]
    right = [float(bool(each.correct)) for each in known]
    lengths = [float(len(each.tokens)) for each in scored]
    found = {
        "reward": _mean(scored, [each.reward for each in scored]),
        "per token": _mean(scored, [each.per_token for each in scored]),
        "length": _mean(scored, lengths),
        "length correlation": _with_reward(rank_correlation, scored, lengths),
    }
    if known:
        found["accuracy"] = _mean(known, right, (0.0, 1.0))
        found["AUC"] = _with_reward(auc, known, right)
        found["AUC within a prompt"] = auc_within([e.reward for e in known], right, [e.prompt for e in known])
        found["rank correlation"] = _with_reward(rank_correlation, known, right)
    return {name: estimate for name, estimate in found.items() if estimate.n and math.isfinite(estimate.mean)}


def _with_reward(
    statistic: Callable[[Floats, Floats], float], scored: Sequence[Scored], values: Sequence[float]
) -> Estimate:
    prompts, limits = [each.prompt for each in scored], ((0.0, 1.0) if statistic is auc else (-1.0, 1.0))
    return over_prompts(statistic, [each.reward for each in scored], values, prompts, limits)


def _mean(scored: Sequence[Scored], values: Sequence[float], limits: tuple[float, float] | None = None) -> Estimate:
    by_prompt: dict[str, list[float]] = defaultdict(list)
    for each, value in zip(scored, values, strict=True):
        by_prompt[each.prompt].append(value)
    return item_interval([sum(own) / len(own) for own in by_prompt.values()], limits=limits)


# ---- texts of tokens


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], special: Collection[int]) -> list[str]:
    """The text of each token, such that those between special tokens join to their decoded text exactly.

    A character of several bytes may span tokens: its text goes to the token that completes it, the others have "". A
    token is decoded behind the one before it, since decoders may write the first token of a text otherwise.
    """
    texts: list[str] = []
    run: list[int] = []
    for token in ids:
        if token in special:
            texts += [*_pieces_of_run(tokenizer, run), str(tokenizer.convert_ids_to_tokens(token))]
            run = []
        else:
            run.append(token)
    return texts + _pieces_of_run(tokenizer, run)


def _pieces_of_run(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    def decode(start: int, end: int) -> str:
        return str(tokenizer.decode(list(ids[start:end]), clean_up_tokenization_spaces=False))

    texts, start, done = [""] * len(ids), 0, 0  # [start, done) is context whose text is out already
    for i in range(len(ids)):
        before, now = decode(start, done), decode(start, i + 1)
        whole = not now.endswith(INCOMPLETE) or i == len(ids) - 1
        if whole and now.startswith(before):
            texts[i] = now[len(before) :]
            start, done = done, i + 1
    if "".join(texts) != decode(0, len(ids)):  # a decoder that is not local: the text counts, not where it stands
        return [""] * (len(ids) - 1) + [decode(0, len(ids))]
    return texts
