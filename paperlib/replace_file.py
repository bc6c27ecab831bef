"""Files that are replaced whole: whoever reads one sees the old or the new."""

import os
import secrets
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path


def replace_file(path: Path, content: bytes) -> None:
    """Write, flush to disk, and rename into place; after a crash the old content is still there.

    Raises:
        OSError: if the disk is full or cannot be written; the old file stays.
    """
    fresh = path.parent / f".{path.name}-{secrets.token_hex(8)}"
    # To be read by whom the user's umask lets, as any new file but those of `tempfile`.
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except BaseException:
        os.unlink(fresh)
        raise


def replace_files(
    folder: Path, contents: Mapping[str, bytes], *, before: Callable[[], object] | None = None
) -> None:
    """Replace files of a folder together: nothing but renaming is left once all are written.

    Args:
        folder: where they are to be; they are written on its own disk.
        contents: by name.
        before: called between the two.

    Raises:
        OSError: as `replace_file`; the old files stay.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".complete-") as complete:
        for name, content in contents.items():
            replace_file(Path(complete, name), content)
        if before is not None:
            before()
        for name in contents:
            os.replace(Path(complete, name), folder / name)
