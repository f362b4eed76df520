"""Files that are written whole or not at all.

The bytes go to a temporary file in the same folder, which then takes the name: `fsync`,
`os.replace`, `fsync` of the folder. A process killed at any point, or a disk that fills up, leaves
what was there.
"""

import contextlib
import errno
import io
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import InputError

__all__ = ["link_atomically", "make_folder", "reason_of", "remove_leftovers", "write_atomically"]

_TEMPORARY = re.compile(r"\..+\.(?P<host>[^.]+)\.(?P<pid>\d+)\.(?P<token>[0-9a-f]{8})\.partial")
# A writer adds to its file every few seconds; one that has not for a day is gone.
_ABANDONED_SECONDS = 24 * 60 * 60

# Of this process's writers that are at work, in any thread.
_writing: set[str] = set()


class _RecordingFile(io.FileIO):
    """A file that remembers why it could not be written.

    `torch.save` turns an error of the file into one of its own, about positions in the archive.
    """

    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replace `path` by what `write` writes to the file it is given, all of it or nothing.

    The folder must exist. When this returns, the content and the name are on the disk, as far as
    the system's `fsync` promises. Until then `path` is what it was. Two processes that write one
    path at once each write a temporary file of their own; the later one's content stays.

    Args:
        path: the file.
        write: is called once with a binary file, which need not be closed.

    Raises:
        InputError: the system refuses (no space, no permission, a read-only disk), in one line.
    """
    temporary = _temporary_name(path)
    _writing.add(temporary.name)
    raw = None
    try:
        raw = _RecordingFile(temporary, "xb")
        file = io.BufferedWriter(raw, buffer_size=1 << 20)
        try:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        finally:
            # Closing flushes once more; what that could say has been said.
            with contextlib.suppress(OSError):
                file.close()
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        refusal = error if isinstance(error, OSError) else raw and raw.error
        if refusal:
            raise InputError(f"cannot write {path}: {reason_of(refusal)}") from refusal
        raise
    finally:
        _writing.discard(temporary.name)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files in `folder` of writers that were killed.

    Those are the files of processes of this machine that no longer run, and any that nobody has
    written to for a day. What cannot be removed is left.
    """
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if _is_abandoned(path):
                with contextlib.suppress(OSError):
                    path.unlink()


def link_atomically(source: Path, path: Path) -> None:
    """Make `path` another name of `source`, or a copy where the file system has no links.

    Raises:
        InputError: the system refuses both.
    """
    temporary = _temporary_name(path)
    _writing.add(temporary.name)
    try:
        os.link(source, temporary)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError:
        with source.open("rb") as original:
            write_atomically(path, lambda file: shutil.copyfileobj(original, file, 1 << 20))
    finally:
        # Replacing a name of a file by another name of it does nothing and leaves both.
        with contextlib.suppress(OSError):
            temporary.unlink()
        _writing.discard(temporary.name)


def _temporary_name(path: Path) -> Path:
    owner = f"{_host()}.{os.getpid()}.{secrets.token_hex(4)}"
    return path.with_name(f".{path.name}.{owner}.partial")


def _host() -> str:
    # No dot, which parts the fields of a name, and no path separator.
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname()) or "host"


def _is_abandoned(path: Path) -> bool:
    name = _TEMPORARY.fullmatch(path.name)
    if name is None or path.name in _writing:
        return False
    try:
        if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
            return True
    except OSError:
        return False
    if name["host"] != _host():
        return False
    process = int(name["pid"])
    # Not one of this process's writers: of one with its number before a restart of the container.
    return process == os.getpid() or not _is_running(process)


def _is_running(process: int) -> bool:
    if os.name != "posix":
        # os.kill would end the process there.
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def make_folder(folder: Path) -> None:
    """Create `folder` and those above it, durably. Raises InputError."""
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
    """What the system says about `error`, in a line without the path."""
    return (error.strerror or str(error)).partition("\n")[0]
