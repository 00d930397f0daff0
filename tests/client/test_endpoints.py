"""Health-aware round robin, with a clock of our own."""

from __future__ import annotations

from collections import Counter

import pytest
from tuwen_client import Client, InvalidInput
from tuwen_client.endpoints import Endpoints
from tuwen_client.options import split_urls


def chosen(endpoints: Endpoints, times: int, now: float = 0.0) -> Counter[str]:
    return Counter(endpoints.choose(now).url for _ in range(times))


def test_healthy_ones_take_turns() -> None:
    endpoints = Endpoints(["a", "b", "c"])
    assert [endpoints.choose(0.0).url for _ in range(6)] == ["a", "b", "c", "a", "b", "c"]


def test_one_that_failed_rests_is_probed_once_and_comes_back() -> None:
    endpoints = Endpoints(["a", "b"], chance=lambda: 1.0)
    failing = endpoints.all[0]
    endpoints.failed(failing, now=0.0)
    assert chosen(endpoints, 10, now=0.4) == {"b": 10}
    assert chosen(endpoints, 10, now=0.6) == {"a": 1, "b": 9}, "one probe after half a second"
    endpoints.failed(failing, now=0.7)
    assert chosen(endpoints, 10, now=1.5) == {"b": 10}, "it failed again: the rest is a second now"
    assert chosen(endpoints, 10, now=1.8)["a"] == 1
    endpoints.answered(failing)
    assert chosen(endpoints, 10, now=1.8) == {"a": 5, "b": 5}


def test_rests_grow_up_to_a_bound_and_a_whole_window_that_fails_is_one_failure() -> None:
    endpoints = Endpoints(["a", "b"], chance=lambda: 1.0)
    for _ in range(64):
        endpoints.failed(endpoints.all[0], now=0.0)
    assert endpoints.all[0].failures == 1
    now = 0.0
    for _ in range(3000):  # far beyond what a float can double
        now = endpoints.all[0].rests_until
        endpoints.choose(now), endpoints.choose(now)
    assert endpoints.all[0].rests_until - now <= 15.0


def test_a_single_one_is_always_asked() -> None:
    endpoints = Endpoints(["a"])
    endpoints.failed(endpoints.all[0], now=0.0)
    assert chosen(endpoints, 3) == {"a": 3}


def test_where_all_failed_the_first_to_wake_is_asked() -> None:
    endpoints = Endpoints(["a", "b"], chance=lambda: 1.0)
    endpoints.failed(endpoints.all[1], now=0.0)
    endpoints.failed(endpoints.all[0], now=0.2)
    assert endpoints.choose(0.3).url == "b"


def test_one_to_avoid_is_chosen_only_where_there_is_no_other() -> None:
    endpoints = Endpoints(["a", "b"])
    assert {endpoints.choose(0.0, {endpoints.all[0]}).url for _ in range(4)} == {"b"}
    assert endpoints.choose(0.0, set(endpoints.all)).url in "ab"


@pytest.mark.parametrize("url", ["a:1,b:2", " a:1 , b:2,", ["a:1", "b:2"], ["a:1", "b:2", "a:1"]])
def test_several_urls_can_be_given_in_two_ways(url: str | list[str]) -> None:
    assert split_urls(url) == ("a:1", "b:2")


@pytest.mark.parametrize("url", ["", ",", []])
def test_no_url_is_refused(url: str | list[str]) -> None:
    with pytest.raises(InvalidInput, match="url is empty"):
        Client(url)
