"""Tasks that this package ships as lm-eval YAML."""
