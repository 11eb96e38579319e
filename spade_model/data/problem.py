"""A problem of a data set, and the exception that reports it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from spade_model.errors import UserError


@dataclass(frozen=True)
class Problem:
    """A problem of a data set. `str()` gives one line with the path, the problem and the fix."""

    path: Path | None
    """The file or folder with the problem; None if the options are wrong."""
    what: str
    """Description of the problem, with pixels and values, without a final full stop."""
    fix: str
    """Instruction to fix the problem, without a final full stop."""
    is_warning: bool = False
    """True if the data set can be used as it is, although the user may not intend this."""
    label_nc: int = 0
    """The smallest --label_nc that includes all ids of the file, if this would fix the problem; otherwise 0."""

    def __str__(self) -> str:
        where = "" if self.path is None else f"{self.path}: "
        return f"{where}{self.what}. {self.fix}."


class DataError(UserError):
    """Raised when an item cannot be read because of a `Problem`."""

    def __init__(self, problem: Problem) -> None:
        # The problem is the only argument, so that the error survives pickling between loader processes.
        super().__init__(problem)
        self.problem = problem


def data_error(path: Path | None, what: str, fix: str, label_nc: int = 0) -> DataError:
    return DataError(Problem(path, what, fix, label_nc=label_nc))
