"""The queue in a model's process, with a clock of our own."""

from __future__ import annotations

import threading
import time
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from tuwen.serving.request_queue import BULK, INTERACTIVE, QueueLimits, RequestQueue, Taken

LIMITS = QueueLimits(max_sizes=(2, 3), max_waits_s=(5.0, 25.0))


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def make() -> tuple[RequestQueue[str], Clock]:
    clock = Clock()
    return RequestQueue(LIMITS, clock), clock


def taken(queue: RequestQueue[str], max_rows: int = 32) -> Taken[str]:
    found = queue.take(max_rows)
    assert found is not None
    return found


def test_a_full_queue_refuses_and_each_priority_has_its_own_room() -> None:
    queue, _ = make()
    assert [queue.put(name) for name in "abcd"] == [True, True, True, False]
    assert [queue.put(name, INTERACTIVE) for name in "ABC"] == [True, True, False]
    assert taken(queue).items == list("ABabc")
    assert queue.put("d")


def test_interactive_goes_first_and_a_batch_has_its_size() -> None:
    queue, _ = make()
    for name in "abc":
        queue.put(name)
    queue.put("A", INTERACTIVE)
    assert taken(queue, 2).items == ["A", "a"]
    assert taken(queue, 2).items == ["b", "c"]


def test_rows_count_and_one_item_may_have_more_than_fit() -> None:
    queue, _ = make()
    for name, rows in (("a", 3), ("b", 2), ("c", 40)):
        queue.put(name, rows=rows)
    assert taken(queue, 4).items == ["a"]
    assert taken(queue, 4).items == ["b"]
    assert taken(queue, 4).items == ["c"]


def test_what_waited_too_long_is_told_apart() -> None:
    queue, clock = make()
    queue.put("hasty", BULK, timeout_s=1.0)
    queue.put("interactive", INTERACTIVE, timeout_s=60.0)
    queue.put("bulk", BULK, timeout_s=60.0)
    clock.now += 6
    found = taken(queue)
    assert (found.items, sorted(found.expired), found.waited_s) == (["bulk"], ["hasty", "interactive"], 6.0)


def test_an_unknown_priority_is_bulk() -> None:
    queue, _ = make()
    for priority in (0, 3, 99):
        queue.put(str(priority), priority)
    assert not queue.put("more")
    assert queue.put("interactive", INTERACTIVE)


def test_closing_lets_what_waits_be_taken_and_wakes_who_waits() -> None:
    queue, _ = make()
    queue.put("a")
    queue.close()
    assert not queue.put("b")
    assert taken(queue).items == ["a"]
    assert queue.take(1) is None
    other, _ = make()
    found: list[Taken[str] | None] = []
    waiter = threading.Thread(target=lambda: found.append(other.take(1)))
    waiter.start()
    other.close()
    waiter.join(5)
    assert found == [None]


def sharing(sharers: int) -> RequestQueue[str]:
    return RequestQueue(LIMITS, Clock(), sharers)


def test_workers_that_share_the_cores_take_their_part() -> None:
    queue = sharing(2)
    for name in "abc":
        queue.put(name)
    first, second = taken(queue), taken(queue)
    assert (first.items, second.items) == (["a", "b"], ["c"])
    assert not first.is_alone
    assert not second.is_alone
    queue.done()
    for name in "de":
        queue.put(name)
    assert taken(queue).items == ["d", "e"], "the other one is busy"


def test_a_batch_that_comes_alone_has_the_cores_to_itself() -> None:
    queue = sharing(2)
    queue.put("a", rows=40)
    assert taken(queue, 32).is_alone
    found: list[Taken[str] | None] = []
    waiter = threading.Thread(target=lambda: found.append(queue.take(32)))
    waiter.start()
    for name in "bc":
        queue.put(name)
    waiter.join(0.2)
    assert not found, "until it is done"
    queue.done()
    waiter.join(5)
    assert [each and (each.items, each.is_alone) for each in found] == [(["b"], False)]
    assert not taken(queue).is_alone, "the other one works"


def test_closing_waits_for_the_batch_that_is_alone() -> None:
    queue = sharing(2)
    queue.put("a")
    assert taken(queue).is_alone
    queue.put("b")
    queue.close()
    found: list[Taken[str] | None] = []
    waiter = threading.Thread(target=lambda: found.append(queue.take(32)))
    waiter.start()
    queue.done()
    waiter.join(5)
    assert [each and each.items for each in found] == [["b"]]
    assert queue.take(32) is None


def test_workers_that_do_not_share_are_never_alone() -> None:
    queue, _ = make()
    queue.put("a")
    assert not taken(queue).is_alone
    queue.put("b")
    assert taken(queue).items == ["b"]


@given(
    st.lists(st.tuples(st.sampled_from([INTERACTIVE, BULK]), st.integers(1, 5)), max_size=40),
    st.integers(1, 8),
    st.sampled_from([0, 3]),
)
def test_nothing_is_lost_or_doubled_between_threads(items: list[tuple[int, int]], max_rows: int, sharers: int) -> None:
    queue: RequestQueue[int] = RequestQueue(QueueLimits((100, 100), (60.0, 60.0)), sharers=sharers)
    came: Counter[int] = Counter()
    working: set[int] = set()
    lock = threading.Lock()

    def work() -> None:
        while (found := queue.take(max_rows)) is not None:
            assert len(found.items) == 1 or sum(items[item][1] for item in found.items) <= max_rows
            with lock:
                came.update(found.items)
                assert not (found.is_alone and working)
                working.add(threading.get_ident())
            time.sleep(0)
            with lock:
                working.discard(threading.get_ident())
            if sharers:
                queue.done()

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for number, (priority, rows) in enumerate(items):
        assert queue.put(number, priority, rows)
    queue.close()
    for worker in workers:
        worker.join(10)
    assert came == Counter(range(len(items)))
