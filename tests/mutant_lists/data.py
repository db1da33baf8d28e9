"""Mutants of `srppo/data`; the runner is tests/mutants.py."""

from __future__ import annotations

from mutant_lists import Mutant

MUTANTS = [
    Mutant(
        "data: answers without EOS",
        "data/chat.py",
        "return (*tail, stops[0])",
        "return tail",
        "data/test_prepare.py::test_loss_begins_where_the_answer_begins data/test_prepare.py::test_plain_text_is_all_answer_and_its_first_token_has_no_predictor data/test_prepare.py::test_answers_end_in_a_stop_token_whatever_the_template_puts_there",
    ),
    Mutant(
        "noise: rates are not nested",
        "data/noise.py",
        'f"noise order {row_content(rows[i])}"',
        'f"noise order {rate} {row_content(rows[i])}"',
        "data/test_noise.py::test_masks_are_exact_and_nested_with_the_same_answers",
    ),
    Mutant(
        "noise: kinds mask other rows",
        "data/noise.py",
        'f"noise order {row_content(rows[i])}"',
        'f"noise order {kind} {row_content(rows[i])}"',
        "data/test_noise.py::test_the_same_rows_are_noised_by_every_kind_wherever_they_stand",
    ),
    Mutant(
        "noise: a derangement over all tasks",
        "data/noise.py",
        "return row.task or re.sub",
        'return "" or re.sub',
        "data/test_noise.py::test_a_derangement_at_rate_1_exchanges_the_answers_of_each_task",
    ),
    Mutant(
        "noise: across, from the same task",
        "data/noise.py",
        "if task != own and differs(right, answer)",
        "if differs(right, answer)",
        "data/test_noise.py::test_answers_across_come_from_other_tasks",
    ),
    Mutant(
        "noise: words of the answer itself",
        "data/noise.py",
        "if at != place and w != pieces[spot]",
        "if w != pieces[spot]",
        "data/test_noise.py::test_corrupted_words_are_words_of_other_answers",
    ),
    Mutant(
        "noise: an edit that changes nothing",
        "data/edits.py",
        'random.choice(letters.replace(own, ""))',
        "random.choice(letters)",
        "data/test_noise.py::test_a_near_miss_is_one_edit",
    ),
    Mutant(
        "noise: not applied to training",
        "data/prepare.py",
        "    train = replace(train, ids=noise.applied(train.ids))\n",
        "",
        "data/test_noise.py::test_noise_changes_answers_of_masked_rows_and_nothing_else",
    ),
    Mutant(
        "prompts: shares count unused rows",
        "data/prepare.py",
        "choose_prompts(config, usable, used, questions",
        "choose_prompts(config, usable, usable, questions",
        "data/test_noise.py::test_the_share_asked_for_is_the_share_measured",
    ),
    Mutant(
        "prompts: shared ones drawn again",
        "data/prompts.py",
        "drawn = encoded(kept, encode, count - shared)",
        "drawn = encoded(ordered, encode, count - shared)",
        "data/test_noise.py::test_a_share_that_cannot_be_met_says_why",
    ),
    Mutant(
        "prompts: shares are not nested",
        "data/prompts.py",
        "for turn in reversed(range(shared))]",
        "for turn in range(shared)]",
        "data/test_noise.py::test_larger_shares_keep_what_stays_in_its_place",
    ),
]
