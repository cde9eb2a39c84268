"""Token buckets and bans, with the test's clock."""

from __future__ import annotations

from transport import auth
from transport.dos_protection import PenaltyBox, RateLimit


def test_each_key_has_its_own_burst_and_rate() -> None:
    limit = RateLimit(burst=3, per_s=10.0)
    assert [limit.take("a", 5.0) for _ in range(5)] == [True] * 3 + [False] * 2
    assert limit.take("b", 5.0)
    assert not limit.take("a", 5.05)
    assert limit.take("a", 5.1001)  # refused attempts cost nothing
    assert not limit.take("a", 5.1002)
    # at the slowest allowed rate
    assert all(limit.take("a", 6.0 + turn / 9.9) for turn in range(1000))
    assert [limit.take("a", 500.0) for _ in range(4)] == [True] * 3 + [
        False
    ]  # and no more tokens are saved up
    limit.keep(["b"])
    assert limit.take("a", 500.0)


def test_an_edge_that_reconnects_at_libzmq_s_pace_is_never_refused() -> None:
    limit = RateLimit(auth._HANDSHAKES, auth._HANDSHAKES_PER_S)
    assert all(limit.take("a", turn * 0.1) for turn in range(10_000))


def test_a_message_may_cost_more_than_one_token() -> None:
    limit = RateLimit(burst=10, per_s=10.0)
    assert [limit.take("a", 5.0, 4.0) for _ in range(4)] == [True] * 3 + [False]
    assert not limit.take("a", 5.2)
    assert limit.take("a", 5.3001)  # twelve were taken: the excess must be earned back
    limit.drain("a", 9.0)
    assert [limit.take("a", 9.0) for _ in range(2)] == [True, False]


def test_each_ban_is_twice_as_long_as_the_last() -> None:
    box = PenaltyBox(first_s=2.0, most_s=10.0)
    assert not box.banned("a", 0.0)
    now, kept = 0.0, []
    for _ in range(5):
        kept.append(box.ban("a", now))
        assert box.banned("a", now)
        assert not box.banned("b", now)
        now += kept[-1]
        assert not box.banned("a", now)
        now += 9.9
    assert kept == [2.0, 4.0, 8.0, 10.0, 10.0]
    assert box.ban("a", now + 0.2) == 2.0, "the key broke no rule for a while"
    box.forget(["a"])
    assert not box.banned("a", now + 0.3)
