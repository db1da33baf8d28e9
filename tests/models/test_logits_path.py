"""Models whose head is not a plain linear layer: whole logits, the same results, and a word about it, once."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_llama
from transformers import LlamaForCausalLM
from worlds import World, make_world

import srppo.models.language_model
from srppo.console import Console
from srppo.errors import ModelError
from srppo.models.language_model import Head, LanguageModel, ValueModel
from srppo.stages.run import Pipeline, run_train


def run(world: World, folder: Path) -> tuple[list[dict[str, Any]], str]:
    """(metrics of PPO's steps, what was printed)."""
    log = io.StringIO()
    pipeline = Pipeline(world.recipe(), folder, Console(plain=True, file=log))
    run_train(pipeline, baselines=False)
    (ppo,) = [stage for stage in pipeline.run.stages() if stage.identity["kind"] == "ppo"]
    return [{k: v for k, v in row.items() if k != "timing"} for row in ppo.metrics()], log.getvalue()


def test_it_trains_alike_and_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(tmp_path / "world")
    rows, log = run(world, tmp_path / "linear")
    monkeypatch.setattr(srppo.models.language_model, "_find_head", lambda model: Head(linear=False))
    others, said = run(world, tmp_path / "logits")
    assert "whole logits are built" not in log
    assert said.count("whole logits are built") == 1, "three models are loaded, one warning is enough"
    assert len(rows) == len(others) > 1
    for row, other in zip(rows, others, strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-4)


class Unnamed(LlamaForCausalLM):
    """Its body cannot be found: `base_model` is the model itself, whose output has no hidden states."""

    base_model_prefix = "nowhere"


class Projected(LlamaForCausalLM):
    """Hidden states that a projection widens on their way to the head."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.widen = torch.nn.Linear(config.hidden_size, 48, bias=False)
        self.lm_head = torch.nn.Linear(48, config.vocab_size, bias=False)

    def forward(self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, **_: Any) -> Any:
        body = self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)
        body.logits = self.lm_head(self.widen(body.last_hidden_state))
        return body


@pytest.mark.parametrize("kind", [Unnamed, Projected])
def test_a_head_that_cannot_be_reached_takes_the_models_own_logits(kind: type[LlamaForCausalLM]) -> None:
    model = LanguageModel(kind(tiny_llama(vocab=40).config))
    assert not model.head.linear
    tokens_BS = torch.arange(12).view(2, 6)
    attention_mask_BS = torch.ones_like(tokens_BS, dtype=torch.bool)
    attention_mask_BS[0, :2] = False
    logprobs_BT = model.response_logprobs(tokens_BS, attention_mask_BS, 3)
    alone_TV = model.model(input_ids=tokens_BS[:1, 2:]).logits[0, :-1].log_softmax(-1)
    assert torch.allclose(logprobs_BT[0], alone_TV.gather(1, tokens_BS[0, 3:, None])[:, 0], atol=1e-5)


def test_a_critic_needs_a_body() -> None:
    with pytest.raises(ModelError, match=r"Unnamed has no body under its head .* ppo\.advantage=rloo"):
        ValueModel(LanguageModel(Unnamed(tiny_llama().config)))
