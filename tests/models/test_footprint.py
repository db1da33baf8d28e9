"""The memory of a pass is what a process that runs it needs, and the same whether all layers are followed or few."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from srppo.config import ModelConfig
from srppo.errors import ModelError
from srppo.models.blueprint import META, blueprint
from srppo.models.footprint import _followed, read_bytes, train_bytes, write_bytes
from srppo.models.heap import glibc
from srppo.models.language_model import LanguageModel
from srppo.models.loading import to_train
from srppo.models.value_model import ValueModel

SETTINGS = ({}, {"adapters": "lora"}, {"adapters": "lora", "activation_checkpointing": True}, {"precision": "bf16"})


def stored(folder: Path, layers: int, hidden: int = 64) -> Path:
    """A folder with config.json and nothing else."""
    LlamaConfig(
        vocab_size=500,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        dtype="bfloat16",
    ).save_pretrained(folder)
    return folder


def trained(folder: Path, **settings: object) -> LanguageModel:
    config = ModelConfig(base=str(folder), **settings)  # type: ignore[arg-type]
    base = blueprint(str(folder), config)
    with META:
        return to_train(base, config)


@pytest.mark.parametrize("settings", SETTINGS)
def test_few_layers_tell_what_all_take(
    settings: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = trained(stored(tmp_path, 7), **settings)
    with META:
        value = ValueModel(policy)

    def all_four() -> list[int]:
        return [
            read_bytes(policy, [20, 30], 25),
            write_bytes(policy, [10, 10], 8, on_cpu=True),
            train_bytes(policy, [20, 30], 25, gradients=False),
            train_bytes(value, [20, 30], 25, gradients=True),
        ]

    few = all_four()
    monkeypatch.setattr("srppo.models.footprint.FOLLOWED", (98, 99))
    assert few == all_four() and min(few) > 0


def test_what_is_followed_is_left_as_it_was(tmp_path: Path) -> None:
    policy = trained(stored(tmp_path, 5))
    before = {name: id(weight) for name, weight in policy.named_parameters()}
    train_bytes(policy, [9], 4, gradients=True)
    assert before == {name: id(weight) for name, weight in policy.named_parameters()}
    assert all(weight.device.type == "meta" and weight.grad is None for weight in policy.parameters())
    assert len(policy.model.model.layers) == 5 and not policy.model.model.layers[1]._forward_pre_hooks


def test_roles_of_one_backbone_are_told_apart(tmp_path: Path) -> None:
    """The base goes through no adapter, whoever had the last turn."""
    config = ModelConfig(base=str(stored(tmp_path, 2)), adapters="lora")
    base = blueprint(config.base, config)
    alone = read_bytes(base, [50], 25)
    with META:
        policy = to_train(base, config)
    adapted = read_bytes(policy, [50], 25)
    assert read_bytes(base, [50], 25) == alone < adapted == read_bytes(policy, [50], 25)


def test_recomputing_leaves_one_layer_and_the_inputs_of_all(tmp_path: Path) -> None:
    """With 6 layers more, it grows by their inputs and gradients alone: 6 x N x D x 4 bytes, and 4 bytes a weight."""
    tokens, hidden = 4096, 64
    found = [
        train_bytes(
            trained(stored(tmp_path / str(n), n, hidden), adapters="lora", activation_checkpointing=True),
            [tokens // 4] * 4,
            10,
            gradients=True,
        )
        for n in (6, 12)
    ]
    assert found[1] - found[0] == 6 * tokens * hidden * 4


def test_a_cache_is_held_while_answers_are_written(tmp_path: Path) -> None:
    """1,000 places more, in whole blocks of 64: keys and values of 2 heads of 16, in 4 layers, fp32."""
    policy = trained(stored(tmp_path, 4))
    short, long = (write_bytes(policy, [6] * 8, new, on_cpu=False) for new in (1000, 2000))
    assert long - short == 8 * 1024 * 2 * 4 * 2 * 16 * 4


def test_a_model_whose_passes_hang_on_values_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = trained(stored(tmp_path, 2))
    with pytest.raises(ModelError, match="passes of LlamaForCausalLM cannot be planned") as caught:
        _followed(policy, lambda _: torch.ones(3).nonzero().tolist() and None, None, False)  # type: ignore[func-returns-value]
    assert "\n" not in str(caught.value)


MEASURE = """
import sys
from pathlib import Path
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from srppo.config import ModelConfig
from srppo.models.language_model import LanguageModel
from srppo.models.loading import to_train
torch.set_num_threads(1)
def kib(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])
folder, adapters, recomputed = sys.argv[1], sys.argv[2], sys.argv[3] == "yes"
torch.manual_seed(0)
base = LanguageModel(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).float())
policy = to_train(base, ModelConfig(base=folder, adapters=adapters, activation_checkpointing=recomputed))
tokens, mask = torch.ones((4, 512), dtype=torch.int64), torch.ones((4, 512), dtype=torch.bool)
def run(rows):
    policy.response_logprobs(tokens[:rows], mask[:rows], 256).sum().backward()
run(1)
for weight in policy.parameters():
    weight.grad = None
before = kib("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
run(4)
print((kib("VmHWM") - before) * 1024)
"""


@pytest.mark.skipif(glibc() is None or not Path("/proc/self/clear_refs").exists(), reason="needs glibc on Linux")
@pytest.mark.parametrize(("adapters", "recomputed"), [("none", "no"), ("lora", "no"), ("lora", "yes")])
def test_a_process_needs_what_was_followed(adapters: str, recomputed: str, tmp_path: Path) -> None:
    """Where glibc maps each tensor of 128 KiB or more by itself, what a process grows by is what it holds. Smaller ones
    stay in the heap, and libraries have buffers of their own: a fifth and 8 MiB are left to those."""
    folder = stored(tmp_path, 4, hidden=128)
    environment = {**os.environ, "MALLOC_TOP_PAD_": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURE, str(folder), adapters, recomputed]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=True)
    except subprocess.CalledProcessError as error:
        raise AssertionError(error.stderr[-2000:]) from None
    measured = int(done.stdout.split()[-1])
    policy = trained(folder, adapters=adapters, activation_checkpointing=recomputed == "yes")
    planned = train_bytes(policy, [512] * 4, 1024, gradients=False)
    assert planned > 15e6 and abs(measured - planned) < 0.2 * planned + (8 << 20), (planned, measured)
