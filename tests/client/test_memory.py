"""Shared memory on the client's side: who may write where, and when."""

from __future__ import annotations

import itertools
import logging
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tuwen_client import ServerUnavailable, TuwenError
from tuwen_client.memory import SHM_DIR, Lease, Region, Room, SharedPictures

SIZE = 1 << 16


def ours() -> set[Path]:
    return set(SHM_DIR.glob(f"tuwen_client_{os.getpid()}_*"))


def more_than_there_is() -> int:
    """Bytes that can be mapped, and that /dev/shm does not have."""
    status = os.statvfs(SHM_DIR)
    return status.f_blocks * status.f_frsize + (1 << 20)


@given(st.lists(st.one_of(st.integers(1, 900), st.none()), max_size=60), st.randoms())
def test_pieces_never_overlap_and_all_room_comes_back(requests: list[int | None], dice: object) -> None:
    room = Room(4096)
    out: list[tuple[int, int]] = []
    for size in requests:
        if size is None:
            if out:
                room.give_back(out.pop(dice.randrange(len(out))))  # type: ignore[attr-defined]
        elif (piece := room.take(size)) is not None:
            assert piece[1] >= size
            out.append(piece)
        spans = sorted(out)
        assert all(a + size_a <= b for (a, size_a), (b, _) in itertools.pairwise(spans))
        assert room.free_bytes == 4096 - sum(size for _, size in out)
    for piece in out:
        room.give_back(piece)
    assert room.take(4096) == (0, 4096)


def test_a_piece_that_may_still_be_read_is_never_written_again() -> None:
    region = Region(SIZE)
    try:
        lost = region.put(b"x" * 1000)
        assert lost is not None
        lost.end(was_read=False)
        leases: list[Lease] = []
        while (lease := region.put(b"y" * 1000)) is not None:
            leases.append(lease)
        begin, end = lost.span.offset, lost.span.offset + 1000
        assert all(one.span.offset >= end or one.span.offset + 1000 <= begin for one in leases)
        for one in leases:
            one.end(was_read=True)
        assert region.free_bytes == SIZE - 1024
        assert not region.is_idle
    finally:
        region.unlink()
        region.close()


def test_the_name_is_gone_as_soon_as_the_server_has_it() -> None:
    seen: list[bool] = []
    before = ours()
    pictures = SharedPictures(lambda region: seen.append((SHM_DIR / region.name).exists()), lambda region: None, SIZE)
    pictures.prepare()
    assert seen == [True]
    assert ours() == before
    lease = pictures.put(b"picture")
    assert lease is not None
    lease.end(was_read=True)
    pictures.close()
    assert pictures.put(b"picture") is None


def test_a_full_dev_shm_falls_back_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    """The system itself refuses, at once and not at the first write: that would be SIGBUS."""
    before = ours()
    pictures = SharedPictures(lambda region: None, lambda region: None, more_than_there_is())
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            pictures.prepare()
            assert pictures.put(b"picture") is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "pictures go in their messages" in caplog.text
    assert ours() == before


def refusing(error: TuwenError) -> SharedPictures:
    def register(region: Region) -> None:
        raise error

    return SharedPictures(register, lambda region: None, SIZE)


def test_a_server_that_is_away_is_asked_again() -> None:
    before = ours()
    pictures = refusing(ServerUnavailable("gone"))
    pictures.prepare()
    assert pictures.put(b"picture") is None
    assert not pictures.is_prepared
    assert ours() == before


def test_a_wrong_token_is_one_sentence() -> None:
    with pytest.raises(TuwenError, match="without its admin token: pass token"):
        refusing(TuwenError("This protocol is restricted, expecting header 'x'")).prepare()


def test_a_region_that_is_in_use_is_not_taken_from_the_server() -> None:
    """Triton 2.51 would read unmapped memory."""
    told: list[str] = []
    pictures = SharedPictures(lambda region: None, lambda region: told.append(region.name), SIZE)
    pictures.prepare()
    lease = pictures.put(b"picture")
    assert lease is not None
    pictures.close()
    assert told == []
    lease.end(was_read=True)  # after the mapping has gone on this side
