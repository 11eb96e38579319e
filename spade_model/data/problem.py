"""What can be wrong with one file or folder, and the error that says so."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from spade_model.errors import UserError


@dataclass(frozen=True)
class Problem:
    """One fault in a data set. `str()` is one line: where, what, what to do."""

    path: Path
    """The file or folder at fault."""
    what: str
    """What is wrong, without a full stop; names pixels and values."""
    fix: str
    """What the user can do, without a full stop."""
    is_warning: bool = False
    """The data set can be used as it is, but perhaps not as meant."""

    def __str__(self) -> str:
        return f"{self.path}: {self.what}. {self.fix}."


class DataError(UserError):
    """A `Problem` that stops the reading of an item."""

    def __init__(self, problem: Problem) -> None:
        # The problem is the only argument, so that the error survives pickling between loader processes.
        super().__init__(problem)
        self.problem = problem


def data_error(path: Path, what: str, fix: str) -> DataError:
    return DataError(Problem(path, what, fix))
