"""Files that are written whole or not at all."""

import contextlib
import os
import pathlib
import secrets
from collections.abc import Generator
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Generator[BinaryIO, None, None]:
    """A file to write to, which takes the place of `path` at the end.

    A kill or an error at any moment leaves the old file or the new one. After an error nothing else
    is left; half a file would keep a full disk full. Raises `OSError`.
    """
    # In the same folder: a rename does not cross file systems. Under a name that nobody else has.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        # Made as any file is, with the permissions that the user's files get.
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # Closed by now: Windows neither renames nor removes an open file.
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
