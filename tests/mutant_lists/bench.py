"""Mutants of `srppo/bench`; the runner is tests/mutants.py."""

from __future__ import annotations

from mutant_lists import Mutant

MUTANTS = [
    Mutant(
        "step rivals: other work is compared all the same",
        "bench/step_rivals.py",
        "if done != tokens or min(sums) <= 0:",
        "if min(sums) <= 0:",
        "bench/test_step_rivals.py::test_a_rival_that_fails_drops_out_with_one_line_and_ours_goes_on",
    ),
    Mutant(
        "step rivals: packages of ours are seen by their environment",
        "bench/step_rivals.py",
        'if key not in ("PYTHONPATH", "PYTHONHOME")',
        'if key not in ("PYTHONHOME",)',
        "bench/test_step_rivals.py::test_a_rival_does_the_same_work_and_is_compared_step_by_step",
    ),
    Mutant(
        "step rivals: a process that failed goes on",
        "bench/step_rivals.py",
        "        self._process.kill()\n        self._process.wait()\n",
        "",
        "bench/test_step_rivals.py::test_a_rival_that_fails_drops_out_with_one_line_and_ours_goes_on",
    ),
    Mutant(
        "step rivals: ratio upside down",
        "bench/step.py",
        "took[name] = sum(took[key].values()) / sum(getattr(ours, key).values())",
        "took[name] = sum(getattr(ours, key).values()) / sum(took[key].values())",
        "bench/test_step_rivals.py::test_a_rival_does_the_same_work_and_is_compared_step_by_step",
    ),
    Mutant(
        "trl worker: answers end one token late",
        "bench/trl_worker.py",
        "due_B = lengths_B == tokens_BS.shape[1] + 1 - width",
        "due_B = lengths_B == tokens_BS.shape[1] - width",
        "bench/test_step_rivals.py::test_answers_end_where_they_are_told_to_and_are_counted",
    ),
    Mutant(
        "trl worker: the reward counts padding",
        "bench/trl_worker.py",
        "return (logprobs(sft) - logprobs(base)) * mask_BS[:, -width:]",
        "return logprobs(sft) - logprobs(base)",
        "bench/test_step_rivals.py::test_the_reward_they_are_given_is_ours",
    ),
]
