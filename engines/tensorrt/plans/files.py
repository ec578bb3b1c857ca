"""Files that another process may be reading: written whole, beside their place, then moved there."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path


def write_file(path: Path, content: bytes) -> None:
    """Replace a file in one step; only its owner may read or write it. Raises OSError."""
    # mkstemp makes the file 0600, whatever the umask.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise


def sha256(content: bytes) -> str:
    """The digest, in hex."""
    return hashlib.sha256(content).hexdigest()
