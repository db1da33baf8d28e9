"""The one dispatch point of the log-prob kernels: callers import from here and never name an implementation's module.

| impl        | what                                                                                     |
|-------------|------------------------------------------------------------------------------------------|
| `triton`    | fused kernels for CUDA and ROCm (and, under TRITON_INTERPRET=1, for tests on any machine) |
| `torch`     | vocabulary chunks; on x86 and other CPUs a compiled loop around oneDNN's microkernel       |
| `reference` | the definition, in plain torch; the others are tested against it and against fp64         |
| `auto`      | `triton` on a GPU, `torch` elsewhere and for fp64                                          |

Every operation accumulates in fp32 (fp64 for fp64 input). Results of `triton` and `torch` are the same bits every time,
and a row's do not depend on the other rows. Logits are softcap * tanh(raw * logit_scale / softcap) / temperature. Rows
whose token is `ignore_index` give 0 and get no gradient; with None no row is ignored, which saves a wait for the GPU.
Columns from `vocabulary` on are padding, without a share of the softmax.
"""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType
from typing import Literal, TypedDict, Unpack, get_args

import torch
from torch import Tensor

from srppo.errors import ConfigError
from srppo.kernels import divergence, reference
from srppo.kernels.autograd import LinearLogprob
from srppo.kernels.checks import checked_head, columns_of, look_at, transform_of
from srppo.kernels.divergence import ReverseKl, Teacher, reverse_kl
from srppo.kernels.reference import token_logprobs
from srppo.kernels.types import Head, LogprobDiff, Transform

Impl = Literal["auto", "triton", "torch", "reference"]
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

__all__ = [
    "Head",
    "Impl",
    "LogprobDiff",
    "ReverseKl",
    "Teacher",
    "Transform",
    "choose",
    "linear_logprob",
    "linear_logprob_diff",
    "linear_logprob_diff_parts",
    "linear_reverse_kl",
    "logprob_diff",
    "logprob_diff_parts",
    "reverse_kl",
    "token_logprobs",
]


class Options(TypedDict, total=False):
    """Keywords that every operation takes."""

    temperature: float
    logit_scale: float
    softcap: float | None
    ignore_index: int | None
    vocabulary: int | None
    impl: Impl


class LinearOptions(Options, total=False):
    """Keywords of a difference from hidden states."""

    sft_bias_V: Tensor | None
    base_bias_V: Tensor | None


def logprob_diff(sft_logits_NV: Tensor, base_logits_NV: Tensor, tokens_N: Tensor, **options: Unpack[Options]) -> Tensor:
    """log pi_sft(token) - log pi_base(token) from two logits matrices, one pass over both; N fp32, nats.

    Source: SRPPO, arXiv 2510.21090, a term of the coherent reward. Not differentiable: the reward is a constant of the
    optimisation. Options and errors are those of logprob_diff_parts.
    """
    return logprob_diff_parts(sft_logits_NV, base_logits_NV, tokens_N, **options).diff_N


def logprob_diff_parts(
    sft_logits_NV: Tensor,
    base_logits_NV: Tensor,
    tokens_N: Tensor,
    *,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = -100,
    vocabulary: int | None = None,
    impl: Impl = "auto",
) -> LogprobDiff:
    """logprob_diff with each model's log-prob and logsumexp.

    Raises ConfigError for an unknown impl, shapes or dtypes that do not fit, and DataError for tokens out of range.
    """
    if sft_logits_NV.shape != base_logits_NV.shape or sft_logits_NV.dim() != 2:
        raise ConfigError(
            f"logits of the SFT model are {tuple(sft_logits_NV.shape)}, of the base {tuple(base_logits_NV.shape)}; "
            "both must be (N, V): the same tokens over one vocabulary"
        )
    columns = columns_of(sft_logits_NV.shape[1], vocabulary)
    tokens = look_at(tokens_N, len(sft_logits_NV), columns, ignore_index)
    transform = transform_of(temperature, logit_scale, softcap)
    logits = [x_NV[:, :columns] for x_NV in (sft_logits_NV, base_logits_NV)]
    kernels = choose(impl, tokens_N.device, *logits)
    parts = kernels.logprob_diff(*logits, tokens.safe_N, transform)
    tokens.check()  # after the launch: a GPU that waits for Python to look at N tokens loses more than the pass takes
    return parts


def linear_logprob_diff(
    sft_hidden_ND: Tensor,
    sft_weight_VD: Tensor,
    base_hidden_ND: Tensor,
    base_weight_VD: Tensor,
    tokens_N: Tensor,
    **options: Unpack[LinearOptions],
) -> Tensor:
    """logprob_diff from hidden states and heads: no logits matrix is ever built; N fp32, nats.

    The two models may differ in D. One head for both (the same tensor) is read once. Not differentiable. Options and
    errors are those of linear_logprob_diff_parts.
    """
    arguments = (sft_hidden_ND, sft_weight_VD, base_hidden_ND, base_weight_VD, tokens_N)
    return linear_logprob_diff_parts(*arguments, **options).diff_N


def linear_logprob_diff_parts(
    sft_hidden_ND: Tensor,
    sft_weight_VD: Tensor,
    base_hidden_ND: Tensor,
    base_weight_VD: Tensor,
    tokens_N: Tensor,
    *,
    sft_bias_V: Tensor | None = None,
    base_bias_V: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = -100,
    vocabulary: int | None = None,
    impl: Impl = "auto",
) -> LogprobDiff:
    """linear_logprob_diff with each model's log-prob and logsumexp.

    Raises ConfigError for an unknown impl, shapes or dtypes that do not fit, and DataError for tokens out of range.
    """
    sft, base = Head(sft_hidden_ND, sft_weight_VD, sft_bias_V), Head(base_hidden_ND, base_weight_VD, base_bias_V)
    if len(sft_weight_VD) != len(base_weight_VD) or len(sft_hidden_ND) != len(base_hidden_ND):
        raise ConfigError(
            f"the SFT model has {len(sft_hidden_ND)} rows over {len(sft_weight_VD)} tokens, the base "
            f"{len(base_hidden_ND)} over {len(base_weight_VD)}; both must score the same tokens over one vocabulary"
        )
    sft, base = (checked_head(head, vocabulary) for head in (sft, base))
    tokens = look_at(tokens_N, len(sft_hidden_ND), len(sft.weight_VD), ignore_index)
    kernels = choose(impl, tokens_N.device, *sft, *base)
    transform = transform_of(temperature, logit_scale, softcap)
    kept, targets_N = tokens.kept(), tokens.safe_N.clamp(min=0)
    if kept is None:
        parts = kernels.linear_logprob_diff(sft, base, targets_N, transform)
    else:
        dense = [head._replace(hidden_ND=head.hidden_ND[kept]) for head in (sft, base)]
        parts = kernels.linear_logprob_diff(*dense, targets_N[kept], transform)
        parts = LogprobDiff(*(_scatter(part, kept, len(tokens_N)) for part in parts))
    tokens.check()
    return parts


def linear_logprob(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    tokens_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = -100,
    vocabulary: int | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Log-probs of tokens under one model, never building logits; N fp32, nats.

    Differentiable in hidden, weight and bias. Between forward and backward only N-sized statistics are kept; the
    backward pass skips rows without upstream gradient and a frozen head. A gradient of the gradient is not known: it
    counts as constant.

    Raises ConfigError for an unknown impl, shapes or dtypes that do not fit, and DataError for tokens out of range.
    """
    head = checked_head(Head(hidden_ND, weight_VD, bias_V), vocabulary)
    tokens = look_at(tokens_N, len(hidden_ND), len(head.weight_VD), ignore_index)
    kernels = choose(impl, tokens_N.device, *head)
    transform = transform_of(temperature, logit_scale, softcap)
    kept, targets_N = tokens.kept(), tokens.safe_N.clamp(min=0)
    if kept is not None:
        head, targets_N = head._replace(hidden_ND=hidden_ND[kept]), targets_N[kept]
    if kernels is reference:
        logprobs_N = reference.linear_logprob(head, targets_N, transform)
    else:
        logprobs_N = LinearLogprob.apply(*head, targets_N, transform, kernels)
    tokens.check()
    return logprobs_N if kept is None else _scatter(logprobs_N, kept, len(hidden_ND))


def linear_reverse_kl(
    policy: Head,
    sft: Head,
    base: Head,
    teacher: Teacher,
    *,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    impl: Impl = "auto",
) -> ReverseKl:
    """KL(policy || teacher) of the next token, over the whole vocabulary; its sum, and N each, fp32, nats.

    The teacher is a distribution made of the log-probs of SFT model and base. The sum is differentiable in the policy's
    hidden states, weight and bias; whatever the number of rows, at most `divergence.CHUNK_ELEMENTS` logits of a model
    exist at once. The models may differ in D. temperature is the policy's alone; logit_scale and softcap are those of
    all three. `triton` and `torch` are one implementation; `reference` builds whole matrices.

    Raises ConfigError for an unknown impl, shapes or dtypes that do not fit.
    """
    policy, sft, base = heads = [checked_head(head, None) for head in (policy, sft, base)]
    sizes = [(len(head.hidden_ND), len(head.weight_VD)) for head in heads]
    if len(set(sizes)) > 1:
        raise ConfigError(
            f"rows and vocabulary are {sizes[0]} of the policy, {sizes[1]} of the SFT model and {sizes[2]} of the "
            "base; all three must say what follows the same tokens over one vocabulary"
        )
    transforms = transform_of(temperature, logit_scale, softcap), transform_of(1.0, logit_scale, softcap)
    kernels = choose(impl, policy.hidden_ND.device, *(x for head in heads for x in head))
    compute = divergence.dense if kernels is reference else divergence.chunked
    return compute(policy, sft, base, teacher, transforms)


def _scatter(x_K: Tensor, kept_K: Tensor, count: int) -> Tensor:
    return x_K.new_zeros(count).index_copy(0, kept_K, x_K)


def choose(impl: str, device: torch.device, *tensors: Tensor | None) -> ModuleType:
    """The module of an implementation; `auto` goes by the device and the dtypes of the tensors.

    Raises ConfigError for an unknown name and where the tensors cannot be handled.
    """
    if impl not in get_args(Impl):
        raise ConfigError(f"impl is {impl!r}; allowed: {', '.join(get_args(Impl))}")
    present = [x for x in tensors if x is not None]
    devices, floats = {device, *(x.device for x in present)}, {x.dtype for x in present}
    if len(devices) > 1:
        raise ConfigError(f"the inputs lie on several devices ({', '.join(map(str, devices))}); put them on one")
    if not floats <= set(DTYPES):
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in floats))
        raise ConfigError(f"logits, hidden states and weights are {names}; allowed: bfloat16, float16, float32")
    on_gpu, double = device.type == "cuda", torch.float64 in floats
    if impl == "auto":
        impl = "triton" if on_gpu and not double and importlib.util.find_spec("triton") else "torch"
    if impl == "reference":
        return reference
    if impl == "torch":
        from srppo.kernels import cpu

        return cpu
    if not importlib.util.find_spec("triton"):
        raise ConfigError("impl is 'triton', which is not installed (it comes for Linux only); use impl='auto'")
    if double:
        raise ConfigError("impl is 'triton', whose kernels take bf16, fp16 and fp32, not fp64; use impl='auto'")
    if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(
            "impl is 'triton' and the tensors are not on a GPU; use impl='auto' (in a "
            "recipe model.kernels=auto), or TRITON_INTERPRET=1"
        )
    from srppo.kernels import triton_linear

    return triton_linear
