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
        "models/language_model.py",
        "body_hidden(self.body, inputs, self.precision)[:, -response_width - 1 : -1]",
        "body_hidden(self.body, inputs, self.precision)[:, -response_width:]",
        "models/test_language_model.py::test_the_critic_sees_the_state_before_each_token",
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
        "models/language_model.py",
        "copy.deepcopy(start.model.base_model)",
        "start.model.base_model",
        "models/test_language_model.py::test_the_critic_starts_at_zero_and_shares_nothing",
    ),
    Mutant(
        "critic: head not zero",
        "models/language_model.py",
        "nn.init.zeros_(self.head.weight)",
        "nn.init.normal_(self.head.weight)",
        "models/test_language_model.py::test_the_critic_starts_at_zero_and_shares_nothing",
    ),
    Mutant(
        "models: 16-bit master weights",
        "models/language_model.py",
        "            dtype=torch.float32,\n",
        '            dtype="auto",\n',
        "models/test_language_model.py::test_a_bf16_checkpoint_is_loaded_as_fp32",
    ),
    Mutant(
        "forecast: the last PPO stage alone",
        "models/pair.py",
        'return sorted(ours, key=lambda stage: int(stage.identity["config"]["seed"]))',
        'return sorted(ours, key=lambda stage: int(stage.identity["config"]["seed"]))[-1:]',
        "analysis/test_forecast.py::test_every_stage_and_every_step_with_weights_is_drawn",
    ),
    Mutant(
        "head: checked by an absolute tolerance",
        "models/language_model.py",
        "tolerance = LOGIT_TOLERANCE * theirs_NV.abs().max()",
        "tolerance = torch.tensor(1e-3)",
        "models/test_language_model.py::test_a_head_is_checked_by_the_size_of_its_logits",
    ),
    Mutant(
        "head: rows of padding in the softmax",
        "models/language_model.py",
        "return output.weight[: self.vocab_size], None",
        "return output.weight, None",
        "models/test_language_model.py::test_ids_beyond_the_tokenizer_are_in_no_softmax",
    ),
    Mutant(
        "head: columns of padding in its own logits",
        "models/language_model.py",
        "-response_width - 1 : -1, : self.vocab_size]",
        "-response_width - 1 : -1]",
        "models/test_language_model.py::test_ids_beyond_the_tokenizer_are_in_no_softmax",
    ),
    Mutant(
        "memory: weights are not in it",
        "models/memory.py",
        "(weight_bytes(model) if held is None else held)",
        "(held or 0)",
        "models/test_memory.py::test_rows_are_what_a_quarter_of_the_memory_left_holds",
    ),
]
