"""The critic."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from srppo.errors import ModelError
from srppo.models.language_model import LanguageModel, Trunk, has_body, unflatten
from srppo.models.sharding import is_spread, spread


class ValueModel(nn.Module):
    """The critic: a linear head that starts at zero, on a trunk that starts as the SFT model's body.

    The trunk has weights of its own (all of them, or an adapter's), or is the policy's itself (`shared`): then the head
    alone is the critic's, and the trunk is trained by both.
    """

    def __init__(self, policy: LanguageModel, *, shared: bool = False) -> None:
        super().__init__()
        if not has_body(policy.model):
            raise ModelError(
                f"{type(policy.model).__name__} has no body under its head (its base_model_prefix names none), and "
                "PPO's critic stands on that; set ppo.advantage=rloo, which needs no critic, or use another model"
            )
        self.shared = shared
        self.trunk: Trunk = policy if shared else policy.trunk()
        self.head = nn.Linear(policy.model.get_output_embeddings().weight.shape[1], 1, device=policy.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        if is_spread(policy.weights().values()):
            spread(self.head)

    def weights(self) -> dict[str, Tensor]:
        """What is the critic's own, by name."""
        body = {} if self.shared else {f"body.{name}": weight for name, weight in self.trunk.weights().items()}
        return {"head.weight": self.head.weight, "head.bias": self.head.bias, **body}

    def response_values(
        self,
        tokens_BS: Tensor,
        attention_mask_BS: Tensor,
        response_width: int,
        *,
        hidden_ND: Tensor | None = None,
    ) -> Tensor:
        """Value of the state before each of the last `response_width` tokens, BT fp32, in scaled reward; 0 masked.

        hidden_ND: the trunk's hidden states before the counted tokens, where they are known.
        """
        if hidden_ND is None:
            hidden_ND = self.trunk.hidden_rows(tokens_BS, attention_mask_BS, response_width)
        return unflatten(self.head(hidden_ND.float()).squeeze(-1), attention_mask_BS[:, -response_width:])

    def start_at(self, mean: float, mask_BT: Tensor) -> Tensor:
        """Set the bias of the head, whose weights are still 0, to a mean return (in scaled reward); the values that
        follow, BT, 0 where masked."""
        nn.init.constant_(self.head.bias, mean)
        return torch.full_like(mask_BT, mean, dtype=torch.float32).masked_fill(~mask_BT, 0.0)
