"""The budget for failed signature checks, per address and in total."""

from __future__ import annotations

import pytest

from cobatch.server.auth.throttle import SignatureThrottle


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def exhaust(throttle: SignatureThrottle, address: str) -> int:
    """Charge an address until it is throttled; return the number of charges."""
    count = 0
    while throttle.wait_s(address) == 0:
        throttle.charge(address)
        count += 1
        assert count < 10_000
    return count


def test_the_budget_of_an_address_refills() -> None:
    clock = Clock()
    throttle = SignatureThrottle(clock)
    assert exhaust(throttle, "192.0.2.1") == 100
    assert throttle.wait_s("192.0.2.1") == pytest.approx(0.05)
    assert throttle.wait_s("192.0.2.2") == 0
    clock.now_s = 0.05
    assert exhaust(throttle, "192.0.2.1") == 1
    clock.now_s = 1000.0
    assert exhaust(throttle, "192.0.2.1") == 100


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("2001:db8::1", "2001:db8::ffff:0:0:1", True),
        ("2001:db8::1", "2001:db8:0:ff::1", True),
        ("2001:db8::1", "2001:db8:0:100::1", False),
        ("fe80::1%eth0", "fe80::2%eth1", True),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("a:b", "a:c", False),
        ("", "192.0.2.1", False),
    ],
)
def test_an_ipv6_network_counts_as_one(first: str, second: str, same: bool) -> None:
    throttle = SignatureThrottle(Clock())
    exhaust(throttle, first)
    assert (throttle.wait_s(second) > 0) == same


def test_failed_addresses_share_a_budget() -> None:
    clock = Clock()
    throttle = SignatureThrottle(clock)
    throttle.charge("198.51.100.1")
    charged = sum(exhaust(throttle, f"192.0.2.{n}") for n in range(16))
    assert 1500 <= charged <= 1516
    assert throttle.wait_s("198.51.100.1") > 0
    # An address that never failed has another budget.
    assert throttle.wait_s("198.51.100.2") == 0
    clock.now_s = 1.0
    assert throttle.wait_s("198.51.100.1") == 0


def test_new_addresses_share_another_budget() -> None:
    throttle = SignatureThrottle(Clock())
    throttle.charge("198.51.100.1")
    for n in range(1, 1500):
        assert throttle.wait_s(f"10.0.{n // 256}.{n % 256}") == 0
        throttle.charge(f"10.0.{n // 256}.{n % 256}")
    assert throttle.wait_s("192.0.2.1") > 0
    assert throttle.wait_s("198.51.100.1") == 0


def test_the_least_recent_address_is_forgotten_first() -> None:
    clock = Clock()
    throttle = SignatureThrottle(clock)
    for n in range(4096):
        clock.now_s += 0.001
        throttle.charge(f"10.0.{n // 256}.{n % 256}")
    throttle.charge("10.0.0.0")
    throttle.charge("192.0.2.1")
    assert len(throttle._buckets) == 4096
    assert "10.0.0.0" in throttle._buckets
    assert "10.0.0.1" not in throttle._buckets


def test_several_processes_together_have_the_budget_of_one() -> None:
    def checked(processes: int) -> int:
        throttle = SignatureThrottle(lambda: 0.0)
        throttle.divide(processes)
        count = 0
        while throttle.wait_s("192.0.2.1") == 0:
            throttle.charge("192.0.2.1")
            count += 1
        return count

    assert 3 * checked(3) <= checked(1)
    assert checked(3) > checked(1) // 4
