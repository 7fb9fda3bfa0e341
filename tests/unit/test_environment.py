"""The folder of Ray's sockets: short, private, and removed when its owner is gone."""

import tempfile
from pathlib import Path

import pytest

from search.cluster.environment import PREFIX, ray_environment


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """A folder for temporary files with a short name, as Ray's sockets need it."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as short:
        monkeypatch.setattr(tempfile, "tempdir", short)
        yield Path(short)


def test_folders_of_killed_searches_go_and_those_of_living_ones_stay(temporary):
    killed, unlocked = temporary / f"{PREFIX}killed", temporary / f"{PREFIX}unlocked"
    for folder in (killed, unlocked):
        folder.mkdir()
    (killed / "lock").touch()  # the lock itself went with its process
    with ray_environment() as first:
        assert first.parent == temporary
        assert not killed.exists()
        assert unlocked.exists()  # another search may be about to lock it
        with ray_environment() as second:
            assert first.exists()
            assert second != first
    assert sorted(temporary.iterdir()) == [unlocked]


def test_a_path_too_long_for_sockets_is_not_used(temporary, monkeypatch):
    long = temporary / ("x" * 40)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with ray_environment() as folder:
        assert folder.parent == Path("/tmp")
        assert len(str(folder / "session_2026-01-31_23-59-59_123456_4194304/sockets/raylet")) < 107
