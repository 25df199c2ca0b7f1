"""Files and directories that a user names: where they are not what they should be, one sentence says so, and what helps."""

import errno
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accessory.errors import UserError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
WEB_PAGES = (b"<!doctype html", b"<html")


def check_file(path: str | Path, expected: str) -> Path:
    """The path, if it is that of a file that can be read and holds what its name says rather than a stand-in.

    Raises:
        UserError: it is not; what is ``expected`` stands in the sentence.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise UserError(f"{path}: a directory; expected {expected}")
        if not stat.S_ISREG(mode):
            raise UserError(f"{path}: a pipe or device, which cannot be read twice; expected {expected}")
        with open(path, "rb") as file:
            start = file.read(256)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{path}: no such file; expected {expected}{_download_hint(path)}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if start.startswith(LFS_POINTER):
        raise UserError(f"{path}: a Git-LFS pointer and not the file itself: run git lfs pull in {path.parent}")
    if start.lstrip().lower().startswith(WEB_PAGES):
        raise UserError(
            f"{path}: a web page and not the file itself, as a download leaves it that was not logged in or followed a "
            f"link to be looked at: fetch it anew, e.g. hf download NAME --local-dir {path.parent}"
        )
    return path


def check_directory(path: str | Path, expected: str) -> Path:
    """The path, if it is that of a directory that can be listed. Raises UserError with what is ``expected`` if not."""
    path = Path(path)
    try:
        os.scandir(path).close()
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such directory; expected {expected}{_download_hint(path)}") from error
    except NotADirectoryError as error:
        raise UserError(f"{path}: not a directory; expected {expected}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    return path


def check_writable(path: Path) -> None:
    """Raise UserError unless a file can be written at ``path``, before time is spent on what it is to hold."""
    if path.is_dir():
        raise UserError(f"{path}: cannot be written: a directory; name a file")
    if path.exists() and (not path.is_file() or (path.is_symlink() and os.readlink(path).startswith("/proc/"))):
        # a new file would take its name, /dev/null's for everybody
        raise UserError(f"{path}: cannot be written: a pipe or device; name a file")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(0, "Permission denied")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}; name a file in a directory of yours") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to, which then takes its place: what bears the name is whole.

    Raises:
        UserError: it cannot be written; nothing is left behind.
    """
    unfinished = path.with_name(f".unfinished-{path.name}")
    try:
        yield unfinished
        unfinished.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until what was written to a file, or the names in a directory, is on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that does not know this of directories
            raise
    finally:
        os.close(opened)


def write_rate(directory: Path, size: int = 32 * 2**20) -> float:
    """Bytes per second that reach the disk of ``directory`` from here: ``size`` are written, and go again."""
    content, began = os.urandom(2**20), time.perf_counter()
    with tempfile.TemporaryFile(dir=directory) as file:
        for _ in range(size // len(content)):
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return size / (time.perf_counter() - began)


def _download_hint(path: Path) -> str:
    """Where a path is no path but a model's name, or a web address: how to get it."""
    name = str(path)
    if re.match(r"\w+:/", name):
        return "; web addresses are not read, download it first"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not path.parent.exists():
        return f"; if that is a model's name at Hugging Face: hf download {name} --local-dir DIR, and name DIR"
    return ""
