"""What one of several processes holds of a run, for its plan: its share of the rows, its parts of the weights, and what
it gathers of them for a pass, in the order in which FSDP2 does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from srppo.models.language_model import LanguageModel, Trunk
from srppo.models.memory import part_bytes
from srppo.models.sharding import layers_of
from srppo.models.value_model import ValueModel
from srppo.training.loop import Trained
from srppo.training.parallel import BUCKET

ADAPTER = ".lora_"  # in the names of weights that stay whole


class Groups(NamedTuple):
    """Whole bytes of what is gathered together: the largest layer, what a body has beside its layers, and the head."""

    layer: int
    root: int
    head: int

    @property
    def forward(self) -> int:
        """The most in a forward pass, beside heads: a layer and the buffer that it came in, or the root's buffer and
        the first layer's."""
        return self.root + max(2 * self.layer, self.root + self.layer)


@dataclass(frozen=True)
class Division:
    """Over how many processes the rows of a pass are divided; spread: whether weights are, too."""

    processes: int = 1
    spread: bool = False

    def rows(self, count: int) -> int:
        """The largest share of so many rows."""
        return -(-count // self.processes)

    def weight_bytes(self, *models: nn.Module) -> int:
        """Of weights, each once."""
        return self._bytes(pair for model in models for pair in model.named_parameters())

    def trained_bytes(self, *models: Trained | None) -> int:
        """Of what is trained, each once."""
        return self._bytes(pair for model in models if model is not None for pair in _trained(model))

    def gradient_bytes(self, *models: Trained | None) -> int:
        """Of the gradients of what is trained. A tied head's comes before that of the embeddings, which is added to it:
        the memory that the latter came in stays, since gradients of the same group lie there."""
        tied = [model for model in models if isinstance(model, LanguageModel) and self.trains_spread(model)]
        heads = (model.model.get_output_embeddings().weight for model in tied if _is_tied(model.model))
        return self.trained_bytes(*models) + sum(self._here("", weight) for weight in heads)

    def largest_bytes(self, model: Trained) -> int:
        """Of the largest weight that is trained."""
        return max(self._here(name, weight) for name, weight in _trained(model))

    def gathered_bytes(self, model: nn.Module) -> int:
        """Of all of a model's weights that are spread, while they are gathered to write."""
        return _whole(model.named_parameters()) if self.spread else 0

    def trains_spread(self, model: LanguageModel | ValueModel) -> bool:
        """Whether what is trained of a model is spread: all but adapters."""
        return self.spread and any(ADAPTER not in name for name, _ in _trained(_trunk(model)))

    def groups(self, model: LanguageModel | ValueModel) -> Groups:
        """Of what is gathered for a pass; of a critic with a trunk of its own no head."""
        role = _trunk(model)
        if not self.spread:
            return Groups(0, 0, 0)
        body = role.model.base_model if isinstance(role, LanguageModel) else role.model  # type: ignore[attr-defined]
        layers = layers_of(body)
        inner = {id(weight) for layer in layers for weight in layer.parameters()}
        root = _whole((name, weight) for name, weight in body.named_parameters() if id(weight) not in inner)
        head = role.model.get_output_embeddings() if isinstance(role, LanguageModel) else None
        largest = max((_whole(layer.named_parameters()) for layer in layers), default=0)
        return Groups(largest, root, 0 if head is None else _whole(head.named_parameters()))

    def gathered(self, model: LanguageModel | ValueModel, stretch: str) -> int:
        """Bytes that are gathered in a stretch of a pass with gradients (`footprint.train_peaks`).

        Forward: the head, which the log-probs begin with, and what `Groups.forward` says. Backward: the head until its
        own is done; then the root, a layer and the one that comes next. Where weights are trained, whole gradients of
        the layer and those of the one before, on their way to be added up; at the end those of the root.
        """
        found = self.groups(model)
        trained = self.trains_spread(model)
        layers = found.root + (4 if trained else 2) * found.layer
        if stretch == "":
            return found.head + found.forward
        if stretch == "head":
            return max(found.head + (self.rows(found.head) if trained else 0), layers)
        return max(layers, 3 * found.root + found.layer) if trained else layers

    def adding_up(self, model: Trained) -> int:
        """Bytes of the gradients that are added up over processes at once, of weights that are whole in each."""
        sizes = [weight.numel() for name, weight in _trained(model) if not self._is_spread(name)]
        if self.processes == 1 or not sizes:
            return 0
        return 4 * max(max(sizes), min(sum(sizes), BUCKET))

    def _bytes(self, weights: Iterable[tuple[str, Tensor]]) -> int:
        return sum({id(weight): self._here(name, weight) for name, weight in weights}.values())

    def _here(self, name: str, weight: Tensor) -> int:
        return part_bytes(weight, self.processes if self._is_spread(name) else 1)

    def _is_spread(self, name: str) -> bool:
        return self.spread and ADAPTER not in name


def _is_tied(model: Any) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def _trunk(model: LanguageModel | ValueModel) -> LanguageModel | Trunk:
    return model.trunk if isinstance(model, ValueModel) else model


def _trained(model: Trained) -> list[tuple[str, Tensor]]:
    """What an optimizer steps, by name."""
    return [(name, weight) for name, weight in model.weights().items() if isinstance(weight, nn.Parameter)]


def _whole(weights: Iterable[tuple[str, Tensor]]) -> int:
    """Bytes of weights that can be spread, each once."""
    return sum({id(weight): part_bytes(weight, 1) for name, weight in weights if ADAPTER not in name}.values())
