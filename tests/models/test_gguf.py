"""GGUF files, written by the package gguf as llama.cpp's converter does, and the model that a package ships."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import worlds
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import srppo.models.gguf
from srppo.config import ModelConfig
from srppo.errors import ModelError
from srppo.models.gguf import gguf_file
from srppo.models.loading import fingerprint, load_model, load_tokenizer, resolve
from srppo.record.files import replace_folder
from srppo.stages.memory_plan import lengths_of

HEADS, KEYS = 2, 1
WORDS = [*worlds.byte_tokenizer().convert_ids_to_tokens(range(256)), "<eos>", "<pad>", "ab"]  # the last is a merge
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def llama() -> LlamaForCausalLM:
    """Widths that quantizers take: blocks of 32."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": HEADS, "num_key_value_heads": KEYS}
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS),
            max_position_embeddings=64,
            tie_word_embeddings=False,
            eos_token_id=256,
            pad_token_id=257,
            **sizes,
            **heads,
        )
    )


def pairs_together(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key matrix as llama.cpp rotates them: the two halves of a head take turns."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: LlamaForCausalLM, *, kind: str = "F32", arch: str = "llama") -> Path:
    config: Any = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEYS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(WORDS)
    writer.add_token_types([3 if word in ("<eos>", "<pad>") else 1 for word in WORDS])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(256)
    writer.add_pad_token_id(257)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    wanted = gguf.GGMLQuantizationType[kind]
    for name, weight in model.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = pairs_together(weight, HEADS if "q_proj" in name else KEYS)
        numbers, target = weight.numpy(), names.get_name(name, try_suffixes=(".weight",))
        if numbers.ndim == 1 or kind == "F32":
            writer.add_tensor(target, numbers.astype(np.float32))
        else:
            writer.add_tensor(target, gguf.quantize(numbers, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def as_read(model: LlamaForCausalLM, kind: str) -> LlamaForCausalLM:
    """With the weights that the package gguf reads of its own blocks, in the precision that they are kept in."""
    wanted = gguf.GGMLQuantizationType[kind]
    for name, weight in model.named_parameters():
        if weight.ndim == 1 or kind == "F32":
            continue
        heads = {"q": HEADS, "k": KEYS}.get(name.split(".")[-2][0]) if "self_attn" in name else None
        numbers = pairs_together(weight.data, heads) if heads else weight.data
        read = torch.from_numpy(gguf.dequantize(gguf.quantize(numbers.numpy(), wanted), wanted).copy())
        if heads:  # back again
            read = read.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(read.shape)
        weight.data = read if kind == "F16" else read.bfloat16().float()
    return model


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    srppo.models.gguf._dequantized.cache_clear()
    return tmp_path / "cache/srppo/models"


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_1"])
def test_the_weights_are_the_files(kind: str, tmp_path: Path, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = write_gguf(tmp_path / "Tiny.gguf", llama(), kind=kind)
    loaded = load_model(str(file), ModelConfig())
    assert capfd.readouterr().err == "", "no bars"
    expected = as_read(llama(), kind).state_dict()
    found = loaded.model.state_dict()
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert torch.equal(weight, expected[name]), name
    (folder,) = cache.glob("tiny-*")
    kept = {tensor.dtype for tensor in AutoModelForCausalLM.from_pretrained(folder).parameters()}
    assert kept == {{"F32": torch.float32, "F16": torch.float16}.get(kind, torch.bfloat16)}


def test_tokenizer_template_and_stop_token_are_the_files(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", llama())
    tokenizer = load_tokenizer(str(file), ModelConfig())
    assert tokenizer.encode("ab c") == [258, *(WORDS.index(word) for word in ("Ġ", "c"))]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.chat_template) == (256, 257, TEMPLATE)
    assert load_model(str(file), ModelConfig()).generation_config.eos_token_id == 256


def test_it_is_made_once_and_again_where_it_is_damaged(tmp_path: Path, cache: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", llama())
    folder = Path(resolve(str(file)))
    assert folder.parent == cache
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert Path(resolve(str(file))) == folder and (folder / "model.safetensors").stat().st_mtime_ns == before
    (folder / "model.safetensors").write_bytes(b"half")
    srppo.models.gguf._dequantized.cache_clear()  # as in the next process
    assert load_model(str(file), ModelConfig()).vocab_size == len(WORDS)
    other = shutil.copy(file, tmp_path / "copy.gguf")
    known = fingerprint(str(other), ModelConfig())
    assert fingerprint(str(file), ModelConfig()) == known
    assert fingerprint(str(write_gguf(file, llama(), kind="F16")), ModelConfig()) != known


def test_processes_that_begin_at_once_make_one_folder(tmp_path: Path, cache: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", llama())
    script = "import sys; from srppo.models.loading import resolve; print(resolve(sys.argv[1]))"
    racers = [
        subprocess.Popen([sys.executable, "-c", script, str(file)], stdout=subprocess.PIPE, text=True, env=os.environ)
        for _ in range(2)
    ]
    said = {racer.communicate(timeout=300)[0].strip() for racer in racers}
    assert [racer.returncode for racer in racers] == [0, 0]
    assert said == {str(path) for path in cache.iterdir() if path.is_dir()}


def test_what_another_process_made_meanwhile_is_taken(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock is free when the other is done: here it is as the lock is taken."""
    file = write_gguf(tmp_path / "tiny.gguf", llama())
    write = srppo.models.gguf._write

    @contextmanager
    def other(lock: Path) -> Iterator[None]:
        replace_folder(cache / lock.name.removeprefix(".").removesuffix(".lock"), "other", lambda f: write(file, f))
        yield

    monkeypatch.setattr(srppo.models.gguf, "FileLock", other)
    monkeypatch.setattr(srppo.models.gguf, "_write", lambda file, folder: pytest.fail("made twice"))
    assert load_model(str(file), ModelConfig()).vocab_size == len(WORDS)


def test_a_run_begins_from_a_file(tmp_path: Path) -> None:
    """Its bars tear nothing, prompts are counted with its tokenizer, and what is learned is a folder of its own."""
    file = write_gguf(tmp_path / "tiny.gguf", llama(), kind="Q8_0")
    (tmp_path / "world").mkdir()
    recipe = worlds.make_world(tmp_path / "world").recipe({"model.base": str(file), "ppo.steps": 1})
    assert lengths_of(recipe).counted
    outcome = worlds.run_world(recipe, tmp_path / "run")
    assert len(outcome.metrics("ppo")) == 2
    assert AutoModelForCausalLM.from_pretrained(outcome.stage("ppo") / "model").config.hidden_size == 32


def refusal(spec: str) -> str:
    with pytest.raises(ModelError) as error:
        load_model(spec, ModelConfig())
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_no_model_ends_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    assert "is no file here" in refusal(str(tmp_path / "none.gguf"))
    file = write_gguf(tmp_path / "tiny.gguf", llama())
    whole = file.read_bytes()
    for part in (b"", b"GGUF", whole[:1000], whole[: len(whole) // 2], b"x" * 5000):
        file.write_bytes(part)
        assert "is no whole GGUF file" in refusal(str(file))
    assert "cannot be read as a model: GGUF model with architecture" in refusal(
        str(write_gguf(tmp_path / "odd.gguf", llama(), arch="grandllama"))
    )
    assert not [path for path in cache.iterdir() if path.is_dir()], "nothing half made stays"
    monkeypatch.setattr(srppo.models.gguf, "NAMED", {"smollm2": ("no_such_package", "x.gguf")})
    with pytest.raises(ModelError, match=r"package no-such-package, which is not installed: pip install gguf && "):
        gguf_file("smollm2")


def test_without_a_place_for_the_cache_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", llama())
    monkeypatch.setenv("XDG_CACHE_HOME", str(file / "below a file"))
    assert "there is no place for what" in refusal(str(file))
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert "no home folder; set XDG_CACHE_HOME" in refusal(str(file))


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    """The limit on a file's size stands in for it: the file system refuses in the midst of writing."""
    file = write_gguf(tmp_path / "tiny.gguf", llama())
    script = "import resource, sys; from srppo.models.loading import resolve\n" + (
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from srppo.errors import StorageError\n"
        "try: resolve(sys.argv[1])\n"
        "except StorageError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(file)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.count("\n") == 1, done.stderr
    assert "cannot write" in done.stdout and "ulimit -f" in done.stdout
