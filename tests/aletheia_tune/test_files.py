from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest
from safetensors import SafetensorError

from aletheia_tune import files
from aletheia_tune.errors import NonFiniteLoss, UserError


def listing(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def full_disk() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


def test_a_user_error_is_one_line():
    assert str(UserError("two\n  lines\r\nhere")) == "two lines here"
    assert NonFiniteLoss("loss is NaN at step 3", step=3).step == 3


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "x"), True),
        (OSError(errno.EDQUOT, "x"), True),
        (OSError(errno.EFBIG, "x"), True),
        (OSError(errno.EACCES, "x"), False),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (SafetensorError("Error while serializing: I/O error: Permission denied (os error 13)"), False),
        (ValueError("28"), False),
    ],
)
def test_is_disk_full(error, full):
    assert files.is_disk_full(error) is full
    wrapped = RuntimeError("saving failed")
    wrapped.__cause__ = error
    assert files.is_disk_full(wrapped) is full


def test_write_text_writes_what_it_was_given_and_leaves_nothing_beside(tmp_path):
    target = tmp_path / "plan.json"
    files.write_text(target, "ä\n")
    assert target.read_bytes() == "ä\n".encode()
    with pytest.raises(UserError, match=r"exists.*--overwrite"):
        files.write_text(target, "new")
    assert target.read_text() == "ä\n"
    files.write_text(target, "new", overwrite=True)
    assert target.read_text() == "new"
    assert listing(tmp_path) == ["plan.json"]


def test_write_text_follows_umask_and_links(tmp_path):
    real, link = tmp_path / "real.txt", tmp_path / "link.txt"
    link.symlink_to(real)
    old = os.umask(0o027)
    try:
        files.write_text(link, "text", overwrite=True)
    finally:
        os.umask(old)
    assert link.is_symlink()
    assert real.read_text() == "text"
    assert real.stat().st_mode & 0o777 == 0o640


def test_write_text_refuses_a_directory_and_a_missing_parent(tmp_path):
    with pytest.raises(UserError, match="is a directory"):
        files.write_text(tmp_path, "x", overwrite=True)
    with pytest.raises(UserError, match="does not exist"):
        files.write_text(tmp_path / "no" / "plan.json", "x")
    assert listing(tmp_path) == []


def test_write_text_on_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "plan.json"
    target.write_text("old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(full_disk()))
    with pytest.raises(UserError, match=r"no space left to write .*plan\.json"):
        files.write_text(target, "new", overwrite=True)
    assert target.read_text() == "old"
    assert listing(tmp_path) == ["plan.json"]


def test_write_text_over_the_file_size_limit(tmp_path):
    # A real EFBIG from the kernel, in a child because the limit cannot be raised again.
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
            files.write_text(tmp_path / "big", "x" * 5000)
        except UserError as error:
            status = 0 if "no space left" in str(error) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert listing(tmp_path) == []


def test_what_a_killed_process_left_is_swept_and_what_a_living_one_writes_is_not(tmp_path):
    target, mine = tmp_path / "out", tmp_path / ".out.partial-notes"
    mine.write_text("not written by this package")
    child = os.fork()
    if not child:
        with files.output_directory(target) as directory:
            (directory / "weights").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(listing(tmp_path)) == 3
    with files.output_directory(target) as living:
        files.write_text(target, "a file for once")  # sweeps for the same name
        assert living.is_dir()
        target.unlink()
        (living / "weights").write_text("whole")
    assert listing(tmp_path) == [".out.partial-notes", "out", "out/weights"]


def test_what_another_put_there_meanwhile_stays(tmp_path):
    target = tmp_path / "out"

    def write_while_another_does() -> None:
        with files.output_directory(target) as directory:
            (directory / "mine").write_text("mine")
            target.mkdir()
            (target / "theirs").write_text("theirs")

    with pytest.raises(UserError, match=r"was taken while this ran .* is in .*out\.finished-"):
        write_while_another_does()
    assert (target / "theirs").read_text() == "theirs"
    (finished,) = tmp_path.glob("out.finished-*")
    assert (finished / "mine").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["out", finished.name])


def test_an_empty_directory_made_meanwhile_is_taken(tmp_path):
    target = tmp_path / "out"
    with files.output_directory(target) as directory:
        (directory / "mine").write_text("mine")
        target.mkdir()
    assert listing(tmp_path) == ["out", "out/mine"]


def test_what_was_moved_away_by_a_killed_process_comes_back(tmp_path):
    target, old = tmp_path / "out", tmp_path / ".out.old-0123456789ab"
    old.mkdir()
    (old / "weights").write_text("whole")
    files.sweep(target)
    assert listing(tmp_path) == ["out", "out/weights"]
    old.mkdir()
    files.sweep(target)
    assert listing(tmp_path) == ["out", "out/weights"]


def test_output_directory_appears_only_when_the_block_ends(tmp_path):
    target = tmp_path / "runs" / "demo"
    with files.output_directory(target) as directory:
        (directory / "a.txt").write_text("a")
        assert not target.exists()
        assert directory.parent == target.parent
    assert listing(tmp_path) == ["runs", "runs/demo", "runs/demo/a.txt"]
    assert target.stat().st_mode & 0o777 == (0o777 & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), NonFiniteLoss("NaN", step=1)])
def test_output_directory_leaves_nothing_on_an_exception(tmp_path, error):
    def fail_half_way():
        with files.output_directory(tmp_path / "new" / "demo") as directory:
            (directory / "half.txt").write_text("half")
            raise error

    with pytest.raises(type(error)) as raised:
        fail_half_way()
    assert raised.value is error
    assert listing(tmp_path) == []


@pytest.mark.parametrize(
    "error", [full_disk(), SafetensorError("I/O error: No space left on device (os error 28)")]
)
def test_output_directory_says_that_the_disk_is_full(tmp_path, error):
    with (
        pytest.raises(UserError, match=r"no space left to write .*demo"),
        files.output_directory(tmp_path / "demo"),
    ):
        raise error
    assert listing(tmp_path) == []


def test_output_directory_refuses_what_is_there(tmp_path):
    full, file, empty = tmp_path / "full", tmp_path / "file", tmp_path / "empty"
    full.mkdir()
    (full / "kept.txt").write_text("kept")
    file.write_text("kept")
    empty.mkdir()
    before = listing(tmp_path)
    for path, overwrite, said in [
        (full, False, "not empty.*--overwrite"),
        (file, False, "is a file"),
        (file, True, "is a file"),
        (file / "under", True, "not a directory"),
    ]:
        with pytest.raises(UserError, match=said):
            files.check_output(path, overwrite)
        with pytest.raises(UserError, match=said), files.output_directory(path, overwrite):
            raise AssertionError("the block must not run")
    assert listing(tmp_path) == before
    with files.output_directory(empty) as directory:
        (directory / "new.txt").write_text("new")
    assert (empty / "new.txt").read_text() == "new"


def test_output_directory_overwrites_whole_or_not_at_all(tmp_path):
    target = tmp_path / "demo"
    target.mkdir()
    (target / "old.txt").write_text("old")
    with pytest.raises(ValueError, match="mine"), files.output_directory(target, overwrite=True):
        raise ValueError("mine")
    assert listing(tmp_path) == ["demo", "demo/old.txt"]
    with files.output_directory(target, overwrite=True) as directory:
        (directory / "new.txt").write_text("new")
        assert (target / "old.txt").exists()
    assert listing(tmp_path) == ["demo", "demo/new.txt"]


def test_output_directory_puts_the_old_one_back_when_the_rename_fails(tmp_path, monkeypatch):
    target = tmp_path / "demo"
    target.mkdir()
    (target / "old.txt").write_text("old")
    rename = os.rename

    def refuse_new(source, destination):
        if "partial" in Path(source).name:
            raise PermissionError(errno.EACCES, "Permission denied")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", refuse_new)
    with pytest.raises(UserError, match="Permission denied"), files.output_directory(target, overwrite=True):
        pass
    assert listing(tmp_path) == ["demo", "demo/old.txt"]


def test_output_directory_never_replaces_where_the_user_is(tmp_path, monkeypatch):
    inner = tmp_path / "project" / "inner"
    inner.mkdir(parents=True)
    (inner / "work.txt").write_text("work")
    monkeypatch.chdir(inner)
    for path in (".", "..", tmp_path / "project"):
        with pytest.raises(UserError, match="current or the home directory"):
            files.check_output(path, overwrite=True)
    monkeypatch.setenv("HOME", str(tmp_path / "project"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="current or the home directory"):
        files.check_output("project", overwrite=True)


def test_check_output_of_a_file(tmp_path):
    files.check_output(tmp_path / "scores.json", directory=False)
    (tmp_path / "scores.json").write_text("{}")
    with pytest.raises(UserError, match="exists"):
        files.check_output(tmp_path / "scores.json", directory=False)
    files.check_output(tmp_path / "scores.json", overwrite=True, directory=False)
    with pytest.raises(UserError, match="is a directory"):
        files.check_output(tmp_path, directory=False)
