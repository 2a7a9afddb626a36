"""Files and directories that appear whole or not at all: written aside, then renamed into place.

What is written aside is locked by the process that writes it (flock), and the lock ends with the process, however it
ends: the next output to the same place deletes what a killed process left.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aletheia_tune.errors import UserError

_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# Libraries written in Rust (safetensors, tokenizers) raise errors of their own, with errno only in the text.
_RUST_ERRNO = re.compile(r"\(os error (\d+)\)")


def is_disk_full(error: BaseException) -> bool:
    """Whether ``error``, or an error that it was raised from, says that no more can be stored.

    That is ENOSPC (no space), EDQUOT (quota), EFBIG (file size limit), as an ``OSError`` or in the text of
    safetensors' own I/O error.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _DISK_FULL:
            return True
        if any(int(number) in _DISK_FULL for number in _RUST_ERRNO.findall(str(cause))):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def check_output(path: str | os.PathLike[str], overwrite: bool = False, *, directory: bool = True) -> None:
    """Refuses an output path that cannot be written to, so that a command can say so before long work.

    Args:
        path: where the output will be. With ``directory`` it may be absent or an empty directory; without, it
            is a file that may be absent and whose parent must exist.
        overwrite: allows a directory that is not empty, or a file that exists.
        directory: whether the output is a directory (`output_directory`) or a file (`write_text`).

    Raises:
        UserError: the path is taken (naming ``--overwrite`` where that would help), is of the other kind,
            lies under something that is not a directory, or cannot be read; or overwriting would delete the
            current or the home directory, or one in which a race is going on.
    """
    target = _resolve(path)
    try:
        if directory:
            _check_directory(target, path, overwrite)
        else:
            _check_file(target, path, overwrite)
    except OSError as error:
        raise UserError(f"cannot use {path} as output: {error.strerror}") from error


def check_apart(path: str | os.PathLike[str], *inputs: str | os.PathLike[str] | None) -> None:
    """Refuses an output in whose place, or under which, something lies that the same command reads.

    Args:
        path: where the output will be.
        inputs: what is read; None is passed over.

    Raises:
        UserError: one of them would go with what the output replaces.
    """
    target = _resolve(path)
    for given in inputs:
        if given is not None:
            place = _resolve(given)
            if target == place or target in place.parents:
                raise UserError(
                    f"output {path} would replace {given}, which this command needs: choose another output"
                )


def read_text(path: str | os.PathLike[str], what: str) -> str:
    """The text of a file that the user named.

    Args:
        path: the file, in UTF-8.
        what: it is, for the message.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"cannot read the {what} file {path}: {reason}") from None


def write_text(path: str | os.PathLike[str], text: str, overwrite: bool = False) -> None:
    """`write_bytes` of ``text`` in UTF-8."""
    write_bytes(path, text.encode("utf-8"), overwrite)


def write_bytes(path: str | os.PathLike[str], content: bytes, overwrite: bool = False) -> None:
    """Writes ``content`` to ``path`` whole: a failure leaves the old file, or none, and nothing else.

    It is on the disk, and not in the system's memory alone, when this returns.

    Raises:
        UserError: ``path`` exists and ``overwrite`` is false, is a directory, its parent is missing, it
            cannot be written to, or the disk is full.
    """
    check_output(path, overwrite, directory=False)
    target = _resolve(path)
    sweep(target)
    aside = _sibling(target, "partial")
    try:
        with open(aside, "xb") as stream:
            _lock(stream.fileno())
            _write(stream.fileno(), content)
            os.fsync(stream.fileno())
            os.replace(aside, target)
        _sync_directory(target.parent)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if is_disk_full(error):
            raise _no_space(path) from error
        if isinstance(error, OSError):
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        raise


@contextmanager
def output_directory(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yields a fresh directory that becomes ``path`` when the block ends without an exception.

    With ``overwrite`` the old directory stays in place until then; it is moved away, the new one renamed in,
    and the old one deleted. Without, a directory that another has filled meanwhile stays as it is, and the finished
    one beside it. By then its files are on the disk, and not in the system's memory alone. On an
    exception the fresh directory goes, with the parents made for it, and the exception continues; one that says
    that the disk is full continues as a `UserError`.

    Raises:
        UserError: at entry, what `check_output` refuses; later, a full disk, or a path that was taken meanwhile.
    """
    check_output(path, overwrite)
    target = _resolve(path)
    sweep(target)
    missing_parents = [parent for parent in target.parents if not parent.exists()]
    aside = _sibling(target, "partial")
    held: int | None = None
    try:
        try:
            aside.mkdir(parents=True)
        except OSError as error:
            if is_disk_full(error):
                raise
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        held = os.open(aside, os.O_RDONLY)
        _lock(held)
        yield aside
        for written in aside.rglob("*"):
            if written.is_file():
                _sync(written)
        _rename_into_place(aside, target, path, overwrite)
        _sync_directory(target.parent)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        for parent in missing_parents:
            try:
                parent.rmdir()
            except OSError:
                break
        if is_disk_full(error) and not isinstance(error, UserError):
            raise _no_space(path) from error
        raise
    finally:
        if held is not None:
            os.close(held)


@contextmanager
def held(directory: Path, what: str) -> Iterator[None]:
    """A directory for this process alone, where its file system knows locks; nothing is written for it.

    Args:
        directory: must be there.
        what: is going on in it, for the message.

    Raises:
        UserError: another process holds it.
    """
    file = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"a {what} is going on in {directory}: let it end, or choose another directory"
                ) from None
        yield
    finally:
        os.close(file)


def sweep(target: Path) -> None:
    """Deletes what was written aside for this output by processes that are no more.

    What one of them had moved away, to put its own in that place, goes back if the place is still empty.
    """
    with contextlib.suppress(OSError):
        writers_live = False
        for path in _siblings(target, "partial"):
            file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _delete(path)
            except BlockingIOError:
                writers_live = True
            finally:
                os.close(file)
        if not writers_live:
            for path in _siblings(target, "old"):
                if target.exists():
                    _delete(path)
                else:
                    os.rename(path, target)


def _siblings(target: Path, kind: str) -> list[Path]:
    named = re.compile(re.escape(f".{target.name[:64]}.{kind}-") + "[0-9a-f]{12}")
    return [path for path in target.parent.iterdir() if named.fullmatch(path.name)]


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink()


def _check_directory(target: Path, path: str | os.PathLike[str], overwrite: bool) -> None:
    if target.is_dir():
        if not any(target.iterdir()):
            return
        if not overwrite:
            raise UserError(
                f"output directory {path} exists and is not empty: choose another or pass --overwrite"
            )
        here = Path.cwd().resolve()
        if target == here or target in here.parents or target == Path.home().resolve():
            raise UserError(
                f"output directory {path} holds the current or the home directory: choose another"
            )
        with held(target, "race"):
            pass  # refused while one writes there
    elif os.path.lexists(target):
        raise UserError(f"output directory {path} is a file: choose another name")
    else:
        ancestor = next(parent for parent in target.parents if parent.exists())
        if not ancestor.is_dir():
            raise UserError(f"output directory {path} lies under {ancestor}, which is not a directory")


def _check_file(target: Path, path: str | os.PathLike[str], overwrite: bool) -> None:
    if target.is_dir():
        raise UserError(f"output file {path} is a directory: give a file name")
    if not target.parent.is_dir():
        raise UserError(f"directory {target.parent} of output file {path} does not exist: create it first")
    if os.path.lexists(target) and not overwrite:
        raise UserError(f"output file {path} exists: choose another name or pass --overwrite")


def _rename_into_place(aside: Path, target: Path, path: str | os.PathLike[str], overwrite: bool) -> None:
    if not overwrite:
        _rename_to_empty(aside, target, path)
        return
    try:
        if not target.exists():
            os.rename(aside, target)
            return
        old = _sibling(target, "old")
        os.rename(target, old)
        try:
            os.rename(aside, target)
        except OSError:
            os.rename(old, target)
            raise
    except OSError as error:
        if is_disk_full(error):
            raise
        raise UserError(f"cannot put the finished output at {path}: {error.strerror}") from error
    shutil.rmtree(old, ignore_errors=True)


def _rename_to_empty(aside: Path, target: Path, path: str | os.PathLike[str]) -> None:
    try:
        os.rename(aside, target)  # takes the place of an empty directory too
    except OSError as error:
        if is_disk_full(error):
            raise
        finished = target.parent / f"{target.name[:64]}.finished-{uuid.uuid4().hex[:12]}"
        os.rename(aside, finished)
        raise UserError(
            f"{path} was taken while this ran ({error.strerror}): what was to be there is in {finished}"
        ) from error


def _resolve(path: str | os.PathLike[str]) -> Path:
    # A link is followed, so that what it points to is replaced and the link stays.
    try:
        return Path(path).resolve()
    except (OSError, RuntimeError) as error:  # pathlib raises RuntimeError on a loop of links
        raise UserError(f"cannot use {path} as output: it cannot be resolved ({error})") from error


def _sibling(target: Path, kind: str) -> Path:
    # Not tempfile: its files and directories are private (0600, 0700), and the finished output should follow umask.
    return target.parent / f".{target.name[:64]}.{kind}-{uuid.uuid4().hex[:12]}"


def _lock(file: int) -> None:
    # A file system without locks: nothing there is ever taken for a dead process's.
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _write(file: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(file, view) :]


def _sync_directory(directory: Path) -> None:
    """The rename itself reaches the disk, where the file system knows how."""
    with contextlib.suppress(OSError):
        _sync(directory)


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _no_space(path: str | os.PathLike[str]) -> UserError:
    kept = "what was there is kept" if os.path.lexists(path) else "nothing was kept there"
    return UserError(f"no space left to write {path}: free some or choose another disk; {kept}")
