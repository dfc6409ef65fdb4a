"""Directories: permission, exclusive use."""

import errno
import os
import signal

import programs
import pytest

from dmd_jax.devices import disk
from dmd_jax.devices.disk import check_file, check_writable, exclusive, local_path


def test_writable_directory_is_made_and_left_empty(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_unwritable_directory_is_refused_by_name(tmp_path):
    (tmp_path / "file").touch()
    for directory in (tmp_path / "file" / "run", "/proc/run"):
        with pytest.raises(ValueError, match=f"{directory} cannot be written to"):
            check_writable(directory)


def test_a_folder_in_the_place_of_a_file_and_an_empty_path_are_refused(tmp_path):
    check_file(tmp_path / "a" / "file.json")
    with pytest.raises(ValueError, match=f"{tmp_path} is a folder: name a file"):
        check_file(tmp_path)
    with pytest.raises(ValueError, match="the path is empty"):
        local_path("")


def test_a_directory_is_used_by_one_at_a_time_and_the_second_is_told_by_whom(tmp_path):
    message = rf"{tmp_path} is in use by process {os.getpid()}; wait"
    with exclusive(tmp_path), pytest.raises(ValueError, match=message), exclusive(tmp_path):
        pass
    with exclusive(tmp_path):  # free again
        pass


def test_a_lock_ends_with_its_process_however_that_ends(tmp_path):
    program = f"""
import os, pathlib, signal
from dmd_jax.devices import disk
from dmd_jax.devices.disk import exclusive
with exclusive(pathlib.Path({str(tmp_path)!r})):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert programs.python("-c", program).returncode == -signal.SIGKILL
    with exclusive(tmp_path):
        pass


def test_a_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(disk, "fcntl", None)
    with exclusive(tmp_path):
        pass
    assert "cannot be locked on this system" in caplog.text


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with exclusive(tmp_path):
        pass
    assert "cannot be locked" in caplog.text
