"""The list of mutants (`make mutants` runs it) fits the code as it is."""

from __future__ import annotations

from pathlib import Path

import mutants


def test_each_mutant_finds_its_text_once_and_names_tests_that_exist() -> None:
    assert mutants.problems() == []
    assert len(mutants.MUTANTS) >= 35 and all(mutant.old != mutant.new for mutant in mutants.MUTANTS)


def test_each_mutant_is_python() -> None:
    for mutant in mutants.MUTANTS:
        if not mutant.file.endswith(".py"):
            continue
        text = (mutants.ROOT / "srppo" / mutant.file).read_text()
        assert compile(text.replace(mutant.old, mutant.new), mutant.file, "exec"), "or a SyntaxError, which names it"


def test_a_list_that_has_rotted_is_named(tmp_path: Path) -> None:
    for mutant in mutants.MUTANTS:
        (tmp_path / "srppo" / mutant.file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "srppo" / mutant.file).write_text("")
        for node in mutant.tests.split():
            file = tmp_path / "tests" / node.partition("::")[0]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("")
    wrong = mutants.problems(tmp_path)
    assert len(wrong) >= 2 * len(mutants.MUTANTS)
    assert f"{mutants.MUTANTS[0].name}: its text is 0 times in {mutants.MUTANTS[0].file}" in wrong
