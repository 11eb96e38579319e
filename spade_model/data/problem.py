"""A problem of one file or folder, and the error that reports it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from spade_model.errors import UserError


@dataclass(frozen=True)
class Problem:
    """One fault in a data set. `str()` is one line: where, what, what to do."""

    path: Path | None
    """The file or folder at fault; None: the options are."""
    what: str
    """The problem, without a full stop; it names pixels and values."""
    fix: str
    """The fix, without a full stop."""
    is_warning: bool = False
    """The data set can be used as it is, but perhaps not as meant."""
    label_nc: int = 0
    """The least --label_nc that has a place for the file's ids, where that would mend it; otherwise 0."""

    def __str__(self) -> str:
        where = "" if self.path is None else f"{self.path}: "
        return f"{where}{self.what}. {self.fix}."


class DataError(UserError):
    """A `Problem` that stops the reading of an item."""

    def __init__(self, problem: Problem) -> None:
        # The problem is the only argument, so that the error survives pickling between loader processes.
        super().__init__(problem)
        self.problem = problem


def data_error(path: Path | None, what: str, fix: str, label_nc: int = 0) -> DataError:
    return DataError(Problem(path, what, fix, label_nc=label_nc))
