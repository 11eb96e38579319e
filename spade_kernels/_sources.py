"""The fingerprint of the C++ sources, which shows at import if a compiled module was built from other sources.

setup.py runs this file before the package can be imported.
"""

from __future__ import annotations

import hashlib
from pathlib import Path


def fingerprint(folder: Path) -> str | None:
    """A digest of the C++ sources in `folder`/csrc; None if the folder is not a checkout of spade-kernels."""
    if not (folder / "csrc" / "module.cpp").is_file():
        return None
    digest = hashlib.sha256()
    for path in sorted(p for p in (folder / "csrc").rglob("*") if p.suffix in (".cpp", ".cu", ".h")):
        digest.update(f"{path.relative_to(folder).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
