"""Evaluation through lm-eval: its tasks, its checkers and its scores; our models, checks, cache and intervals."""
