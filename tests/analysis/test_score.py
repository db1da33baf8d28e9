"""The look inside the reward: texts of tokens, sums against the reward's own path, AUC against goldens, the page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu, spearmanr
from tiny import quiet_console

from srppo.analysis.samples import load_questions, sample
from srppo.analysis.score import Scored, ScoreResult, Token, given_row, pieces, score_command, score_rows
from srppo.errors import DataError, UserError
from srppo.models.loading import load_model
from srppo.models.pair import Pair, load_pair
from srppo.report.score import ranked, report_score, scale_of, score_text
from srppo.statistics.association import auc, auc_within, over_prompts, rank_correlation

TEXTS = [" plain words", "naïve — 東京 😀👩‍👩‍👧 ok", "\n\ttabs\r\n", "  two  spaces ", "", "a\ufffdb", "<eos> in words"]


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest base with noise on its weights: an "SFT model" that differs."""
    from srppo.config import ModelConfig
    from srppo.models.loading import load_tokenizer

    folder = tmp_path_factory.mktemp("sft") / "model"
    model = load_model("embedded:xs", ModelConfig()).model
    torch.manual_seed(0)
    for weight in model.parameters():
        weight.data += 0.1 * weight.data.std() * torch.randn_like(weight)
    model.save_pretrained(folder)
    load_tokenizer("embedded:xs", ModelConfig()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pair(noisy: Path) -> Pair:
    return load_pair(sft=str(noisy), base="embedded:xs")


def test_texts_of_tokens_join_exactly(pair: Pair) -> None:
    for text in TEXTS:
        ids = pair.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        found = pieces(pair.tokenizer, ids, set())
        assert len(found) == len(ids) and "".join(found) == text


def test_a_character_of_several_bytes_goes_to_its_last_token(pair: Pair) -> None:
    ids = pair.tokenizer("é", add_special_tokens=False)["input_ids"]
    assert len(ids) == 2, "the embedded tokenizer has no piece for it"
    assert pieces(pair.tokenizer, ids, set()) == ["", "é"]
    assert "".join(pieces(pair.tokenizer, ids[:1], set())) == pair.tokenizer.decode(ids[:1]), "cut within a character"
    cut = pair.tokenizer(" and é", add_special_tokens=False)["input_ids"][:-1]
    assert pieces(pair.tokenizer, cut, set())[0] == " and", "what stands before a cut character keeps its place"
    within = pair.tokenizer(" and é and", add_special_tokens=False)["input_ids"]
    found = pieces(pair.tokenizer, within, set())
    assert (found[0], found[-1]) == (" and", " and") and "é" in found


def test_special_tokens_stand_alone(pair: Pair) -> None:
    eos = pair.tokenizer.eos_token_id
    ids = [*pair.tokenizer(" yes", add_special_tokens=False)["input_ids"], eos]
    assert pieces(pair.tokenizer, ids, {eos}) == [" ", "ye", "s", "<eos>"]


def test_a_given_response_is_scored_as_in_training(pair: Pair) -> None:
    """Token by token against log_softmax of both models' own logits, on the ids of template, answer and EOS."""
    row = given_row(pair, {"prompt": "reverse big plum", "response": "plum big", "answer": "plum big"}, "here")
    rows = [  # the longer first: batches go by length
        given_row(pair, {"prompt": "a longer prompt, so that ours is padded", "response": "and answer"}, "there"),
        row,
    ]
    _, scored = score_rows(pair, rows)
    text = "Q: reverse big plum\nA: plum big<eos>"
    ids = pair.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == [*row[0].ids, *row[1]]
    logprobs = [m.model(input_ids=ids).logits.double().log_softmax(-1)[0, :-1] for m in (pair.sft, pair.base)]
    start = len(row[0].ids)
    sft, base = (each.gather(-1, ids[0, 1:, None])[start - 1 :, 0].tolist() for each in logprobs)
    ratios = [a - b for a, b in zip(sft, base, strict=True)]
    assert [token.log_ratio for token in scored.tokens] == pytest.approx(ratios, abs=1e-4)
    assert [t.base_logprob for t in scored.tokens] == pytest.approx(base, abs=1e-4)
    assert scored.reward == pytest.approx(sum(sft) - sum(base), abs=1e-4)
    assert scored.per_token == pytest.approx(scored.reward / len(base))
    assert scored.response == " plum big" and scored.ended and scored.correct
    assert "".join(token.text for token in scored.tokens) == " plum big<eos>"


def test_an_answer_without_its_end(pair: Pair) -> None:
    whole, cut = (given_row(pair, {"prompt": "p", "response": "r", "ended": e}, "here") for e in (True, False))
    assert cut[1] == whole[1][:-1]
    scored = score_rows(pair, [whole, cut])
    assert [each.ended for each in scored] == [True, False]


def test_shares_of_the_tokens_that_carry_the_reward() -> None:
    scored = Scored(
        "p", "abc", tuple(Token(t, r, b) for t, r, b in [("a", 0.5, -1), ("b", -3.0, -17), ("c", 0.5, -2)]), True
    )
    assert scored.carriers(2) == [(1, 0.75), (0, 0.125)]
    assert [token.off_support for token in scored.tokens] == [False, True, False]
    assert scored.reward == pytest.approx(-2.0) and scored.base_logprob == pytest.approx(-20.0)


def test_auc_and_rank_correlation_against_scipy() -> None:
    generator = np.random.default_rng(3)
    score = generator.integers(0, 8, 60).astype(float)  # with ties
    right = (score + generator.normal(0, 4, 60) > 4).astype(float)
    golden = mannwhitneyu(score[right == 1], score[right == 0]).statistic / (right.sum() * (60 - right.sum()))
    assert auc(score, right) == pytest.approx(golden)
    assert rank_correlation(score, right) == pytest.approx(spearmanr(score, right).statistic)
    assert np.isnan(auc(score, np.ones(60))) and np.isnan(rank_correlation(score, np.ones(60)))


def test_auc_within_a_prompt_by_hand() -> None:
    """Prompt a: 1 of 2 pairs in order; prompt b: 1 of 1; prompt c has no wrong response. 2 of 3."""
    score, right = [3.0, 1.0, 2.0, 9.0, 8.0, 5.0], [0, 0, 1, 1, 0, 1]
    found = auc_within(score, right, ["a", "a", "a", "b", "b", "c"])
    assert found.mean == pytest.approx(2 / 3) and found.n == 2
    pooled = auc(np.array(score), np.array(right, dtype=float))
    assert pooled == pytest.approx(6 / 9), "prompts compared with each other"


def test_intervals_take_a_prompts_responses_together() -> None:
    """Copies of each response add no information: they must not narrow the interval."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=40)
    y = x + generator.normal(size=40)
    once = over_prompts(rank_correlation, list(x), list(y), range(40))
    copied = over_prompts(rank_correlation, list(x) * 5, list(y) * 5, list(range(40)) * 5)
    assert copied.n == once.n == 40
    assert copied.high - copied.low == pytest.approx(once.high - once.low, rel=0.15)
    assert np.isnan(over_prompts(rank_correlation, [1.0, 2.0], [1.0, 2.0], ["same", "same"]).low)


def test_fresh_samples_with_page_and_json(noisy: Path, tmp_path: Path) -> None:
    result = score_command(sft=str(noisy), base="embedded:xs", samples=2, limit=12, console=quiet_console())
    assert len(result.responses) == 24 and {each.group for each in result.responses} == {"demonstrated", "development"}
    assert {"reward", "length correlation"} <= result.findings.keys()
    page = report_score(result, tmp_path / "score", quiet_console(), top=2, bottom=2)
    html = page.read_text()
    assert (
        "<script" not in html
        and "http" not in html.replace("http-equiv", "")
        and str(tmp_path) not in html.split("Base:")[1]
    )
    content = json.loads((tmp_path / "score" / "scores.json").read_text())
    for row, each in zip(content["responses"], result.responses, strict=True):
        assert sum(token[1] for token in row["tokens"]) == pytest.approx(row["reward"])
        assert "".join(token[0] for token in row["tokens"] if token[0] != "<eos>") == row["response"] == each.response
    again = score_command(sft=str(noisy), base="embedded:xs", samples=2, limit=12, console=quiet_console())
    assert again.responses == result.responses, "one seed, the same samples"


def test_a_file_of_responses(noisy: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"q{i}", "response": "yes" if i % 2 else "no", "answer": "yes"} for i in range(6)]
    file.write_text("\n".join(map(json.dumps, rows)))
    result = score_command(sft=str(noisy), base="embedded:xs", file=file, console=quiet_console())
    assert [each.correct for each in result.responses] == [False, True] * 3
    assert result.findings["accuracy"].mean == pytest.approx(0.5) and result.findings["AUC"].n == 6
    assert [each.prompt for each in result.responses] == [row["prompt"] for row in rows], "in the order of the file"


def test_the_markup_survives_anything(pair: Pair, tmp_path: Path) -> None:
    row = given_row(pair, {"prompt": "<b>&", "response": "</pre><script>x</script> [bold]"}, "here")
    scored = score_rows(pair, [row])
    result = ScoreResult(tuple(scored), "sft", "base", "given")
    html = report_score(result, tmp_path / "s", quiet_console()).read_text()
    assert "<script" not in html
    one = Scored("p", "<script>", (Token("<script>", 1.0, -1.0), Token("<i>", 0.5, -1.0, special=True)), True)
    page = report_score(ScoreResult((one,), "<b>", "base", "given"), tmp_path / "t", quiet_console()).read_text()
    assert not any(tag in page for tag in ("<script", "<i>", "<b>")) and "&lt;script&gt;" in page
    spans = "".join(re.findall(r'<span class="t[^"]*" style="--a:0\.\d+|<span class="t[^"]*" style="--a:1', html))
    assert spans.count("<span") >= len(scored[0].tokens)
    text = quiet_console()
    text.print(score_text(result, scored, []))
    assert "[bold]" in text._file.getvalue().replace("·", "")  # type: ignore[union-attr]


def test_ranking_takes_each_response_once() -> None:
    def one(prompt: str, reward: float) -> Scored:
        return Scored(prompt, "r", (Token("r", reward, -1.0),), True)

    rows = [one("a", 1.0), one("a", 1.0), one("b", -2.0), one("c", 0.5)]
    best, worst = ranked(rows, 2, 2)
    assert [each.prompt for each in best] == ["a", "c"] and [each.prompt for each in worst] == ["b"]
    assert scale_of(rows) == 2.0


def test_mistakes_are_one_line(noisy: Path, tmp_path: Path, pair: Pair) -> None:
    console, models = quiet_console(), {"sft": str(noisy), "base": "embedded:xs"}
    with pytest.raises(UserError, match="both --sft and --base"):
        score_command(sft="x", console=console)
    with pytest.raises(UserError, match="both a prompt and a response"):
        score_command(**models, prompt="x", console=console)
    with pytest.raises(UserError, match="not both"):
        score_command(tmp_path, **models, console=console)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:2: response is no text"):
        score_command(**models, file=bad, console=console)
    with pytest.raises(DataError, match="context of 2048 tokens"):
        given_row(pair, {"prompt": "a", "response": "b c " * 3000}, "here")
    questions = load_questions(pair, None, 3, console)
    drawn = sample(pair, pair.sft, questions, 2, purpose="test")
    assert [len(each) for each in drawn] == [2, 2, 2]
