"""What callers may give the log-prob kernels, and what ignored rows and padding do to the rest: nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import (
    BF16,
    INF,
    NAN,
    ROWS,
    Head,
    Logits,
    check_diff,
    check_grads,
    check_one,
    diff_of,
    dtypes,
    impls,
    make_head,
    make_tokens,
    one_of,
    same_bits,
)
from torch import Tensor

from srppo.errors import ConfigError, DataError
from srppo.kernels import (
    LogprobDiff,
    linear_logprob,
    linear_logprob_diff,
    logprob_diff,
    logprob_diff_parts,
)


class Calls(NamedTuple):
    """One small problem, and each operation on it with any argument replaced."""

    impl: Any

    def logits(self, **changes: Any) -> Any:
        return self.call(logprob_diff, changes, sft=torch.zeros(3, 5), base=torch.zeros(3, 5))

    def pair(self, **changes: Any) -> Any:
        heads = {"hidden": torch.zeros(3, 2), "weight": torch.zeros(5, 2)}
        heads |= {"base_hidden": torch.zeros(3, 4), "base_weight": torch.zeros(5, 4)}
        return self.call(linear_logprob_diff, changes, **heads)

    def one(self, **changes: Any) -> Any:
        return self.call(linear_logprob, changes, hidden=torch.zeros(3, 2), weight=torch.zeros(5, 2))

    def call(self, operation: Callable[..., Any], changes: dict[str, Any], **tensors: Tensor) -> Any:
        tensors["tokens"] = torch.tensor([0, 4, 2])
        options = {"impl": self.impl} | {name: value for name, value in changes.items() if name not in tensors}
        return operation(*(changes.get(name, x) for name, x in tensors.items()), **options)


OPERATIONS = ("logits", "pair", "one")


@impls
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("bad", [-1, -99, -101, 5, 6, 2**31, 2**40])
def test_tokens_out_of_range_are_named(impl: Any, operation: str, bad: int) -> None:
    call = getattr(Calls(impl), operation)
    for tokens_N in (torch.tensor([0, bad, 2]), torch.tensor([-100, bad, bad])):
        with pytest.raises(DataError) as error:
            call(tokens=tokens_N)
        message = str(error.value)
        assert str(bad) in message and "0..4" in message and "-100" in message and "\n" not in message
    with pytest.raises(DataError, match=r"3.*0\.\.2"):
        call(tokens=torch.tensor([0, 3, 2]), vocabulary=3)
    with pytest.raises(DataError, match="-100"):  # not the ignore_index of this call
        call(tokens=torch.tensor([0, -100, 2]), ignore_index=-1)
    call(tokens=torch.tensor([0, -1, 2]), ignore_index=-1)


@impls
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    "changes",
    [
        {"impl": "cuda"},
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"temperature": NAN},
        {"temperature": INF},
        {"logit_scale": 0.0},
        {"softcap": -30.0},
        {"softcap": 0.0},
        {"vocabulary": 0},
        {"vocabulary": 6},
        {"tokens": torch.tensor([0, 4])},
        {"tokens": torch.tensor([[0], [4], [2]])},
        {"tokens": torch.tensor([0, 4, 2], dtype=torch.int32)},
        {"tokens": torch.tensor([0.0, 4.0, 2.0])},
    ],
    ids=lambda c: "-".join(f"{k}={v.tolist() if isinstance(v, Tensor) else v}" for k, v in c.items()),
)
def test_impossible_arguments(impl: Any, operation: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        getattr(Calls(impl), operation)(**changes)
    assert "\n" not in str(error.value)
    assert next(iter(changes)) in str(error.value)


@impls
@pytest.mark.parametrize(
    ("operation", "changes"),
    [
        ("logits", {"sft": torch.zeros(3, 6)}),
        ("logits", {"base": torch.zeros(4, 5)}),
        ("logits", {"sft": torch.zeros(1, 3, 5), "base": torch.zeros(1, 3, 5)}),
        ("logits", {"sft": torch.zeros(3, 5, dtype=torch.int64)}),
        ("logits", {"base": torch.zeros(3, 5).to(torch.float8_e4m3fn)}),
        ("logits", {"base": torch.zeros(3, 5, device="meta")}),
        ("pair", {"weight": torch.zeros(6, 2)}),
        ("pair", {"base_hidden": torch.zeros(2, 4)}),
        ("pair", {"base_hidden": torch.zeros(3, 5)}),
        ("pair", {"hidden": torch.zeros(3, 2, 1)}),
        ("pair", {"sft_bias_V": torch.zeros(4)}),
        ("pair", {"base_bias_V": torch.zeros(5, 1)}),
        ("pair", {"base_weight": torch.zeros(5, 4, dtype=torch.int8)}),
        ("pair", {"base_weight": torch.zeros(5, 4, device="meta")}),
        ("one", {"hidden": torch.zeros(3, 3)}),
        ("one", {"hidden": torch.zeros(2)}),
        ("one", {"weight": torch.zeros(10)}),
        ("one", {"bias_V": torch.zeros(6)}),
        ("one", {"hidden": torch.zeros(3, 2).to(torch.float8_e4m3fn)}),
        ("one", {"weight": torch.zeros(5, 2, dtype=torch.int64)}),
        ("one", {"bias_V": torch.zeros(5, dtype=torch.int64)}),
        ("one", {"hidden": torch.zeros(3, 2, dtype=torch.complex64)}),
        ("one", {"bias_V": torch.zeros(5, device="meta")}),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(f"{k}{[*v.shape]}{v.dtype}" for k, v in x.items()),
)
def test_tensors_that_do_not_fit(impl: Any, operation: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        getattr(Calls(impl), operation)(**changes)
    assert "\n" not in str(error.value)


def test_triton_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for operation in OPERATIONS:
        with pytest.raises(ConfigError, match="triton"):
            getattr(Calls("triton"), operation)()


def test_auto_is_torch_on_a_cpu() -> None:
    sft, base = (make_head(ROWS, 24, 1000, (BF16, BF16), seed=seed) for seed in (1, 2))
    tokens_N = make_tokens(ROWS, 1000)
    logits = [head.exact().bfloat16() for head in (sft, base)]
    for results in (
        [diff_of(sft, base, tokens_N, impl) for impl in ("auto", "torch")],
        [[one_of(sft, tokens_N, impl)] for impl in ("auto", "torch")],
        [logprob_diff_parts(*logits, tokens_N, impl=impl) for impl in ("auto", "torch")],
    ):
        assert all(same_bits(*each) for each in zip(*results, strict=True))


@impls
@pytest.mark.parametrize("junk", [NAN, INF, -INF, 1e4])
@pytest.mark.parametrize("vocabulary", [1, 1000, 1015, 1024])
def test_padding_has_no_share(impl: Any, junk: float, vocabulary: int) -> None:
    """Columns or rows from `vocabulary` on, whatever they hold; with softcap too, which would lift -inf."""
    columns = 1030
    transform = {"softcap": 5.0, "temperature": 0.7}
    tokens_N = make_tokens(ROWS, vocabulary)
    clean = [make_head(ROWS, 24, vocabulary, (BF16, BF16), seed=seed) for seed in (1, 2)]
    padded = []
    for head in clean:
        weight_VD, bias_V = torch.full((columns, 24), junk, dtype=BF16), torch.full((columns,), junk, dtype=BF16)
        weight_VD[:vocabulary], bias_V[:vocabulary] = head.weight_VD, head.bias_V
        padded.append(Head(head.hidden_ND, weight_VD, bias_V))
    options = {"vocabulary": vocabulary, "impl": impl, **transform}
    check_diff(diff_of(*padded, tokens_N, **options), *clean, tokens_N, **transform)
    leaf = padded[0]._replace(weight_VD=padded[0].weight_VD.requires_grad_(), bias_V=padded[0].bias_V.requires_grad_())
    one_N = one_of(leaf, tokens_N, **options)
    check_one(one_N, clean[0], tokens_N, **transform)
    one_N.sum().backward()
    for grad in (leaf.weight_VD.grad, leaf.bias_V.grad):
        assert len(grad) == columns and not grad[vocabulary:].any()
        assert vocabulary == 1 or (grad[:vocabulary].isfinite().all() and grad[:vocabulary].any())
    logits = [Logits(head.exact().float()) for head in clean]
    full = [F.pad(x.logits_NV, (0, columns - vocabulary), value=junk) for x in logits]
    check_diff(logprob_diff_parts(*full, tokens_N, **options), *logits, tokens_N, **transform)


@impls
@dtypes
@pytest.mark.parametrize("ignored", [False, True], ids=["no rows", "all ignored"])
def test_no_rows(impl: Any, dtype: torch.dtype, ignored: bool) -> None:
    rows = 3 if ignored else 0
    tokens_N = torch.full((rows,), -100)
    head = Head(*(x.requires_grad_() for x in make_head(rows, 4, 33, (dtype, dtype))))
    logits_NV = torch.randn(rows, 33).to(dtype)
    one_N = one_of(head, tokens_N, impl)
    parts = logprob_diff_parts(logits_NV, logits_NV, tokens_N, impl=impl)
    for part_N in (*diff_of(head, head, tokens_N, impl), *parts, one_N):
        assert same_bits(part_N, torch.zeros(rows))
    one_N.sum().backward()
    for x in head:
        assert x.grad is None or same_bits(x.grad, torch.zeros_like(x))
    assert head.weight_VD.grad is not None


@impls
@dtypes
@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 7])
def test_ignored_rows_give_0(impl: Any, dtype: torch.dtype, ignore_index: int) -> None:
    """Any id may stand for "ignored", one of the vocabulary too; what such a row holds reaches nothing."""
    rows, vocabulary = 41, 301
    sft, base = (make_head(rows, 24, vocabulary, (dtype, dtype), seed=seed) for seed in (1, 2))
    tokens_N = make_tokens(rows, vocabulary)
    tokens_N[tokens_N == ignore_index] += 1
    out_N = torch.zeros(rows, dtype=torch.bool)
    out_N[[0, 5, 6, 7, 30, 40]] = True
    tokens_N[out_N] = ignore_index
    logits = [head.exact().to(dtype) for head in (sft, base)]
    for x, bad in ((sft.hidden_ND, NAN), (base.hidden_ND, INF), (logits[0], NAN), (logits[1], -INF)):
        x[out_N] = bad
    options = {"ignore_index": ignore_index, "impl": impl}
    leaves = Head(*(x.requires_grad_() for x in sft))
    one_N = one_of(leaves, tokens_N, **options)
    parts, given = diff_of(sft, base, tokens_N, **options), logprob_diff_parts(*logits, tokens_N, **options)
    for part_N in (*parts, *given, one_N):
        assert torch.equal(part_N[out_N], torch.zeros(6))
    one_N.sum().backward()
    kept = [head._replace(hidden_ND=head.hidden_ND.detach()[~out_N]) for head in (sft, base)]
    check_diff(LogprobDiff(*(x_N[~out_N] for x_N in parts)), *kept, tokens_N[~out_N])
    check_diff(
        LogprobDiff(*(x_N[~out_N] for x_N in given)), *(Logits(x_NV[~out_N]) for x_NV in logits), tokens_N[~out_N]
    )
    check_one(one_N[~out_N], kept[0], tokens_N[~out_N])
    assert not leaves.hidden_ND.grad[out_N].any()
    check_grads([x.grad for x in leaves], sft, tokens_N, torch.ones(rows), ~out_N)
