"""Models and benches small enough to enumerate, for the tests of the trainer."""

from __future__ import annotations

import copy
import io
import itertools
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from srppo.config import Recipe, build_recipe
from srppo.console import Console
from srppo.models.language_model import LanguageModel
from srppo.record.store import Run
from srppo.training.batch import RolloutBatch
from srppo.training.loop import Workbench

VOCAB, LIMIT, EOS = 5, 3, 0  # pad = EOS on purpose: masks must come from lengths
PROMPTS = [(1, 2, 3), (4,)]  # ragged, so that one is left-padded
SEQUENCES = [
    (*body, EOS) for n in range(1, LIMIT + 1) for body in itertools.product(range(1, VOCAB), repeat=n - 1)
] + list(itertools.product(range(1, VOCAB), repeat=LIMIT))


def tiny_llama(seed: int = 0, vocab: int = VOCAB, scale: float = 0.2) -> LlamaForCausalLM:
    """One layer, width 32, untied head with weights of deviation `scale`."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    model = LlamaForCausalLM(config)
    model.lm_head.weight.data.normal_(0, scale)
    return model


def base_and_sft(distance: float = 0.4) -> tuple[LanguageModel, LanguageModel]:
    """A random base, and an "SFT" model: the base moved by noise of `distance` times each weight's deviation."""
    base = tiny_llama()
    sft = copy.deepcopy(base)
    torch.manual_seed(7)
    for weight in sft.parameters():
        weight.data += distance * weight.data.std() * torch.randn_like(weight)
    return LanguageModel(base), LanguageModel(sft)


@torch.no_grad()
def sequence_logprobs(model: LanguageModel, prompt: tuple[int, ...]) -> torch.Tensor:
    """log pi(y|x) of every possible response, fp64."""
    return each_logprob(model, prompt).sum(1)


@torch.no_grad()
def each_logprob(model: LanguageModel, prompt: tuple[int, ...]) -> torch.Tensor:
    """That of each token, 0 behind the last, fp64, through the model's own forward on unpadded prompts."""
    rows = torch.tensor([[*prompt, *y, *[EOS] * (LIMIT - len(y))] for y in SEQUENCES])
    mask = torch.tensor([[1] * len(y) + [0] * (LIMIT - len(y)) for y in SEQUENCES]).bool()
    logits = copy.deepcopy(model.model).double()(input_ids=rows).logits.log_softmax(-1)
    start = len(prompt)
    logprobs = logits[:, start - 1 : -1].gather(-1, rows[:, start:, None]).squeeze(-1)
    return logprobs.masked_fill(~mask, 0.0)


def kl(p_log: torch.Tensor, q_log: torch.Tensor) -> float:
    """KL(p || q) of two enumerated distributions, nats."""
    return float((p_log.exp() * (p_log - q_log)).sum())


class NoDevelopment:
    """Nothing to measure during training."""

    def measure(self, model: LanguageModel) -> tuple[dict[str, float], None]:
        return {}, None


class TinyTokenizer:
    """Decodes ids to their numbers."""

    def decode(self, ids: object) -> str:
        return " ".join(map(str, ids))


def tiny_recipe(**sections: dict[str, object]) -> Recipe:
    """A recipe for the enumerable world; keyword = section, merged over small defaults."""
    tree: dict[str, dict[str, object]] = {
        "rollout": {"batch": 256, "max_new_tokens": LIMIT},
        "reward": {},
        "ppo": {"steps": 2, "epochs": 2, "minibatches": 1, "lr": 4e-3, "value_lr": 1e-2, "micro_tokens": 256},
        "eval": {"every": 0},
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    return build_recipe(tree)


def quiet_console() -> Console:
    return Console(plain=True, file=io.StringIO())


class Bench:
    """A real stage in a temporary folder."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self.stage = Run.open(folder, {"recipe": recipe.model_dump(mode="json")}).stage("test", {})
        self.context = self.stage.attempt({})

    def __enter__(self) -> Workbench:
        return Workbench(self.stage, self.context.__enter__(), TinyTokenizer(), quiet_console(), "test")

    def __exit__(self, *error: object) -> None:
        self.context.__exit__(*error)


# ---- a ragged batch, by hand

LENGTHS = (4, 1, 3, 2)
MASK_BT = torch.arange(4) < torch.tensor(LENGTHS)[:, None]
ENDED_B = torch.tensor([False, True, True, True])


def ragged_logprobs(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return -torch.rand(4, 4, generator=generator).mul(3).masked_fill(~MASK_BT, 0.0)


def ragged_batch() -> RolloutBatch:
    """Prompts of one token, responses of LENGTHS."""
    attention_mask_BS = torch.cat([torch.ones(4, 1, dtype=torch.bool), MASK_BT], dim=1)
    tokens_BS = torch.ones(4, 5, dtype=torch.int64)
    old_BT = ragged_logprobs(3)
    return RolloutBatch(tokens_BS, attention_mask_BS, MASK_BT, ENDED_B, old_BT.clone(), old_BT, ragged_logprobs(5))
