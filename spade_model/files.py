"""Atomic replacement of files: readers see either the old content or the new one, also after a crash."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

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


def lock(path: Path) -> IO[str]:
    """Opens a file, created if needed, and locks it for this process until it is closed or the process ends.

    Where the file system has no locks, the file is opened only.

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: the file cannot be opened.
    """
    file = path.open("a")
    try:
        # Unlike flock's, these locks do not pass to forked workers, which may outlive the process for a while.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise
    except OSError:
        pass
    return file


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
