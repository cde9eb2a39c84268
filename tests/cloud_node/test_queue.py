"""The queue: fair shares, enforced limits, and exactly one outcome per request."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_node.admission import Refusal
from cloud_node.queue import OVERHEAD_BYTES, Job, Queue

_ids = (number.to_bytes(16, "big") for number in itertools.count())


def make(**options: Any) -> Queue:
    return Queue(
        **{
            "max_batch": 8,
            "most_bytes": 1 << 30,
            "most_requests": 1000,
            "max_wait_s": 0.002,
            **options,
        }
    )


def job(client: str = "a", windows: int = 1, size: int = 100, **options: Any) -> Job:
    fields: dict[str, Any] = {"id": next(_ids), "arrived": 0.0, "due": 100.0, **options}
    return Job(client, windows=windows, size=size, **fields)


def admitted(queue: Queue, *jobs: Job, now: float = 0.0) -> None:
    for each in jobs:
        assert queue.admit(each, now) == []


def refusal(queue: Queue, *arguments: Any) -> Refusal:
    with pytest.raises(Refusal) as caught:
        queue.admit(*arguments)
    return caught.value


def finished(queue: Queue, batch: list[Job]) -> list[Job]:
    for each in batch:
        queue.finish(each)
    return batch


# -- order -------------------------------------------------------------------------------------


def test_one_client_is_served_in_order_and_in_full_batches() -> None:
    queue = make()
    jobs = [job(windows=3) for _ in range(5)]
    admitted(queue, *jobs)
    batches = [finished(queue, queue.take(0.0)) for _ in range(4)]
    assert batches == [jobs[:2], jobs[2:4], jobs[4:], []]


def test_a_newcomer_does_not_wait_behind_a_backlog() -> None:
    queue = make(max_batch=2)
    admitted(queue, *(job("flooder") for _ in range(100)))
    for _ in range(10):
        finished(queue, queue.take(0.0))
    modest = job("modest")
    admitted(queue, modest)
    assert modest in queue.take(0.0)


def test_fair_shares_count_windows_not_requests() -> None:
    queue = make(max_batch=1 + 4)
    admitted(queue, *(job("many", 1) for _ in range(40)), *(job("large", 4) for _ in range(10)))
    given_to = {"many": 0, "large": 0}
    for _ in range(8):
        for each in finished(queue, queue.take(0.0)):
            given_to[each.client] += each.windows
    assert sum(given_to.values()) == 40
    assert abs(given_to["many"] - given_to["large"]) <= 5 + 2 * 4


def test_a_client_that_pauses_has_neither_credit_nor_debt() -> None:
    queue = make(max_batch=4)
    admitted(queue, *(job("steady") for _ in range(200)))
    for _ in range(20):
        finished(queue, queue.take(0.0))
    admitted(queue, *(job("back") for _ in range(100)))
    served = [each.client for _ in range(10) for each in finished(queue, queue.take(0.0))]
    assert abs(served.count("steady") - served.count("back")) <= 6
    # A client that sends its next request only after the last answer keeps its debt.
    queue = make(max_batch=8)
    admitted(queue, *(job("steady", 1) for _ in range(400)))
    served, waiting = [], False
    for _ in range(30):
        if not waiting:
            admitted(queue, job("greedy", 8))
            waiting = True
        batch = finished(queue, queue.take(0.0))
        waiting = not any(each.client == "greedy" for each in batch)
        served += [each.client for each in batch for _ in range(each.windows)]
    assert abs(served.count("steady") - served.count("greedy")) <= 8 + 16


def test_a_large_request_is_not_starved_by_small_ones_that_fit() -> None:
    queue = make(max_batch=8)
    small = [job("small", 3, id=next(_ids)) for _ in range(40)]
    admitted(queue, *small)
    large = job("large", 8)
    admitted(queue, large)
    taken = [finished(queue, queue.take(0.0)) for _ in range(3)]
    assert any(large in batch for batch in taken)


def test_small_requests_get_at_most_a_batch_ahead_of_large_ones() -> None:
    """Two requests of 6 do not fit a batch of 10, and small ones take the rest of each batch."""
    queue = make(max_batch=10)
    sizes, served = {"a": 6, "b": 6, "small": 1}, {"a": 0, "b": 0, "small": 0}
    for client, windows in sizes.items():
        admitted(queue, *(job(client, windows) for _ in range(400 // windows)))
    for _ in range(20):
        for each in finished(queue, queue.take(0.0)):
            served[each.client] += each.windows
        assert served["small"] <= min(served["a"], served["b"]) + 10 + 6


def test_a_batch_waits_for_more_requests_but_briefly_and_not_when_full() -> None:
    queue = make(max_batch=4)
    assert queue.wait(0.0) is None
    admitted(queue, job(), now=10.0)
    assert queue.wait(10.0) == pytest.approx(0.002)
    assert queue.wait(10.001) == pytest.approx(0.001)
    assert queue.wait(11.0) == 0.0
    admitted(queue, job(windows=3), now=10.0)
    assert queue.wait(10.0) == 0.0
    admitted(queue, job(), now=10.0)
    queue.take(10.0)
    assert queue.wait(10.0) == 0.0, "the remaining requests have waited already"


def test_an_isolated_client_shares_no_batch_for_that_time() -> None:
    queue = make()
    admitted(queue, job("bad"), job("good"), job("bad"), job("good"))
    queue.isolate("bad", 50.0)
    batches = [finished(queue, queue.take(0.0)) for _ in range(4)]
    assert sorted(tuple(j.client for j in batch) for batch in batches) == [
        (),
        ("bad",),
        ("bad",),
        ("good", "good"),
    ]
    admitted(queue, job("bad"), job("good"), now=60.0)
    assert len(queue.take(60.0)) == 2


def test_a_request_that_must_run_alone_gets_its_own_batch() -> None:
    queue = make()
    alone = job("b", alone=True)
    admitted(queue, job("a"), alone, job("a"), job("c"))
    batches = [finished(queue, queue.take(0.0)) for _ in range(2)]
    assert [alone] in batches
    assert sorted(map(len, batches)) == [1, 3]


# -- admission ---------------------------------------------------------------------------------


def test_a_client_that_may_not_run_delays_no_others_and_gets_no_credit() -> None:
    queue = make(max_batch=2)
    slow = [job("slow", windows=2) for _ in range(5)]
    admitted(queue, *slow, *(job("other", windows=2) for _ in range(10)))
    asked: list[tuple[str, int, int]] = []

    def may_run(client: str, running: int, windows: int) -> bool:
        asked.append((client, running, windows))
        return client != "slow"

    for _ in range(6):
        assert [j.client for j in finished(queue, queue.take(0.0, may_run))] == ["other"]
    assert set(asked) == {("slow", 0, 2), ("other", 0, 2)}
    running = queue.take(0.0)
    assert running == slow[:1]
    assert queue.take(0.0, lambda client, running, windows: not running)[0].client == "other"
    finished(queue, running)
    order = [finished(queue, queue.take(0.0))[0].client for _ in range(4)]
    assert order.count("slow") == 2, "in turn again, and no more than that"
    assert queue.take(0.0, lambda client, running, windows: False) == []


def test_ids_are_refused_while_in_use_and_only_for_the_same_client() -> None:
    queue = make()
    one = job(id=b"x" * 16)
    admitted(queue, one)
    assert refusal(queue, job(id=one.id), 0.0).code == "duplicate"
    admitted(queue, job("b", id=one.id))
    batch = queue.take(0.0)
    assert refusal(queue, job(id=one.id), 0.0).code == "duplicate"
    finished(queue, batch)
    admitted(queue, job(id=one.id))


def test_a_request_whose_deadline_has_passed_is_refused() -> None:
    assert refusal(make(), job(due=5.0), 5.0).code == "deadline"


def test_the_requests_of_one_client_are_limited() -> None:
    queue = make(most_requests=3)
    admitted(queue, job(), job(), job())
    queue.take(0.0)
    refused = refusal(queue, job(), 0.0)
    assert (refused.code, refused.retry_ms > 0) == ("overloaded", True)
    admitted(queue, job("b"))


@pytest.mark.process
def test_a_request_that_would_be_late_is_refused_with_a_hint() -> None:
    queue = make()
    queue.record_batch(10, 1.0)
    admitted(queue, *(job(windows=5) for _ in range(4)))  # two seconds of work
    refused = refusal(queue, job(windows=5, due=1.0), 0.0)
    assert refused.code == "overloaded"
    assert refused.retry_ms == pytest.approx(1500)
    admitted(queue, job(windows=5, due=2.6))
    # The client's fair share counts: another client's turn comes sooner.
    admitted(queue, job("b", windows=2, due=0.5))
    assert refusal(queue, job("c", windows=2, due=0.5), 0.0).code == "overloaded"
    queue.lanes = 2
    admitted(queue, job("c", windows=2, due=0.5))


def test_an_idle_node_admits_a_request_however_slow_it_was() -> None:
    queue = make()
    queue.record_batch(1, 50.0)
    admitted(queue, job(due=1.0))
    assert refusal(queue, job("b", due=1.0), 0.0).code == "overloaded"


def test_the_estimate_counts_what_waits_and_what_runs() -> None:
    queue = make()
    queue.record_batch(10, 1.0)
    admitted(queue, job(windows=4))
    batch = queue.take(0.0)
    admitted(queue, job(windows=3))
    assert queue.estimate("a", 2, 0.0) == pytest.approx(0.9)
    finished(queue, batch)
    assert queue.estimate("a", 2, 0.0) == pytest.approx(0.5)
    queue.hold_until(3.0)
    assert queue.estimate("a", 2, 1.0) == pytest.approx(2.5)


def test_recent_batches_weigh_more_in_the_estimate() -> None:
    queue = make()
    for _ in range(50):
        queue.record_batch(1, 1.0)
    slow = queue.estimate("a", 1, 0.0)
    for _ in range(50):
        queue.record_batch(1, 0.01)
    assert slow == pytest.approx(1.0)
    assert queue.estimate("a", 1, 0.0) == pytest.approx(0.01, rel=0.01)


def test_while_no_worker_can_compute_the_deadline_decides() -> None:
    queue = make()
    queue.hold_until(10.0)
    refused = refusal(queue, job(due=9.0), 0.0)
    assert (refused.code, refused.retry_ms) == ("overloaded", 1000)
    admitted(queue, job(due=11.0))


ROW = 100 + OVERHEAD_BYTES


def test_a_lone_client_may_fill_the_queue_but_only_half_of_it_beside_others() -> None:
    queue = make(most_bytes=10 * ROW)
    admitted(queue, *(job("a") for _ in range(10)))
    assert refusal(queue, job("a"), 0.0).code == "overloaded"
    queue = make(most_bytes=10 * ROW)
    admitted(queue, job("b"), *(job("a") for _ in range(5)))
    assert "half" in str(refusal(queue, job("a"), 0.0))


def test_the_heaviest_client_s_oldest_request_is_shed_for_a_lighter_newcomer() -> None:
    queue = make(most_bytes=10 * ROW)
    heavy = [job("heavy") for _ in range(10)]
    admitted(queue, *heavy)
    for turn in range(4):
        assert queue.admit(job("light"), 0.0) == [heavy[turn]]
    assert queue.admit(job("other"), 0.0) == [heavy[4]]
    assert queue.bytes == 10 * ROW


def test_a_lower_limit_sheds_the_oldest_request_of_the_heaviest_client() -> None:
    queue = make(most_bytes=10 * (1000 + OVERHEAD_BYTES))
    heavy, light = [job("a", size=1000) for _ in range(5)], [job("b", size=1000) for _ in range(2)]
    admitted(queue, *heavy, *light)
    assert queue.set_limit(5 * (1000 + OVERHEAD_BYTES)) == heavy[:2]
    assert queue.set_limit(10 * (1000 + OVERHEAD_BYTES)) == []
    assert (len(queue), queue.bytes) == (5, 5 * (1000 + OVERHEAD_BYTES))
    queue.set_limit(0)
    assert (len(queue), queue.bytes) == (0, 0)
    assert refusal(queue, job("c"), 0.0).code == "overloaded"


def test_no_request_is_shed_for_one_that_does_not_fit_anyway() -> None:
    queue = make(most_bytes=10 * ROW)
    admitted(queue, *(job("a") for _ in range(5)), *(job("b") for _ in range(5)))
    assert refusal(queue, job("c", size=7 * ROW), 0.0).code == "overloaded"
    assert len(queue) == 10


# -- leaving -----------------------------------------------------------------------------------


def test_cancelled_requests_never_run_and_running_ones_are_marked() -> None:
    queue = make(max_batch=1)
    first, second = job(), job()
    admitted(queue, first, second)
    assert queue.take(0.0) == [first]
    assert queue.cancel("b", first.id) == []
    assert queue.cancel("a", b"?" * 16) == []
    assert queue.cancel("a", second.id) == [second]
    assert queue.cancel("a", first.id) == []
    assert (first.outcome, second.outcome) == ("cancelled", "cancelled")
    for _ in range(2):  # the second cancellation changes nothing
        queue.finish(first)
    assert queue.take(0.0) == []
    assert (queue.bytes, queue.windows, len(queue), queue.running) == (0, 0, 0, 0)


def test_expired_requests_leave_in_the_order_of_their_deadlines() -> None:
    queue = make()
    jobs = [job(due=due) for due in (3.0, 1.0, 2.0, 9.0)]
    admitted(queue, *jobs)
    assert queue.expire(0.5) == []
    assert queue.expire(3.0) == [jobs[1], jobs[2], jobs[0]]
    assert queue.take(3.0) == [jobs[3]]


def test_revoked_clients_leave_nothing_behind() -> None:
    queue = make(max_batch=1)
    mine, theirs = [job("a") for _ in range(3)], job("b")
    admitted(queue, *mine, theirs)
    running = queue.take(0.0)
    assert running == mine[:1]
    assert queue.drop("a", "revoked") == mine[1:]
    assert {each.outcome for each in mine} == {"revoked"}
    assert queue.take(0.0) == [theirs]
    assert queue.drop("nobody", "revoked") == []


def test_nothing_is_left_when_all_connections_are_gone() -> None:
    queue = make(max_batch=1)
    jobs = [job("a"), job("a"), job("b")]
    admitted(queue, *jobs)
    (running,) = queue.take(0.0)
    assert set(queue.drop_all()) == set(jobs) - {running}
    assert running.outcome == "lost"
    assert queue.take(0.0) == []


def test_a_client_that_sends_and_cancels_forever_costs_no_memory() -> None:
    queue = make()
    queue.hold_until(1e9)  # nothing is taken until then
    admitted(queue, job("a", due=2e9), now=0.0)
    for _ in range(2000):
        one = job("b", due=2e9)
        admitted(queue, one)
        queue.cancel("b", one.id)
    assert len(queue._deadlines) < 200
    assert len(queue._order) < 200


def test_a_deadline_holds_after_many_requests_were_cancelled() -> None:
    queue = make()
    early, late = job("a", due=5.0), job("a", due=6.0)
    admitted(queue, early, late)
    for _ in range(300):
        one = job("b", due=1.0)
        admitted(queue, one)
        queue.cancel("b", one.id)
    assert len(queue._deadlines) < 200
    assert queue.expire(4.9) == []
    assert queue.expire(5.0) == [early]
    assert queue.expire(6.0) == [late]


def test_a_client_with_a_running_request_is_not_forgotten() -> None:
    queue = make()
    running = job("busy")
    admitted(queue, running)
    assert queue.take(0.0) == [running]
    for number in range(200):
        admitted(queue, job(f"client {number}", windows=2))
        finished(queue, queue.take(0.0))
    assert (queue.running, queue.running_windows) == (1, 1)
    finished(queue, [running])
    assert (queue.running, queue.running_windows) == (0, 0)


def test_an_isolated_client_stays_isolated() -> None:
    """Also when it is isolated again for less time, and when other clients come and go."""
    queue = make()
    admitted(queue, job("bad"))
    queue.isolate("bad", 50.0)
    queue.isolate("bad", 10.0)
    finished(queue, queue.take(0.0))
    for number in range(200):
        admitted(queue, job(f"client {number}", windows=2))
        finished(queue, queue.take(0.0))
    admitted(queue, job("bad"), job("good"), now=20.0)
    assert len(queue.take(20.0)) == 1


def test_clients_that_have_left_are_forgotten() -> None:
    queue = make()
    for number in range(2000):
        admitted(queue, job(f"client {number}"))
        finished(queue, queue.take(0.0))
    assert len(queue._clients) < 200


# -- properties under random operations ---------------------------------------------------------

_STEP = st.one_of(
    st.tuples(
        st.just("admit"),
        st.sampled_from("abcd"),
        st.integers(1, 8),
        st.integers(1, 5000),
        st.floats(0, 5),
        st.booleans(),
    ),
    st.tuples(st.just("take")),
    st.tuples(st.just("finish"), st.integers(0, 30)),
    st.tuples(st.just("cancel"), st.integers(0, 200)),
    st.tuples(st.just("revoke"), st.sampled_from("abcd")),
    st.tuples(st.just("apart"), st.sampled_from("abcd")),
    st.tuples(st.just("pass"), st.floats(0, 2)),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(_STEP, max_size=120))
def test_every_admitted_request_leaves_exactly_once_and_bounds_hold(steps: list[Any]) -> None:
    queue = make(most_bytes=10 * (OVERHEAD_BYTES + 2500), most_requests=12)
    now = 0.0
    outcomes: dict[Job, str] = {}
    every: list[Job] = []
    running: list[Job] = []

    def out(jobs: list[Job], how: str) -> None:
        for each in jobs:
            assert each not in outcomes
            outcomes[each] = how

    for step in steps:
        kind = step[0]
        if kind == "admit":
            _, client, windows, size, left, alone = step
            new = job(client, windows, size, arrived=now, due=now + left, alone=alone)
            with contextlib.suppress(Refusal):
                out(queue.admit(new, now), "shed")
                every.append(new)
        elif kind == "take":
            out(queue.expire(now), "expired")
            batch = queue.take(now)
            assert sum(each.windows for each in batch) <= queue.max_batch
            assert all(each.due > now and not each.outcome for each in batch)
            assert len(batch) == 1 or not any(each.alone for each in batch)
            out(batch, "taken")
            running += batch
        elif kind == "finish" and running:
            done = running.pop(step[1] % len(running))
            queue.record_batch(done.windows, 0.01)
            queue.finish(done)
        elif kind == "cancel" and every:
            one = every[step[1] % len(every)]
            waited = one not in outcomes
            assert queue.cancel(one.client, one.id) == [one] * waited
            out([one] * waited, "cancelled")
            assert (one.outcome == "cancelled") or one not in running
        elif kind == "revoke":
            out(queue.drop(step[1], "cancelled"), "revoked")
        elif kind == "apart":
            queue.isolate(step[1], now + 1)
        elif kind == "pass":
            now += step[1]
        waiting = [each for each in every if each not in outcomes]
        assert len(queue) == len(waiting)
        assert queue.bytes == sum(each.size + OVERHEAD_BYTES for each in waiting)
        assert queue.bytes <= queue.most_bytes
        assert queue.windows == sum(each.windows for each in waiting)
        assert queue.running == len(running)
    # Nothing is stuck: with workers, every waiting request is taken.
    now += 10
    for _ in range(len(every) + 1):
        finished(queue, running)
        out(queue.expire(now), "expired")
        running = queue.take(now)
        out(running, "taken")
    finished(queue, running)
    assert set(outcomes) == set(every)
    assert (len(queue), queue.bytes, queue.windows, queue.running) == (0, 0, 0, 0)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from("abcd"),
        st.lists(st.integers(1, 8), min_size=1, max_size=5),
        min_size=2,
        max_size=4,
    ),
    st.integers(8, 20),
)
def test_clients_that_always_wait_share_by_windows(
    sizes: dict[str, list[int]], max_batch: int
) -> None:
    queue = make(max_batch=max_batch)
    served = dict.fromkeys(sizes, 0)
    sizes_of = {client: itertools.cycle(each) for client, each in sizes.items()}
    backlog = dict.fromkeys(sizes, 0)
    for _ in range(60):
        for client, windows in sizes_of.items():
            while backlog[client] < 30:  # one batch could take this much of one client
                new = job(client, next(windows))
                admitted(queue, new)
                backlog[client] += new.windows
        for each in finished(queue, queue.take(0.0)):
            served[each.client] += each.windows
            backlog[each.client] -= each.windows
        assert max(served.values()) - min(served.values()) <= max_batch + 2 * 8


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 8), min_size=1, max_size=30), st.integers(1, 8))
def test_no_client_starves(others: list[int], mine: int) -> None:
    """A request runs within as many batches as there are clients ahead of it."""
    queue = make()
    for number, windows in enumerate(others):
        admitted(queue, *(job(f"other {number}", windows) for _ in range(50)))
    for _ in range(5):
        finished(queue, queue.take(0.0))
    me = job("me", mine)
    admitted(queue, me)
    for _ in range(len(others) + 2):
        if me in finished(queue, queue.take(0.0)):
            return
    pytest.fail("still waiting")
