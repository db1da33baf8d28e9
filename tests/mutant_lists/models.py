"""Mutants of `srppo/models`; the runner is tests/mutants.py."""

from __future__ import annotations

from mutant_lists import Mutant

MUTANTS = [
    Mutant(
        "models: no position ids",
        "models/language_model.py",
        "    if takes_positions:\n",
        "    if False:\n",
        "models/test_language_model.py::test_logprobs_are_the_models_own_under_ragged_padding",
    ),
    Mutant(
        "models: log-probs off by one",
        "models/language_model.py",
        "return hidden_BSD[:, -response_width - 1 : -1]",
        "return hidden_BSD[:, -response_width:]",
        "models/test_language_model.py::test_logprobs_are_the_models_own_under_ragged_padding",
    ),
    Mutant(
        "models: values off by one",
        "models/value_model.py",
        "body_hidden(self.body, inputs, self.precision)[:, -response_width - 1 : -1]",
        "body_hidden(self.body, inputs, self.precision)[:, -response_width:]",
        "models/test_value_model.py::test_the_critic_sees_the_state_before_each_token",
    ),
    Mutant(
        "models: dropout stays",
        "models/language_model.py",
        "            module.p = 0.0\n",
        "            pass\n",
        "models/test_language_model.py::test_dropout_is_off_and_passes_repeat",
    ),
    Mutant(
        "models: left in train mode",
        "models/language_model.py",
        "    model.eval()\n",
        "",
        "models/test_language_model.py::test_dropout_is_off_and_passes_repeat",
    ),
    Mutant(
        "critic: shares the policy's weights",
        "models/value_model.py",
        "copy.deepcopy(start.model.base_model)",
        "start.model.base_model",
        "models/test_value_model.py::test_the_critic_starts_at_zero_and_shares_nothing",
    ),
    Mutant(
        "critic: head not zero",
        "models/value_model.py",
        "nn.init.zeros_(self.head.weight)",
        "nn.init.normal_(self.head.weight)",
        "models/test_value_model.py::test_the_critic_starts_at_zero_and_shares_nothing",
    ),
    Mutant(
        "models: 16-bit master weights",
        "models/loading.py",
        "            dtype=torch.float32,\n",
        '            dtype="auto",\n',
        "models/test_loading.py::test_a_bf16_checkpoint_is_loaded_as_fp32",
    ),
    Mutant(
        "forecast: the last PPO stage alone",
        "models/pair.py",
        'return sorted(ours, key=lambda stage: int(stage.identity["config"]["seed"]))',
        'return sorted(ours, key=lambda stage: int(stage.identity["config"]["seed"]))[-1:]',
        "analysis/test_forecast.py::test_every_stage_and_every_step_with_weights_is_drawn",
    ),
    Mutant(
        "flops: all experts, not those that are chosen",
        "models/flops.py",
        "weight.numel() // len(weight) * experts_per_token",
        "weight.numel()",
        "models/test_flops.py::test_forward_flops_are_those_that_torch_counts",
    ),
    Mutant(
        "flops: a critic's image tower",
        "models/flops.py",
        "model.body.get_decoder()",
        "model.body",
        "models/test_flops.py::test_forward_flops_are_those_that_torch_counts",
    ),
    Mutant(
        "flops: the head twice",
        "models/flops.py",
        " | {id(head_weight)}",
        "",
        "models/test_flops.py::test_a_body_that_cannot_be_found_has_its_head_counted_once",
    ),
    Mutant(
        "flops: heads of the hidden width",
        "models/flops.py",
        'getattr(config, name, None) or size for name in ("qk_head_dim", "v_head_dim")',
        "size for _ in range(2)",
        "models/test_flops.py::test_forward_flops_are_those_that_torch_counts",
    ),
    Mutant(
        "models: the outer configuration's context",
        "models/language_model.py",
        "return self.model.config.get_text_config()",
        "return self.model.config",
        "models/test_loading.py::test_the_context_is_found_wherever_a_config_names_it",
    ),
    Mutant(
        "loading: bars stay hidden",
        "models/loading.py",
        "            if shown:\n",
        "            if False:\n",
        "models/test_loading.py::test_bars_are_hidden_while_a_model_is_loaded_and_not_for_good",
    ),
]
