"""A directory appears under its name only when it is whole: written under a temporary name, then renamed."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from accessory.errors import UserError
from accessory.files import check_file, sync

# the files that go along with weights and configuration in every format
CARRIED = (
    "tokenizer.model*",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "tekken.json",
    "visual.safetensors",
)


def temporary_name(directory: Path) -> Path:
    """The temporary directory in which ``directory`` is written before it gets its name."""
    return directory.with_name(f".{directory.name}.partial")


def prepare_directory(directory: Path) -> Path:
    """Make an empty temporary directory beside ``directory``, to be filled and then published. Remains of an earlier
    attempt are removed."""
    temporary = temporary_name(directory)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{directory}: cannot be written ({error.strerror})") from error
    return temporary


def publish_directory(directory: Path) -> None:
    """Flush a completely written temporary directory to disk, then rename it to its final name. A directory with that name
    is therefore complete, whenever the machine fails."""
    temporary = temporary_name(directory)
    for path in (*temporary.rglob("*"), temporary):
        sync(path)
    old = directory.with_name(f".{directory.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists() and any(directory.iterdir()):
        directory.rename(old)
    temporary.rename(directory)
    sync(directory.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_directory(directory: Path) -> None:
    """Remove a published directory. It is renamed first, so that a partial one never has its name."""
    directory.rename(temporary_name(directory))
    shutil.rmtree(temporary_name(directory))


@contextmanager
def claimed(directory: Path) -> Iterator[None]:
    """Make a run directory and lock it against other jobs. If it was made here and stays empty, it is removed in the end.

    Raises:
        UserError: it cannot be written, or another job has locked it.
    """
    lock = directory / ".lock"
    made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = open(lock, "a")  # noqa: SIM115 (it is held below)
    except OSError as error:
        raise UserError(f"{directory}: cannot be written ({error.strerror})") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{directory}: another job is writing into it; stop that one, or set another out") from error
        except OSError:  # a file system without locks
            pass
        try:
            yield
        finally:
            if made and [*directory.iterdir()] == [lock]:
                lock.unlink()
                with suppress(OSError):  # another job has begun to write beside it
                    for folder in made:
                        folder.rmdir()


def companion_files(directory: Path) -> dict[str, Path]:
    """A checkpoint directory's files that ``CARRIED`` names, by their names in the directory."""
    paths = (path for pattern in CARRIED for path in sorted(directory.glob(pattern)) if path.is_file())
    return {path.relative_to(directory).as_posix(): path for path in paths}


def check_companions(companions: dict[str, Path]) -> None:
    """Raise UserError if one cannot be read, or is a placeholder."""
    for path in companions.values():
        check_file(path, "a file of the tokenizer or of generation settings")


def copy_companions(companions: dict[str, Path], directory: Path) -> None:
    """Copy files into ``directory`` under the given names."""
    check_companions(companions)
    for name, path in companions.items():
        (directory / name).parent.mkdir(exist_ok=True)
        if path.suffix == ".safetensors":  # frozen encoders: a hard link, where the file system can
            with suppress(OSError):
                os.link(path.resolve(), directory / name)
                continue
        shutil.copyfile(path, directory / name)
