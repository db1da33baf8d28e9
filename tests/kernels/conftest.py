"""The implementations of the log-prob kernels that a test asks for by `impl`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from srppo.kernels import native


@pytest.fixture
def impl(request: pytest.FixtureRequest) -> Iterator[str]:
    """`plain` is impl="torch" as it runs where no C++ compiler is found."""
    if request.param != "plain":
        yield request.param
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(native.SWITCH, "0")
        native.load.cache_clear()
        yield "torch"
    native.load.cache_clear()
