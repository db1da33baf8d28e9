"""Models and YAML tasks for the tests of the harness: a byte-level Llama, letters to write, choices to make."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from worlds import byte_llama, byte_tokenizer, save_model, write_rows

from srppo.console import Console
from srppo.evaluation.harness.checks import EvalOptions
from srppo.evaluation.harness.run import evaluate_command
from srppo.stages.arms import stages_by_arm

WORDS = ["cab", "abc", "bca", "acb", "bac", "cba", "aab", "bbc", "cca", "abb", "bcc", "caa", "aca", "bab"]


def tiny_model(folder: Path, seed: int = 0, eos_logit: float = 4.0) -> Path:
    """A model that writes a, b, c, spaces and EOS, each prompt another text."""
    model = byte_llama(seed, eos_logit=eos_logit)
    letters = byte_tokenizer().convert_tokens_to_ids(["a", "b", "c", "Ġ", "<eos>"])
    model.lm_head.weight.data[letters] += torch.randn(len(letters), 16) * 1.5
    model.get_input_embeddings().weight.data[:, 1:] *= 4
    for name, weight in model.named_parameters():
        if "_proj" in name:
            weight.data.normal_(0, 0.7)
    return save_model(folder, model)


def write_task(folder: Path, name: str, **config: Any) -> Path:
    """A YAML task over a jsonl file of words beside it; `config` is merged over a generation task."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"q": f"Name {word}", "a": "c" if i % 2 else "a", "label": i % 3, "text": f"{word} a b"}
        for i, word in enumerate(WORDS)
    ]
    data = write_rows(folder / "rows.jsonl", rows)
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{q}}:",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": ["b"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    } | config
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({k: v for k, v in task.items() if v is not None}))
    return folder


def rolling_task(folder: Path) -> Path:
    """The words' texts, scored whole, by the name `rolling`."""
    metrics = [{"metric": name, "higher_is_better": False} for name in ("word_perplexity", "bits_per_byte")]
    texts = {"doc_to_target": "{{text}}", "doc_to_text": "", "metric_list": metrics}
    return write_task(folder, "rolling", output_type="loglikelihood_rolling", generation_kwargs=None, **texts)


def choice_task(folder: Path, name: str = "pick", **config: Any) -> Path:
    """The same items as a choice of three letters, of one to three tokens."""
    return write_task(
        folder,
        name,
        **{
            "output_type": "multiple_choice",
            "generation_kwargs": None,
            "doc_to_target": "label",
            "doc_to_choice": ["a", "bb", "c ca"],
            "metric_list": [
                {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
            ],
        }
        | config,
    )


def evaluate(model: Path | str | None, out: Path, *tasks: str, **options: Any) -> tuple[list[Path], str]:
    """(result folders, all that was said)."""
    said = io.StringIO()
    options = {"out": out, "console": Console(plain=True, file=said), "arms": stages_by_arm} | options
    asked = EvalOptions(**{name: options.pop(name) for name in [*options] if hasattr(EvalOptions, name)})
    paths = evaluate_command(None if model is None else str(model), asked, **{"tasks": tasks, **options})
    return paths, said.getvalue()


def summary(path: Path) -> dict[str, Any]:
    return json.loads((path / "summary.json").read_text())


def samples(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    return pq.read_table(path / "samples.parquet").to_pylist()


def reference(model: Path, include: Path, task: str, **options: Any) -> dict[str, Any]:
    """What lm-eval says through its own model class and its own command."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lm = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
        tokenizer=AutoTokenizer.from_pretrained(model),
        batch_size=5,
    )
    manager = TaskManager(include_path=str(include), include_defaults=False)
    return simple_evaluate(lm, tasks=[task], task_manager=manager, bootstrap_iters=0, **options)
