"""How matrices are multiplied: as the kernels say, whatever the user has set; the user's settings are left alone."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import torch
from kernel_cases import (
    BF16,
    ROWS,
    diff_of,
    dtype_pairs,
    grads_of,
    impls,
    make_head,
    make_tokens,
    one_of,
    rng,
    same_bits,
)


@impls
@dtype_pairs
def test_autocast_and_global_precision_are_left_alone(impl: Any, pair: tuple[torch.dtype, torch.dtype]) -> None:
    """Nothing is rounded under autocast; oneDNN's mode for fp32 matrices is as before, also after an error."""

    def modes() -> tuple[str, ...]:
        return torch.get_float32_matmul_precision(), torch.backends.mkldnn.matmul.fp32_precision

    before = modes()
    sft, base = (make_head(ROWS, 64, 1000, pair, seed=seed) for seed in (1, 2))
    tokens_N, upstream_N = make_tokens(ROWS, 1000), torch.randn(ROWS, generator=rng(3))
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=BF16, enabled=enabled):
            results.append([*diff_of(sft, base, tokens_N, impl), one_of(sft, tokens_N, impl)])
            if impl != "reference":  # whose backward pass is autograd's own
                results[-1] += grads_of(sft, tokens_N, upstream_N, impl)
        assert modes() == before
    assert all(map(same_bits, *results))


@impls
def test_user_settings_do_not_reach_the_results(impl: Any) -> None:
    """fp32 products stay fp32 where the user has allowed coarser ones."""
    head, tokens_N = make_head(64, 256, 999), make_tokens(64, 999)
    leaf_ND = head.hidden_ND.clone().requires_grad_()
    before = torch.get_float32_matmul_precision()
    answers = []
    try:
        for precision in ("highest", "medium"):
            torch.set_float32_matmul_precision(precision)
            answers.append(one_of(head._replace(hidden_ND=leaf_ND), tokens_N, impl))
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(*answers)


SETTINGS = """
import importlib.util, os, warnings, torch

PARTS = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.mkldnn)
ASKED = "get_float32_matmul_precision get_default_dtype get_default_device get_num_threads get_num_interop_threads "
ASKED += "are_deterministic_algorithms_enabled is_grad_enabled initial_seed"

def settings():
    found = {f"{part}.{name}": getattr(part, name) for part in PARTS for name in dir(part)}
    found = {name: value for name, value in found.items() if isinstance(value, (bool, str, int))}
    found |= {name: getattr(torch, name)() for name in ASKED.split()}
    return found | {"filters": list(warnings.filters), "seeded": torch.get_rng_state().tolist(), **os.environ}

before = settings()
import srppo.kernels
from srppo.kernels import cpu, native
if importlib.util.find_spec("triton"):
    from srppo.kernels import triton_linear
after = settings()
names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
print([(name, before.get(name), after.get(name)) for name in names])
"""


def test_importing_the_kernels_changes_no_setting() -> None:
    done = subprocess.run([sys.executable, "-c", SETTINGS], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
