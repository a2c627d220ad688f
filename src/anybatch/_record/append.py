"""AppendFile: lines appended by one writer, under kills, full disks and second writers."""

import contextlib
import errno
import os
import sys
import warnings
import weakref
from pathlib import Path
from typing import NoReturn

from anybatch._errors import AnybatchWarning, InvalidValueError, UsageError

_LOCK_BYTE = 0x7FFF0000  # Windows makes locked bytes unreadable: this one is beyond the end of any record
_open_files: "weakref.WeakSet[AppendFile]" = weakref.WeakSet()


class AppendFile:
    """A file that grows by whole lines, with this object as the only writer.

    Each line is one write in append mode. A kill or a full disk during the write tears this line alone: the next one
    starts on a new line. The operating system's lock ends with the process. A second writer gets a `UsageError`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
            self._file = os.open(path, flags, 0o644)
        except (OSError, ValueError) as error:  # a name with a null byte is a ValueError
            why = getattr(error, "strerror", None) or error
            raise InvalidValueError(
                f"Cannot write to {str(path)!r}: {why}. Give a file in a folder that may be written to."
            ) from None
        self._close = weakref.finalize(self, _close, self._file)
        try:
            _lock(self._file, path)
        except UsageError:
            self.close()
            raise
        self._torn = self._ends_torn()
        self._owed = b""
        self._warned = False
        _open_files.add(self)

    def __reduce__(self) -> NoReturn:
        """Raise: in another process, or after `close`, the descriptor's number belongs to another file."""
        raise UsageError(
            f"A RunRecord cannot be copied or sent to another process: pass the path {str(self.path)!r}, of which each "
            "process opens its own RunRecord."
        )

    def first_line(self) -> bytes | None:
        """At most 64 KiB of the first line; `None` for an empty file."""
        if os.fstat(self._file).st_size == 0:
            return None
        os.lseek(self._file, 0, os.SEEK_SET)
        return os.read(self._file, 65536).partition(b"\n")[0]

    @property
    def open(self) -> bool:
        """Whether lines can be appended: false after `close` and in a forked process."""
        return self._file >= 0

    def append(self, line: bytes, *, needed: bool = False) -> None:
        """Append a line, newline included. On a full disk it is lost with one warning, or if `needed` written later."""
        if not self.open:
            raise UsageError(
                f"{str(self.path)!r} is closed, or was opened before this process was forked: make a new RunRecord."
            )
        try:
            self._write((b"\n" if self._torn else b"") + self._owed + line)
            self._owed = b""
        except OSError as error:
            self._owed += line if needed else b""
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"{str(self.path)!r} could not be written: {error.strerror}. Training continues; the file lacks "
                    "all lines until it can be written again.",
                    AnybatchWarning,
                    stacklevel=2,
                )

    def close(self) -> None:
        """Close and unlock the file; closing twice does nothing."""
        self._file = -1
        self._close()

    def _write(self, data: bytes) -> None:
        done = 0
        try:
            while done < len(data):
                done += os.write(self._file, data[done:])
        finally:
            if done:
                self._torn = data[done - 1 : done] != b"\n"

    def _ends_torn(self) -> bool:
        if os.fstat(self._file).st_size == 0:
            return False
        os.lseek(self._file, -1, os.SEEK_END)
        return os.read(self._file, 1) != b"\n"


def _close(file: int) -> None:
    with contextlib.suppress(OSError):  # a full network disk may raise here, and nothing can be done
        os.close(file)


def _lock(file: int, path: Path) -> None:
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(file, _LOCK_BYTE, os.SEEK_SET)
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            return  # a file system without locks
        raise UsageError(
            f"{str(path)!r} is being written by another run, or by an earlier one that is still open. End that "
            "process, detach() its controller, close() its RunRecord, or give this run a file of its own. If another "
            "rank is the writer, pass the path to attach, or make the RunRecord on rank 0 alone."
        ) from None


def _close_all() -> None:
    for file in list(_open_files):
        file.close()


if hasattr(os, "register_at_fork"):  # else a DataLoader's workers would hold the lock after their parent's end
    os.register_at_fork(after_in_child=_close_all)
