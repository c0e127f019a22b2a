"""Files that are whole: with their new content, or as they were before."""

import os
from pathlib import Path


def write_file(path: Path, content: str | bytes) -> Path:
    """A file with this content, text as UTF-8. An interruption or a full disk leaves the older one."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
        return unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
