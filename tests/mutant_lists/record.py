"""Mutants of `srppo/record`; the runner is tests/mutants.py."""

from __future__ import annotations

from mutant_lists import Mutant

MUTANTS = [
    Mutant(
        "checkpoint: files not synced",
        "record/files.py",
        "    for path in paths:\n        sync(path)\n",
        "",
        "record/test_store.py::test_everything_is_synced_before_it_is_moved_into_place_and_the_folder_after",
    ),
    Mutant(
        "checkpoint: folder not synced after the rename",
        "record/files.py",
        "        os.replace(source, target)\n    sync(target.parent)\n",
        "        os.replace(source, target)\n",
        "record/test_store.py::test_everything_is_synced_before_it_is_moved_into_place_and_the_folder_after",
    ),
    Mutant(
        "checkpoint: written in place",
        "record/files.py",
        "            move(target, old)\n        move(aside, target)\n",
        "            move(target, old)\n        shutil.copytree(aside, target)\n        shutil.rmtree(aside)\n",
        "record/test_store.py::test_everything_is_synced_before_it_is_moved_into_place_and_the_folder_after",
    ),
    Mutant(
        "checkpoint: checksums not compared",
        "record/files.py",
        'if found["sha256"] != expected["sha256"]:',
        "if False:",
        "record/test_store.py::test_a_torn_checkpoint_is_named_and_the_one_before_is_used",
    ),
    Mutant(
        "checkpoint: one that stepped aside is lost",
        "record/files.py",
        "    elif old.exists():\n        move(old, target)\n",
        "",
        "record/test_store.py::test_what_the_dead_left_behind_is_swept_and_what_may_be_alive_is_not",
    ),
    Mutant(
        "store: commit not fenced",
        "record/store.py",
        'if not Lease.claim(self.stage.path, self.number + 1, {"state": "committed", "result": result}):',
        "if False:",
        "record/test_store.py::test_a_holder_that_slept_through_its_lease_changes_nothing[commit]",
    ),
    Mutant(
        "store: a checkpoint of one who lost his lease",
        "record/store.py",
        "            self.check()  # writing may take long enough to lose the lease\n",
        "",
        "record/test_store.py::test_a_holder_that_slept_through_its_lease_changes_nothing[write]",
    ),
    Mutant(
        "lease: a live holder is not respected",
        "record/lease.py",
        "            if cls.live(stage, number, record, timeout_s):\n",
        "            if False:\n",
        "record/test_store.py::test_whose_lease_is_taken_over",
    ),
    Mutant(
        "store: leases expire by this machine's clock",
        "record/lease.py",
        "            now = os.fstat(file.fileno()).st_mtime\n",
        "            now = time.time()\n",
        "record/test_store.py::test_a_lease_expires_by_the_file_servers_clock_whatever_ours_says",
    ),
    Mutant(
        "store: rows of discarded steps stay",
        "record/store.py",
        'row["step"] <= min(starts)]',
        'row["step"] >= -1]',
        "record/test_store.py::test_rows_of_a_resumed_attempt_replace_those_it_discarded",
    ),
    Mutant(
        "store: torn checkpoints are used",
        "record/store.py",
        "            if (reason := damage(path)) is None:\n                return step, path\n",
        "            return step, path\n",
        "record/test_store.py::test_a_torn_checkpoint_is_named_and_the_one_before_is_used",
    ),
    Mutant(
        "a tried place is left behind",
        "record/folder.py",
        "            shutil.rmtree(trial, ignore_errors=True)\n",
        "            pass\n",
        "record/test_store.py::test_a_place_that_can_be_used_is_left_as_it_was",
    ),
    Mutant(
        "a sweep is taken for a run",
        "record/arms.py",
        "    if is_sweep(run.spec):\n",
        "    if False:\n",
        "evaluation/harness/test_run.py::test_a_sweep_is_refused",
    ),
]
