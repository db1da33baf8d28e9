"""The critic."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from srppo.errors import ModelError
from srppo.models.language_model import LanguageModel, body_hidden, has_body, model_inputs


class ValueModel(nn.Module):
    """The critic: the SFT model's body, its own copy, under a linear head that starts at zero."""

    def __init__(self, start: LanguageModel) -> None:
        super().__init__()
        if not has_body(start.model):
            raise ModelError(
                f"{type(start.model).__name__} has no body under its head (its base_model_prefix names none), and "
                "PPO's critic is a copy of that; set ppo.advantage=rloo, which needs no critic, or use another model"
            )
        self.body = copy.deepcopy(start.model.base_model)
        self.precision, self.takes_positions = start.precision, start.takes_positions
        self.head = nn.Linear(start.model.get_output_embeddings().weight.shape[1], 1, device=start.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def response_values(self, tokens_BS: Tensor, attention_mask_BS: Tensor, response_width: int) -> Tensor:
        """Value of the state before each of the last `response_width` tokens, BT fp32, in scaled reward; 0 masked."""
        inputs = model_inputs(tokens_BS, attention_mask_BS, self.takes_positions)
        hidden_BTD = body_hidden(self.body, inputs, self.precision)[:, -response_width - 1 : -1]
        values_BT = self.head(hidden_BTD.float()).squeeze(-1)
        return values_BT.masked_fill(~attention_mask_BS[:, -response_width:], 0.0)

    def start_at(self, mean: float, mask_BT: Tensor) -> Tensor:
        """Set the bias of the head, whose weights are still 0, to a mean return (in scaled reward); the values that
        follow, BT, 0 where masked."""
        nn.init.constant_(self.head.bias, mean)
        return torch.full_like(mask_BT, mean, dtype=torch.float32).masked_fill(~mask_BT, 0.0)
