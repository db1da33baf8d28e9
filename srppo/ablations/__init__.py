"""Sweeps: one question about demonstrations-only alignment, its cells, how they are run, and what they say."""

from srppo.ablations.spec import Ablation, Analysis, Arm, Cell, Comparison, Sweep, grid

__all__ = ["Ablation", "Analysis", "Arm", "Cell", "Comparison", "Sweep", "grid"]
