"""AppendFile: lines appended by one writer, and what a kill, a full disk or a second writer may do to them."""

import contextlib
import errno
import os
import sys
import warnings
import weakref
from pathlib import Path
from typing import NoReturn

from anybatch._errors import AnybatchWarning, InvalidValueError, UsageError

_LOCK_BYTE = 0x7FFF0000  # Windows locks bytes, and a locked byte cannot be read: one beyond the end of any record
_open_files: "weakref.WeakSet[AppendFile]" = weakref.WeakSet()


class AppendFile:
    """A file that only grows, by whole lines, and that this object alone writes to.

    A line goes out in one write in append mode: a process killed before it leaves nothing, after it the line. A kill
    in the middle of the write, or a disk that fills up there, tears this one line; the next starts on a line of its
    own. The lock is the operating system's and ends with the process, however that ends.

    Args:
        path: the file; made with its folders, appended to where it exists.

    Raises:
        InvalidValueError: the file cannot be opened for writing.
        UsageError: somebody else writes to it.
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
        """Refuse to be copied: in another process, or once this file is closed, the number names a file of others.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            f"A RunRecord is not copied or sent to another process: give it the path {str(self.path)!r}, of which each "
            "process opens its own."
        )

    def first_line(self) -> bytes | None:
        """The first line, at most 64 KiB of it; `None` where there is none."""
        if os.fstat(self._file).st_size == 0:
            return None
        os.lseek(self._file, 0, os.SEEK_SET)
        return os.read(self._file, 65536).partition(b"\n")[0]

    @property
    def open(self) -> bool:
        """Whether lines can be appended: not closed, and not of a process that was forked since."""
        return self._file >= 0

    def append(self, line: bytes, *, needed: bool = False) -> None:
        """Append a line, its newline included. What the disk does not take is lost, with one warning.

        Args:
            line: the bytes.
            needed: do not lose it: what could not be written now goes before the next line.

        Raises:
            UsageError: the file is closed.
        """
        if not self.open:
            raise UsageError(f"{str(self.path)!r} is closed, or was opened before this process was forked.")
        try:
            self._write((b"\n" if self._torn else b"") + self._owed + line)
            self._owed = b""
        except OSError as error:
            self._owed += line if needed else b""
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"{str(self.path)!r} could not be written: {error.strerror}. Training goes on; the file lacks what "
                    "comes until it can be written again.",
                    AnybatchWarning,
                    stacklevel=2,
                )

    def close(self) -> None:
        """Close the file and let others write to it; closing twice does nothing."""
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
        size = os.fstat(self._file).st_size
        if size == 0:
            return False
        os.lseek(self._file, size - 1, os.SEEK_SET)
        return os.read(self._file, 1) != b"\n"


def _close(file: int) -> None:
    with contextlib.suppress(OSError):  # a network disk may tell only now that it is full: there is nothing left to do
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
            "process, or detach() its controller, or close() its RunRecord, or give this run a file of its own. If it "
            "is another rank that writes: give attach the path, or make the RunRecord on rank 0 alone."
        ) from None


def _forget_all() -> None:
    for file in list(_open_files):
        file.close()


if hasattr(os, "register_at_fork"):  # a DataLoader's workers would hold the lock beyond their parent's death
    os.register_at_fork(after_in_child=_forget_all)
