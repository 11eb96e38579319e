"""Atomic replacement of files: readers see either the old content or the new one, also after a crash."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_TEMPORARY = ".partial"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; at the end of the block the temporary file replaces `path`.

    The temporary file is flushed to disk before it is renamed. The folder is created if needed. When anything fails,
    the temporary file is removed and `path` stays unchanged.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    temporary = path.with_name(path.name + _TEMPORARY)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    except BaseException:
        # If the folder itself is unusable, this fails too; the second error must not hide the first one.
        with suppress(OSError):
            temporary.unlink()
        raise


def remove_leftovers(folder: Path) -> None:
    """Deletes the temporary files that a killed process left in a folder."""
    for path in folder.glob(f"*{_TEMPORARY}"):
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
