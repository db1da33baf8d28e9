"""Weights that are spread over processes give what whole ones give, and take their share of the memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sharded
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

PATIENCE_S = 600
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
SCRIPT = Path(sharded.__file__)


def make_models(folder: Path) -> None:
    for name, tied, dtype in (
        ("untied", False, torch.float32),
        ("tied", True, torch.float32),
        ("narrow", False, torch.bfloat16),
    ):
        torch.manual_seed(len(name))
        config = LlamaConfig(
            vocab_size=61,  # which two or three processes cannot divide evenly
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
        )
        LlamaForCausalLM(config).to(dtype).save_pretrained(folder / name)


def launch(folder: Path, processes: int) -> list[dict[str, Any]]:
    """What each of several processes finds."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    ran = subprocess.run(
        [*launcher, str(SCRIPT), str(folder)],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert ran.returncode == 0, ran.stderr
    return [torch.load(folder / f"found-{rank}.pt", weights_only=True) for rank in range(processes)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("sharding")
    make_models(made)
    return made
