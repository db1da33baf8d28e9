"""Mutants of `srppo/data`; the runner is tests/mutants.py."""

from __future__ import annotations

from mutant_lists import Mutant

SHAPES = "data/test_chat.py::test_what_is_trained_follows_the_generation_prompt_and_holds_the_answer"
MUTANTS = [
    Mutant(
        "chat: an answer may vanish",
        "data/chat.py",
        "if whole.startswith(before) and named and _holds(after, row.answer):",
        "if whole.startswith(before) and named:",
        "data/test_chat.py::test_an_answer_that_the_template_drops_or_shortens_is_trained_whole_or_left_out",
    ),
    Mutant(
        "chat: cut after the last stop token",
        "data/chat.py",
        "return tail[: places[past] + 1] if past < len(places)",
        "return tail[: places[-1] + 1] if past < len(places)",
        SHAPES,
    ),
    Mutant(
        "chat: a stop token that the answer spells ends it",
        "data/chat.py",
        """    if any(token in stops for token in said):
        raise _LeftOut(_STOPPED)
    past""",
        "    past",
        "data/test_chat.py::test_a_stop_token_that_an_answer_spells_is_told_from_those_after_it",
    ),
    Mutant(
        "chat: no parts",
        "data/chat.py",
        "return not writes(_MARK) and writes(_parts(_MARK))",
        "return False",
        SHAPES,
    ),
    Mutant(
        "chat: the think block opened twice",
        "data/chat.py",
        "_continued(before, row.answer)",
        "row.answer",
        "data/test_chat.py::test_an_answer_that_reasons_is_trained_whole_and_its_think_block_opened_once",
    ),
    Mutant(
        "chat: earlier answers without their stop token",
        "data/chat.py",
        "last = after + 1 if after < len(ids) and ids[after] in stops else last",
        "last = last",
        SHAPES,
    ),
    Mutant(
        "chat: an earlier answer runs on to any stop token",
        "data/chat.py",
        "ids[after] in special or not text[end : ends[after]].strip()",
        "True",
        SHAPES,
    ),
    Mutant(
        "chat: a greeting is trained",
        "data/chat.py",
        'if turn.role == "assistant" and "user" in [t.role for t in turns[:i]]',
        'if turn.role == "assistant"',
        "data/test_chat.py::test_every_answer_that_follows_a_user_is_trained_and_the_limits_are_of_the_first",
    ),
    Mutant(
        "chat: tools may be dropped",
        "data/chat.py",
        "    if not _has_tools(text, turns):\n",
        "    if False:\n",
        "data/test_chat.py::test_turns_of_tools_go_through_the_template_or_the_row_is_left_out",
    ),
    Mutant(
        "chat: variables are not exported",
        "data/chat.py",
        "given = {name: text if text.startswith(head) else head + text for name, text in named.items()}",
        "given = named",
        "data/test_chat.py::test_a_template_from_a_file_with_its_variables_goes_with_the_tokenizer",
    ),
    Mutant(
        "rows: repeats go unsaid",
        "data/rows.py",
        "seen.add(hash(content))",
        "pass",
        "data/test_rows.py::test_what_is_suspicious_is_said_once_a_file",
    ),
    Mutant(
        "rows: calls of tools enter no hash",
        "data/rows.py",
        "more = [row.calls, row.tools] if row.calls or row.tools else []",
        "more = []",
        "data/test_rows.py::test_turns_of_tools_are_read_as_calls_and_what_came_back",
    ),
    Mutant(
        "data: answers without EOS",
        "data/chat.py",
        "return (*tail, stops[0])",
        "return tail",
        "data/test_chat.py::test_loss_begins_where_the_answer_begins data/test_chat.py::test_plain_text_is_all_answer_and_its_first_token_has_no_predictor data/test_chat.py::test_answers_end_in_a_stop_token_whatever_the_template_puts_there",
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
        "return row.task or file_of(row)",
        'return "" or file_of(row)',
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
        "data/noise.py",
        'random.choice(letters.replace(own, ""))',
        "random.choice(letters)",
        "data/test_noise.py::test_near_misses_are_of_every_sort",
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
        "_prompts(config, seed, questions, loaded.rows, train.rows, encode_asked)",
        "_prompts(config, seed, questions, loaded.rows, loaded.rows, encode_asked)",
        "data/test_noise.py::test_the_share_asked_for_is_the_share_measured",
    ),
    Mutant(
        "prompts: shared ones drawn again",
        "data/prepare.py",
        "drawn = encoded(kept, encode, size)",
        "drawn = encoded(ordered, encode, size)",
        "data/test_noise.py::test_a_share_that_cannot_be_met_says_why",
    ),
    Mutant(
        "prompts: shares are not nested",
        "data/prepare.py",
        "for turn in reversed(range(shared))]",
        "for turn in range(shared)]",
        "data/test_noise.py::test_larger_shares_keep_what_stays_in_its_place",
    ),
]
