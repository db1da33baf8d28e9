"""The compiled norm, gate and rotation against fp64, beside torch's own fp32; and what their bits hang on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from srppo.kernels import body, native

EPS = 1e-6
INF, NAN = float("inf"), float("nan")
WIDTHS = (1, 2, 7, 16, 33, 128, 129, 1000)
needs_compiler = pytest.mark.skipif(native.load().library is None, reason=native.load().note)
pytestmark = needs_compiler


def plain_norm(x: Tensor, weight_D: Tensor) -> Tensor:
    return weight_D * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))


def plain_gate(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def plain_rotation(x_BHSD: Tensor, cos_BSD: Tensor, sin_BSD: Tensor) -> Tensor:
    first, second = x_BHSD.chunk(2, dim=-1)
    return x_BHSD * cos_BSD[:, None] + torch.cat((-second, first), dim=-1) * sin_BSD[:, None]


def fused_norm(x: Tensor, weight_D: Tensor) -> Tensor:
    return body.rms_norm(x, weight_D, EPS)


PAIRS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "norm": (fused_norm, plain_norm),
    "gate": (body.swiglu, plain_gate),
    "rotation": (body.rotate, plain_rotation),
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_inputs(name: str, rows: int, width: int, scale: float = 1.0) -> list[Tensor]:
    if name == "norm":
        return [scale * random(2, rows, width), random(width, seed=1)]
    if name == "gate":
        return [scale * random(2, rows, width), random(2, rows, width, seed=1)]
    x_BHSD = scale * random(2, rows, 3, 2 * width).transpose(1, 2)
    return [x_BHSD, random(2, rows, 2 * width, seed=1), random(2, rows, 2 * width, seed=2)]


def results(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The value and all gradients; of the angles of a rotation there are none."""
    leaves = [x.detach().to(dtype).requires_grad_((i < 2 and len(inputs) < 3) or not i) for i, x in enumerate(inputs)]
    out = function(*leaves)
    wanted = [x for x in leaves if x.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, wanted, grad.to(dtype))]


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_values_and_gradients_err_no_more_than_torch_does(name: str, width: int, scale: float) -> None:
    """Against fp64; the error of a tensor is its largest over its largest number."""
    ours, theirs = PAIRS[name]
    inputs = make_inputs(name, 70, width, scale)
    grad = random(*theirs(*inputs).shape, seed=5)
    exact = results(theirs, inputs, grad, torch.float64)
    found, known = (results(f, inputs, grad, torch.float32) for f in (ours, theirs))
    assert len(found) == (2 if name == "rotation" else 3)
    for right, mine, torchs in zip(exact, found, known, strict=True):
        size = right.abs().max()
        error, beside = ((x - right).abs().max() / size for x in (mine, torchs))
        assert mine.shape == right.shape and error <= 4 * beside + 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("width", [7, 128])
def test_a_rows_bits_hang_on_no_other_row(name: str, width: int) -> None:
    ours, _ = PAIRS[name]
    inputs = make_inputs(name, 300, width)
    grad = random(*ours(*inputs).shape, seed=5)
    whole = results(ours, inputs, grad, torch.float32)
    rows = 2 if name == "rotation" else 1
    for first, count in ((0, 1), (3, 1), (70, 130), (299, 1)):
        part = slice(first, first + count)
        cut = [x if x.dim() == 1 else x.movedim(rows if x.dim() == 4 else 1, 0)[part] for x in inputs]
        cut = [x if x.dim() == 1 else x.movedim(0, rows if x.dim() == 4 else 1).contiguous() for x in cut]
        alone = results(ours, cut, grad.narrow(rows, first, count), torch.float32)
        kept = [0, 1] if name != "gate" else [0, 1, 2]  # the gradient of a norm's weight is of all rows
        assert all(torch.equal(alone[i], whole[i].narrow(rows, first, count)) for i in kept)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", PAIRS)
def test_bits_hang_on_no_number_of_threads(name: str, threads: Callable[[int], None]) -> None:
    ours, _ = PAIRS[name]
    inputs = make_inputs(name, 999, 67)
    grad = random(*ours(*inputs).shape, seed=5)
    assert grad.numel() > body.ONE_THREAD
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(results(ours, inputs, grad, torch.float32))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("name", PAIRS)
def test_no_rows(name: str) -> None:
    ours, theirs = PAIRS[name]
    inputs = make_inputs(name, 0, 8)
    grad = torch.zeros_like(theirs(*inputs))
    for mine, right in zip(*(results(f, inputs, grad, torch.float32) for f in (ours, theirs)), strict=True):
        assert mine.shape == right.shape and torch.equal(mine, right)


SPECIAL = [0.0, -0.0, INF, -INF, NAN, 1e30, -1e30, 3e38, 1e-30, -1e-45, 80.0, -80.0, -104.0, 1000.0, -1000.0]


def same_kind(mine: Tensor, right: Tensor) -> bool:
    """Equal within rounding; infinities, NaN and the sign of what is 0 as they are."""
    exact = mine.isfinite() & right.isfinite()
    close = torch.isclose(mine, right, rtol=1e-5, atol=1e-35) | ~exact
    signs = mine.signbit() == right.signbit()
    special = torch.where(exact, torch.zeros(()), mine.nan_to_num(7, 8, 9))
    expected = torch.where(exact, torch.zeros(()), right.nan_to_num(7, 8, 9))
    return bool(close.all() and torch.equal(special, expected) and (signs | right.isnan()).all())


def test_special_numbers_in_a_gate() -> None:
    gate, up = (x.flatten() for x in torch.meshgrid(torch.tensor(SPECIAL), torch.tensor(SPECIAL), indexing="ij"))
    assert same_kind(body.swiglu(gate, up), plain_gate(gate, up))
    for value in (1.0, -2.0):
        grad = torch.full_like(gate, value)
        mine, right = (results(f, [gate, up], grad, torch.float32) for f in (body.swiglu, plain_gate))
        assert all(torch.equal(a.isnan(), b.isnan()) for a, b in zip(mine, right, strict=True))
        fine = right[1].isfinite() & (gate.abs() < 87)
        assert torch.allclose(mine[1][fine], right[1][fine], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("value", SPECIAL)
def test_special_numbers_in_a_norm(value: float) -> None:
    """In their own row, and in no other."""
    x_ND, weight_D = random(5, 37), random(37, seed=1)
    clean_ND = fused_norm(x_ND, weight_D)
    x_ND[2, 3] = value
    mine, right = (results(f, [x_ND, weight_D], random(5, 37, seed=2), torch.float32) for f in (fused_norm, plain_norm))
    theirs_overflows = value > 1e38  # in the sum for its gradient, which is 0 here
    for a, b in [*zip(mine, right, strict=True)][: 1 if theirs_overflows else 3]:
        assert torch.equal(a.isnan(), b.isnan()) and torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
    others = torch.arange(5) != 2
    assert torch.equal(mine[0][others], clean_ND[others])


def test_a_row_of_zeros_gives_zeros() -> None:
    x_ND, weight_D = torch.zeros(3, 9), random(9)
    out, d_x, d_weight = results(fused_norm, [x_ND, weight_D], random(3, 9, seed=1), torch.float32)
    assert not out.any() and not d_weight.any() and d_x.isfinite().all()


@pytest.mark.parametrize("batch", [1, 3])
def test_one_set_of_angles_serves_all_rows_of_a_batch(batch: int) -> None:
    x_BHSD, cos_BSD, sin_BSD = random(batch, 2, 5, 8), random(1, 5, 8, seed=1), random(1, 5, 8, seed=2)
    out = body.rotate(x_BHSD, cos_BSD, sin_BSD)
    assert torch.allclose(out, plain_rotation(x_BHSD, cos_BSD, sin_BSD), atol=1e-6)
    strided = random(batch, 2, 5, 16)[..., ::2]
    assert torch.allclose(body.rotate(strided, cos_BSD, sin_BSD), plain_rotation(strided, cos_BSD, sin_BSD), atol=1e-6)


@pytest.mark.parametrize("name", PAIRS)
def test_a_gradient_can_be_differentiated_again(name: str) -> None:
    ours, theirs = PAIRS[name]
    inputs = make_inputs(name, 3, 4)

    def second(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaves = [x.detach().clone().requires_grad_(len(inputs) < 3 or not i) for i, x in enumerate(inputs)]
        wanted = [x for x in leaves if x.requires_grad]
        grads = torch.autograd.grad(function(*leaves).square().sum(), wanted, create_graph=True)
        return torch.autograd.grad(sum((g.square().sum() for g in grads), torch.zeros(())), wanted)

    for mine, right in zip(second(ours), second(theirs), strict=True):
        assert torch.allclose(mine, right, rtol=1e-4, atol=1e-4 * float(right.abs().max()))


def test_what_is_not_asked_for_is_not_made() -> None:
    x, weight = random(4, 8).requires_grad_(), random(8)
    body.rms_norm(x, weight, EPS).sum().backward()
    assert x.grad is not None and weight.grad is None
    with torch.no_grad():
        assert body.rms_norm(x, weight, EPS).grad_fn is None and body.swiglu(x, x).grad_fn is None
    assert body.swiglu(weight, weight).grad_fn is None


def test_what_is_kept_for_the_gradient() -> None:
    kept: list[Tensor] = []
    x, weight = random(6, 8).requires_grad_(), random(8).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        body.swiglu(body.rms_norm(x, weight, EPS), x)
    inverse, gate = kept[2], kept[3]
    assert [t.shape for t in kept] == [(6, 8), (8,), (6,), (6, 8), (6, 8)]
    assert kept[0].data_ptr() == kept[4].data_ptr() == x.data_ptr() and gate is not inverse


def test_what_fits() -> None:
    x = random(3, 4)
    assert body.fits(x) and body.fits(torch.nn.Parameter(x)) and body.fits()
    assert not body.fits(x.double()) and not body.fits(x, x.bfloat16()) and not body.fits(x.to("meta"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not body.fits(x)
    seen: list[bool] = []
    torch.func.vmap(lambda row: (seen.append(body.fits(row)), row)[1])(x)
    assert seen == [False]
    with FakeTensorMode():
        fake = torch.empty(2, 3, 4, requires_grad=True)
        assert body.fits(fake)
        out = body.swiglu(body.rms_norm(fake, torch.empty(4), EPS), fake)
        out = body.rotate(out[:, None], torch.empty(2, 3, 4), torch.empty(2, 3, 4))
        out.sum().backward()
        assert fake.grad is not None and fake.grad.shape == (2, 3, 4)


def test_the_switch_keeps_to_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.SWITCH, "0")
    native.load.cache_clear()
    try:
        assert not body.fits(random(2, 2))
    finally:
        monkeypatch.undo()
        native.load.cache_clear()
