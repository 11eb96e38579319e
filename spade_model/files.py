"""Atomic replacement of files: readers see either the old content or the new one, also after a crash."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TEMPORARY = ".partial"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path; at the end of the block the temporary file replaces `path`.

    The temporary file has the permissions that the umask leaves to a new file, whatever program wrote it. It is flushed
    to disk before it is renamed. The folder is created if needed. When anything fails, the temporary file is removed
    and `path` stays unchanged.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Some writers, such as safetensors, put temporary files of their own beside the file. They stay in this folder.
    folder = Path(tempfile.mkdtemp(prefix=".", suffix=_TEMPORARY, dir=path.parent))
    try:
        temporary = folder / path.name
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Deletes the temporary files that a killed process left in a folder and its subfolders."""
    for path in list(folder.rglob(f"*{_TEMPORARY}")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
