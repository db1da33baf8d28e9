"""Which modules get a compiled form, and that a model with them is the same model."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import CONFIGS, make_model, ragged
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP, LlamaRMSNorm

from srppo.kernels import body, native
from srppo.models import fused, language_model
from srppo.models.language_model import LanguageModel

pytestmark = pytest.mark.skipif(native.load().library is None, reason=native.load().note)

# norms, gates and rotations of two layers
EXPECTED = {
    "llama": (5, 2, 2),
    "mistral window": (5, 2, 2),
    "qwen2 tied": (5, 2, 2),
    "qwen3": (9, 2, 2),
    "olmo2": (9, 2, 2),
    "smollm3": (5, 2, 2),
    "granite scale": (5, 2, 2),
    "gemma": (0, 0, 2),  # its norms multiply by 1 + weight, its gate is a GELU
    "phi3": (5, 0, 2),  # gate and up are one matrix
    "cohere scale": (0, 2, 0),  # its rotation is of neighbours
    "gpt neox": (0, 0, 2),  # a quarter of each head is rotated: its own code does that
}


def count(model: nn.Module) -> tuple[int, int, int]:
    kinds = Counter(type(module).__name__ for module in model.modules() if type(module).__name__.startswith("Fused"))
    ends = ("RMSNorm", "MLP", "Attention")
    return tuple(sum(n for name, n in kinds.items() if name.endswith(end)) for end in ends)  # type: ignore[return-value]


def both(name: str, monkeypatch: pytest.MonkeyPatch, attention: str = "sdpa") -> tuple[LanguageModel, LanguageModel]:
    """(with, without) compiled forms, of the same weights."""
    ours = LanguageModel(make_model(CONFIGS[name](), attention=attention))
    with monkeypatch.context() as patch:
        patch.setattr(language_model, "fuse", lambda model: None)
        theirs = LanguageModel(make_model(CONFIGS[name](), attention=attention))
    assert count(theirs.model) == (0, 0, 0)
    return ours, theirs


def logprobs_and_gradients(lm: LanguageModel) -> dict[str, Tensor]:
    tokens_BS, mask_BS, width, _ = ragged()
    lm.model.requires_grad_(True)
    out_BT = lm.response_logprobs(tokens_BS, mask_BS, width)
    (out_BT * torch.linspace(-1, 2, out_BT.numel()).view_as(out_BT)).sum().backward()
    grads = {name: x.grad for name, x in lm.model.named_parameters() if x.grad is not None}
    return {"log-probs": out_BT.detach(), **grads}


@pytest.mark.parametrize("name", EXPECTED)
def test_known_modules_are_found_and_the_model_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against fp64 the error is that of transformers' own fp32."""
    ours, theirs = both(name, monkeypatch)
    assert count(ours.model) == EXPECTED[name]
    found, beside = map(logprobs_and_gradients, (ours, theirs))
    exact = copy.deepcopy(theirs)
    exact.model.double()
    exact.model.zero_grad()
    right = logprobs_and_gradients(exact)
    assert found.keys() == beside.keys() == right.keys()
    for key, value in right.items():
        error, other = (float((x[key] - value).abs().max()) for x in (found, beside))
        assert error <= 10 * other + 1e-5 * float(value.abs().max()) + 1e-7, key


def test_other_code_is_left_alone() -> None:
    """A norm, a gate and a rotation that do something else, by the names of those that are known."""

    class ShiftedRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            shifted: Tensor = super().forward(hidden_states) + 1e-3
            return shifted

    class SwappedMLP(LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))
            return out

    class ScaledMLP(LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = super().forward(2 * x)
            return out

    class LaterMLP(LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = 2 * super().forward(x)
            return out

    config = LlamaConfig(hidden_size=8, intermediate_size=12, num_attention_heads=2)
    gelu = LlamaConfig(hidden_size=8, intermediate_size=12, num_attention_heads=2, hidden_act="gelu")
    others = nn.ModuleList(
        [ShiftedRMSNorm(8), GemmaRMSNorm(8), SwappedMLP(config), ScaledMLP(config), LaterMLP(config), LlamaMLP(gelu)]
    )
    before = [type(module) for module in others]
    fused.fuse(others)
    assert [type(module) for module in others] == before
    known = nn.ModuleList([LlamaRMSNorm(8), LlamaMLP(config)])
    fused.fuse(known)
    assert count(known) == (1, 1, 0)


def test_modules_that_are_compiled_already_stay_as_they_are() -> None:
    model = make_model(CONFIGS["llama"]())
    kinds = [type(module) for module in LanguageModel(model).model.modules()]
    assert [type(module) for module in LanguageModel(model).model.modules()] == kinds


def test_transformers_own_code_stays_as_it_is() -> None:
    rotation = modeling_llama.apply_rotary_pos_emb
    LanguageModel(make_model(CONFIGS["llama"](), attention="sdpa"))
    assert modeling_llama.apply_rotary_pos_emb is rotation
    assert modeling_llama.LlamaAttention.forward.__globals__ is vars(modeling_llama)


def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of compiled operations, as they run."""
    names: list[str] = []
    for name in ("rms_norm", "swiglu", "rotate"):
        real: Any = getattr(body, name)
        monkeypatch.setattr(body, name, lambda *a, real=real, name=name: (names.append(name), real(*a))[1])
    return names


def test_where_they_do_not_fit_the_models_own_code_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = both("llama", monkeypatch)
    tokens_BS, mask_BS, width, _ = ragged()
    names = used(monkeypatch)
    with torch.no_grad():
        for change in ({"precision": "bf16"}, {}):
            for lm in (ours, theirs):
                for key, value in change.items():
                    setattr(lm, key, value)
            same = [lm.response_logprobs(tokens_BS, mask_BS, width) for lm in (ours, theirs)]
            assert torch.equal(*same) and not names  # under autocast
            ours.model.double(), theirs.model.double()
            ours.precision = theirs.precision = "fp32"
        ours.model.float()
        ours.response_logprobs(tokens_BS, mask_BS, width)
    assert Counter(names) == {"rms_norm": 5, "swiglu": 2, "rotate": 4}


def test_copies_files_and_recomputed_activations(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ours, _ = both("llama", monkeypatch)
    found = logprobs_and_gradients(ours)
    other = ours.copy()
    assert count(other.model) == count(ours.model) and count(ours.trunk().model) == EXPECTED["llama"]  # type: ignore[attr-defined]
    other.model.zero_grad()
    other.recompute_activations()
    names = used(monkeypatch)
    again = logprobs_and_gradients(other)
    assert names.count("swiglu") == 4  # twice in each layer
    assert all(torch.equal(found[key], again[key]) for key in found)
    ours.save(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert count(loaded) == (0, 0, 0) and loaded.config.architectures == ["LlamaForCausalLM"]
    weights = loaded.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in ours.model.state_dict().items())


STEP = """
import sys
import torch
sys.path.insert(0, "tests")
import tiny
from pathlib import Path
from srppo.kernels import native
from srppo.training.optimizers import make_optimizer
from srppo.models.language_model import LanguageModel
lm = LanguageModel(tiny.tiny_llama(vocab=40))
lm.model.requires_grad_(True)
tokens = torch.randint(40, (6, 20), generator=torch.Generator().manual_seed(0))
mask = torch.arange(20) >= torch.arange(6)[:, None]
optimizer = make_optimizer("adam", list(lm.model.parameters()), 1e-3, eps=1e-5)
for _ in range(3):
    loss = -lm.response_logprobs(tokens, mask, 8).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(float(loss))
print(native.load().library is not None)
"""


def test_three_steps_with_and_without_the_compiler() -> None:
    def losses(**environment: str) -> tuple[list[float], str]:
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        root = Path(__file__).parents[2]
        done = subprocess.run([sys.executable, "-c", STEP], env=variables, cwd=root, capture_output=True, text=True)
        *numbers, compiled = done.stdout.split()
        return list(map(float, numbers)), compiled

    (ours, with_it), (theirs, without) = losses(), losses(SRPPO_COMPILED="0")
    assert (with_it, without) == ("True", "False") and len(ours) == 3 and ours[2] < ours[0]
    assert ours == pytest.approx(theirs, abs=1e-5)
