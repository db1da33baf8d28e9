"""A LoRA layer as one operation gives what PEFT's own code gives, and leaves to that code what it does not know."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from srppo.config import ModelConfig
from srppo.models import lora
from srppo.models.adapters import lora_settings
from srppo.models.backbone import Backbone
from srppo.models.narrow import NarrowLinear

WIDTH, OUT, RANK = 24, 40, 5


class Host(nn.Module):
    """A model of one linear layer."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self.head, self.device = layer, nn.Linear(1, 1), torch.device("cpu")

    def get_output_embeddings(self) -> nn.Linear:
        return self.head


def layer_with(frozen: nn.Linear) -> Any:
    """A layer of ours with an adapter that changes something."""
    torch.manual_seed(0)
    config = ModelConfig(adapters="lora", lora_rank=RANK, lora_alpha=8)
    backbone = Backbone(Host(frozen), "nowhere")
    backbone.switch(backbone.add(lora_settings(config), seed=1))
    (layer,) = backbone.layers
    for weight in layer.lora_B.parameters():
        nn.init.normal_(weight)
    return layer


def narrow(bias: bool) -> nn.Linear:
    layer = nn.Linear(WIDTH, OUT, bias=bias)
    layer.weight.data = layer.weight.data.to(torch.bfloat16)
    layer.__class__ = NarrowLinear
    return layer


def results(layer: Any, x: Tensor) -> list[Tensor]:
    """What it gives, and the gradients of some number made of that."""
    x = x.clone().requires_grad_()
    trained = [weight for weight in layer.parameters() if weight.requires_grad]
    out = layer(x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    return [out.detach(), *torch.autograd.grad((out.float() * weights).sum(), [x, *trained])]


def of_peft(layer: Any) -> Any:
    own = copy.deepcopy(layer)
    own.__class__ = PeftLinear
    return own


FROZEN = {
    "with a bias": lambda: nn.Linear(WIDTH, OUT),
    "without": lambda: nn.Linear(WIDTH, OUT, bias=False),
    "of 16 bits": lambda: narrow(bias=False),
    "of 16 bits with a bias": lambda: narrow(bias=True),
}


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("shape", [(7, WIDTH), (2, 9, WIDTH), (1, WIDTH)])
def test_results_and_gradients_are_those_of_peft(frozen: str, shape: tuple[int, ...]) -> None:
    layer = layer_with(FROZEN[frozen]())
    x = torch.randn(shape)
    assert lora._fits(layer, x)
    ours, theirs = results(layer, x), results(of_peft(layer), x)
    assert len(ours) == len(theirs) == 4
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert (ours[0] - layer.base_layer(x)).abs().max() > 0.1, "the adapter changes something"


def test_nothing_is_differentiated_that_is_not_trained() -> None:
    layer = layer_with(nn.Linear(WIDTH, OUT))
    out = layer(torch.randn(3, WIDTH))  # as in the first layer of a frozen embedding
    out.sum().backward()
    assert layer.base_layer.weight.grad is None and layer.lora_A["adapter0"].weight.grad is not None


def test_a_pass_whose_memory_is_only_counted_is_the_same_operation() -> None:
    """`srppo plan` follows a pass with fake tensors: what it counts has to be what runs."""
    layer = layer_with(narrow(bias=True))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for module in layer.modules():
            for name, weight in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(mode.from_tensor(weight.data), weight.requires_grad))
        x = torch.empty(2, 9, WIDTH, requires_grad=True)
        assert lora._fits(layer, x)
        out = layer(x)
        out.sum().backward()
    assert out.shape == (2, 9, OUT) and x.grad is not None and x.grad.shape == x.shape


@pytest.mark.parametrize("case", ["disabled", "merged", "bf16", "autocast", "two at once"])
def test_what_does_not_fit_is_left_to_peft(case: str) -> None:
    layer, x = layer_with(nn.Linear(WIDTH, OUT)), torch.randn(4, WIDTH)
    if case == "disabled":
        layer.enable_adapters(False)
    if case == "merged":
        layer.merge()
    if case == "bf16":
        layer, x = layer.to(torch.bfloat16), x.to(torch.bfloat16)
    if case == "two at once":
        layer.update_layer("other", RANK, lora_alpha=1, config=lora_settings(ModelConfig(adapters="lora")))
        nn.init.normal_(layer.lora_B["other"].weight)
        layer.set_adapter(["adapter0", "other"])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case == "autocast"):
        assert not lora._fits(layer, x)
        assert torch.equal(layer(x), of_peft(layer)(x))
