"""Mutants of `srppo/kernels`; the runner is tests/mutants.py."""

from __future__ import annotations

from mutant_lists import Mutant

MUTANTS = [
    Mutant(
        "kernel: log-probs rounded to bf16",
        "kernels/reference.py",
        "return logp_BTV.gather(-1, tokens_BT.unsqueeze(-1)).squeeze(-1)",
        "return logp_BTV.gather(-1, tokens_BT.unsqueeze(-1)).squeeze(-1).bfloat16().float()",
        "training/test_goldens.py::test_token_logprobs",
    ),
    Mutant(
        "kernel: logits rounded to bf16",
        "kernels/native.cpp",
        "            V z = load(column + v * LANES);\n",
        "            V z = load(column + v * LANES);\nz = (V)((I)z & -65536);\n",
        "models/test_language_model.py::test_bf16_stays_in_the_body",
    ),
    Mutant(
        "kernel: temperature ignored",
        "kernels/cpu.py",
        "1.0 / transform.temperature",
        "1.0",
        "models/test_language_model.py::test_logprobs_are_the_models_own_under_ragged_padding",
    ),
    Mutant(
        "fast kernel: leading -inf not guarded",
        "kernels/native.cpp",
        "shift = next == all(-INF) ? V{} : next;",
        "shift = next;",
        "kernels/test_kernels.py::test_leading_blocks_of_minus_infinity",
    ),
    Mutant(
        "fast kernel: earlier sums not rescaled",
        "kernels/native.cpp",
        "        sum = sum * factor;\n",
        "",
        "kernels/test_native.py::test_where_there_is_a_compiler_they_are_built_and_pass_their_check",
    ),
    Mutant(
        "fast kernel: odd last entry dropped",
        "kernels/native.cpp",
        "        if (entries % 2) add_terms",
        "        if (false) add_terms",
        "kernels/test_kernels.py::test_linear_operations_are_as_accurate_as_fp32",
    ),
    Mutant(
        "fast kernel: later hidden dimensions overwrite",
        "kernels/native.cpp",
        "for (int64_t k = 0; k < depth; k += SUM_DEPTH, add = true)",
        "for (int64_t k = 0; k < depth; k += SUM_DEPTH)",
        "kernels/test_kernels.py::test_a_head_of_real_size_has_fp32_accuracy",
    ),
    Mutant(
        "fast kernel: entropy without the move",
        "kernels/native.cpp",
        "weighted = factor * (weighted + (sum > V{} ? sum * delta : V{}));",
        "weighted = factor * weighted;",
        "kernels/test_kernels.py::test_linear_operations_are_as_accurate_as_fp32",
    ),
    Mutant(
        "fast kernel: cap before scale",
        "kernels/native.cpp",
        "        x = x * scale;\n        if (softcap != 0.0f) x = softcap * tanh_of(x / softcap);\n",
        "        if (softcap != 0.0f) x = softcap * tanh_of(x / softcap);\n        x = x * scale;\n",
        "kernels/test_kernels.py::test_transforms_in_all_combinations",
    ),
    Mutant(
        "fast kernel: slope of the cap ignored",
        "kernels/native.cpp",
        "(all(1.0f) - bent * bent) * (transform",
        "all(1.0f) * (transform",
        "kernels/test_kernels.py::test_gradients_pass_gradcheck_and_transforms",
    ),
    Mutant(
        "fast kernel: gradient of the wrong column",
        "kernels/native.cpp",
        "one_hot[token - first - c] = 1.0f",
        "one_hot[(token - first - c + 1) % WIDTH] = 1.0f",
        "kernels/test_kernels.py::test_gradients_are_as_accurate_as_fp32",
    ),
    Mutant(
        "twin: leading -inf not guarded",
        "kernels/cpu.py",
        "shift_N = next_N.masked_fill(next_N == -torch.inf, 0.0)",
        "shift_N = next_N",
        "kernels/test_kernels.py::test_leading_blocks_of_minus_infinity",
    ),
    Mutant(
        "twin: few rows not padded",
        "kernels/cpu.py",
        "    missing = FEW_ROWS - (len(x) % ROWS or ROWS)\n",
        "    missing = 0\n",
        "kernels/test_kernels.py::test_a_row_has_the_same_bits_in_every_batch",
    ),
    Mutant(
        "kernels: rows without upstream gradient take part",
        "kernels/autograd.py",
        "whole = len(kept) == len(grad_N)",
        "whole = True",
        "kernels/test_kernels.py::test_rows_without_upstream_gradient_take_no_part_in_backward",
    ),
    Mutant(
        "kernels: dW of a frozen head",
        "kernels/cpu.py",
        "torch.empty_like(weight_VD) if needs[1] else None",
        "torch.empty_like(weight_VD)",
        "kernels/test_kernels.py::test_only_what_is_asked_for_gets_a_gradient",
    ),
    Mutant(
        "kernels: an ignored row is scored",
        "kernels/checks.py",
        "tokens_N.masked_fill(ignored_N | wrong_N, IGNORED), ignored_N,",
        "tokens_N.masked_fill(wrong_N, IGNORED), torch.zeros_like(ignored_N),",
        "kernels/test_kernels.py::test_ignored_rows_give_0",
    ),
    Mutant(
        "kernels: padding columns keep their share",
        "kernels/checks.py",
        "    return Head(head.hidden_ND, head.weight_VD[:columns]",
        "    return Head(head.hidden_ND, head.weight_VD[:]",
        "kernels/test_kernels.py::test_padding_has_no_share",
    ),
    Mutant(
        "kernels: difference of rounded log-probs",
        "kernels/types.py",
        "(sft.centred_N - base.centred_N) - (sft.log_sum_N - base.log_sum_N)",
        "(sft.centred_N + sft.max_N) - sft.lse_N - (base.centred_N + base.max_N) + base.lse_N",
        "kernels/test_kernels.py::test_offsets_of_1e4_in_one_model",
    ),
]
