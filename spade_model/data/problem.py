"""A problem of a data set, and the exception that reports it."""

from __future__ import annotations

import re
from collections.abc import Sequence
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

    in_file: bool = False
    """True if the ids in the file cannot be meant as they are, whatever the options say."""

    @property
    def kind(self) -> str:
        """The word that begins the problem's line, warning or error."""
        return "warning" if self.is_warning else "error"

    def __str__(self) -> str:
        where = "" if self.path is None else f"{self.path}: "
        return f"{where}{self.what}. {self.fix}."


_SHOWN_OF_A_GROUP = 10


def grouped(problems: Sequence[Problem]) -> list[str]:
    """Returns lines that list the problems; those with the same fix, but for its numbers, share one."""
    groups: dict[tuple[str, str], list[Problem]] = {}
    for problem in problems:
        groups.setdefault((problem.kind, re.sub(r"\d+", "#", problem.fix)), []).append(problem)
    lines = []
    for (kind, _), group in groups.items():
        if len(group) == 1:
            lines.append(f"{kind}: {group[0]}")
            continue
        largest = max(group, key=lambda problem: problem.label_nc)
        lines.append(f"{kind} in {len(group)} places: {largest.fix}:")
        lines += [f"    {problem.path or 'options'}: {problem.what}" for problem in group[:_SHOWN_OF_A_GROUP]]
        if len(group) > _SHOWN_OF_A_GROUP:
            lines.append(f"    ... and {len(group) - _SHOWN_OF_A_GROUP} more")
    return lines


class DataError(UserError):
    """Raised when an item cannot be read because of a `Problem`."""

    def __init__(self, problem: Problem) -> None:
        # The problem is the only argument, so that the error survives pickling between loader processes.
        super().__init__(problem)
        self.problem = problem


def data_error(path: Path | None, what: str, fix: str, label_nc: int = 0) -> DataError:
    return DataError(Problem(path, what, fix, label_nc=label_nc))
