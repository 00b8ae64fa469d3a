"""Two hosts with a network between them (:mod:`bench.hosts.twohosts`), for tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from bench.hosts import twohosts
from bench.hosts.twohosts import LINK, Host, TwoHosts
from tests.conftest import require

__all__ = ["LINK", "Host", "TwoHosts", "two_hosts"]


@contextlib.contextmanager
def two_hosts() -> Iterator[TwoHosts]:
    """Make two hosts; skips the running test, or fails it, where that cannot be."""
    require(twohosts.missing())
    with twohosts.two_hosts() as hosts:
        yield hosts
