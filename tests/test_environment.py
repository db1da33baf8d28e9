"""The facts of a machine that a record keeps."""

from __future__ import annotations

import json

import pytest

from srppo.environment import environment


def test_environment_is_json_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    facts = environment()
    text = json.dumps(facts)
    assert "hf_secret" not in text and facts["variables"]["OMP_NUM_THREADS"] == "2"
    assert facts["packages"]["torch"].startswith("2.") and facts["cores"] >= 1 and facts["cpu"]
