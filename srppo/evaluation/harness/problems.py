"""Several problems said at once: who mends one should not meet the next on every run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from srppo.errors import DataError, UserError


class Problems:
    """A user's errors, each text once, in the order they were met."""

    def __init__(self) -> None:
        self.found: dict[str, UserError] = {}

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Within, a UserError ends the block and is kept for later."""
        try:
            yield
        except UserError as error:
            self.found.setdefault(str(error), error)

    def raise_any(self) -> None:
        """Raise the one error as it was, or DataError with all of them in one line."""
        if len(self.found) == 1:
            raise next(iter(self.found.values()))
        if self.found:
            numbered = "; ".join(f"({number}) {text}" for number, text in enumerate(self.found, start=1))
            raise DataError(f"{len(self.found)} problems: {numbered}")


@contextmanager
def together(problems: Problems | None) -> Iterator[Problems]:
    """The caller's problems, for the caller to raise, or new ones that are raised at the end."""
    own = Problems() if problems is None else problems
    yield own
    if problems is None:
        own.raise_any()
