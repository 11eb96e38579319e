"""The fingerprint of the C++ sources, by which an import notices compiled modules that were built from other ones.

setup.py runs this file before the package can be imported.
"""

from __future__ import annotations

import hashlib
from pathlib import Path


def fingerprint(folder: Path) -> str | None:
    """A digest of the sources in csrc/ of a checkout; None if the folder is not one."""
    if not (folder / "csrc" / "module.cpp").is_file():
        return None
    digest = hashlib.sha256()
    for path in sorted(p for p in (folder / "csrc").rglob("*") if p.suffix in (".cpp", ".cu", ".h")):
        digest.update(f"{path.relative_to(folder).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
