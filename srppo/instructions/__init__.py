"""Instructions that a program can check: IFEval's kinds and lm-eval's own checkers of them (arXiv 2311.07911)."""
