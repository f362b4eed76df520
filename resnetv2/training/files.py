"""Files that are written whole or not at all.

The bytes go to a temporary file in the same folder, which then takes the name: ``fsync``,
``os.replace``, ``fsync`` of the folder. A process killed at any point, or a disk that fills up,
leaves what was there.

The temporary file has one name in each folder, and its writer holds a lock on it. The system frees
the lock of a process that was killed, and the next writer in that folder takes the file over, or
removes it where it is another name of a finished one: there is at most one leftover, and nobody has
to find out whose it is.
"""

import contextlib
import errno
import io
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import InputError

if sys.platform != "win32":
    import fcntl

__all__ = ["make_folder", "reason_of", "write_atomically"]

_TEMPORARY = ".writing.partial"
# A further name of it, which becomes the first of two while the temporary one still holds the lock.
_LINK = ".linked.partial"


class _RecordingFile(io.FileIO):
    """A file that remembers why it could not be written.

    ``torch.save`` turns an error of the file into one of its own, about positions in the archive.
    """

    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise


def write_atomically(
    path: Path, write: Callable[[BinaryIO], object], second: Path | None = None
) -> None:
    """Replace ``path`` by what ``write`` writes to the file it is given, all of it or nothing.

    The folder must exist. When this returns, the content and the name are on the disk, as far as
    the system's ``fsync`` promises. Until then ``path`` is what it was. Of two processes that write
    into one folder, the second waits for the first.

    Args:
        path: the file.
        write: is called once with a binary file, which need not be closed.
        second: another name for the file, in the same folder, given after the first. It is a copy
            where the file system has no links.

    Raises:
        InputError: the system refuses (no space, no permission, a read-only disk), in one line.
    """
    temporary = path.with_name(_TEMPORARY)
    raw = None
    try:
        raw = _own(temporary)
        file: BinaryIO = io.BufferedWriter(raw, buffer_size=1 << 20)
        try:
            linked = _fill(file, write, temporary, path, second)
        finally:
            # Closing flushes once more; what that could say has been said.
            with contextlib.suppress(OSError):
                file.close()
        _sync_folder(path.parent)
    except BaseException as error:
        refusal = error if isinstance(error, OSError) else raw and raw.error
        if refusal:
            raise InputError(f"cannot write {path}: {reason_of(refusal)}") from refusal
        raise
    if second is not None and not linked:
        with path.open("rb") as original:
            write_atomically(second, lambda file: shutil.copyfileobj(original, file, 1 << 20))


def _fill(
    file: BinaryIO,
    write: Callable[[BinaryIO], object],
    temporary: Path,
    path: Path,
    second: Path | None,
) -> bool:
    """Write the temporary file and give it its names, or remove it; whether it has both."""
    try:
        write(file)
        file.flush()
        os.fsync(file.fileno())
        if sys.platform == "win32":
            file.close()  # Windows renames no open file
        # Still open, and one name after the other: whoever waits for the lock on the temporary name
        # must not get it before both have moved on.
        last = path
        if second is not None and _linked(temporary, path):
            last = second
        os.replace(temporary, last)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    return second is None or last == second


def _linked(temporary: Path, path: Path) -> bool:
    """Whether ``path`` could become another name of the file."""
    link = temporary.with_name(_LINK)
    try:
        os.link(temporary, link)
        os.replace(link, path)
    except OSError:
        with contextlib.suppress(OSError):
            link.unlink()
        return False
    return True


def _own(temporary: Path) -> _RecordingFile:
    """The temporary file, empty, and locked until it is closed."""
    while True:
        file = _RecordingFile(os.open(temporary, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            if sys.platform != "win32":
                # Some network file systems have no locks; there a run needs its folder for itself.
                with contextlib.suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_EX)
            # The one that had it before may have given it its own name, or removed it.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), temporary.stat()):
                    if os.fstat(file.fileno()).st_nlink == 1:
                        file.truncate(0)
                        return file
                    # Killed between its two names: what has the first must stay whole.
                    temporary.with_name(_LINK).unlink(missing_ok=True)
                    temporary.unlink()
        except BaseException:
            file.close()
            raise
        file.close()


def make_folder(folder: Path) -> None:
    """Create ``folder`` and those above it, durably. Raises InputError."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for place in missing:
            _sync_folder(place.parent)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {reason_of(error)}") from error


def _sync_folder(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        # Windows opens no folders; there a rename is as durable as the system makes it.
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems have no such thing for folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def reason_of(error: OSError) -> str:
    """The system's words for ``error``, in a line without the path."""
    return (error.strerror or str(error)).partition("\n")[0]
