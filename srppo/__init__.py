"""Self-Rewarding PPO (arXiv 2510.21090): alignment from demonstrations only.

    from srppo import load_recipe, train_sft, train_ppo          the stages
    from srppo import coherent_reward, gae                       their parts, on plain tensors
    from srppo import logprob_diff, linear_logprob_diff, linear_logprob    the kernels

Each name is imported when it is first asked for, so `import srppo` alone loads neither torch nor anything else.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from srppo.config import load_recipe as load_recipe
    from srppo.errors import ConfigError as ConfigError
    from srppo.errors import DataError as DataError
    from srppo.errors import Diverged as Diverged
    from srppo.errors import Interrupted as Interrupted
    from srppo.errors import ModelError as ModelError
    from srppo.errors import OtherEnded as OtherEnded
    from srppo.errors import OutOfMemory as OutOfMemory
    from srppo.errors import RecordError as RecordError
    from srppo.errors import RunError as RunError
    from srppo.errors import SrppoError as SrppoError
    from srppo.errors import StorageError as StorageError
    from srppo.errors import UserError as UserError
    from srppo.kernels import linear_logprob as linear_logprob
    from srppo.kernels import linear_logprob_diff as linear_logprob_diff
    from srppo.kernels import logprob_diff as logprob_diff
    from srppo.training.advantage import gae as gae
    from srppo.training.ppo import train_ppo as train_ppo
    from srppo.training.reward import coherent_reward as coherent_reward
    from srppo.training.rollout import LocalSampler as LocalSampler
    from srppo.training.sft import train_sft as train_sft

__version__ = "0.1.0"

_HOMES = {
    "config": "load_recipe",
    "errors": "ConfigError DataError Diverged Interrupted ModelError OtherEnded OutOfMemory RecordError RunError "
    "SrppoError StorageError UserError",
    "kernels": "linear_logprob linear_logprob_diff logprob_diff",
    "training.advantage": "gae",
    "training.ppo": "train_ppo",
    "training.reward": "coherent_reward",
    "training.rollout": "LocalSampler",
    "training.sft": "train_sft",
}
_HOME = {name: f"srppo.{module}" for module, names in _HOMES.items() for name in names.split()}
__all__ = ["__version__", *sorted(_HOME)]

if not TYPE_CHECKING:  # a type checker has them from above, and knows then which names there are not

    def __getattr__(name: str) -> Any:
        """A public name, from the module that holds it."""
        if name not in _HOME:
            raise AttributeError(f"module 'srppo' has no attribute {name!r}; it exports {', '.join(__all__)}")
        return globals().setdefault(name, getattr(import_module(_HOME[name]), name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
