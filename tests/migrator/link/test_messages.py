"""Whatever another host says is parsed at the door, or refused there: never anything else."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrator.errors import WireError
from migrator.link import envelope
from migrator.link.messages import (
    Arrived,
    Go,
    Greeting,
    Load,
    Looked,
    Message,
    Open,
    Parting,
    State,
    Told,
    parse,
)
from migrator.preflight.waiting import Side
from tests.profiles import examples

KINDS: list[type[Message]] = [Arrived, Go, Greeting, Load, Looked, Open, Parting, Told]
ROOM = {"filesystem": 1, "size_bytes": 1 << 20, "allocated_bytes": 0, "free_bytes": None}
SIDE: dict[str, Any] = {
    "findings": [],
    "blocks": [{"name": "ram", "size": 1 << 20, "page_size": 4096}],
    "rooms": {"ram": ROOM},
    "machine": {"target": "x86_64"},
    "guest_ranges": [{"gpa": 0, "size": 1 << 20, "block": "ram", "offset": 0}],
    "mappers": [],
}

_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=1 << 62, max_value=1 << 100),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20),
)
_JUNK = st.recursive(
    _SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=10), inner, max_size=4)
    ),
    max_leaves=10,
)
_KEYS = sorted({key for kind in KINDS for key in kind.model_fields} | set(SIDE))


def parsed_or_refused(kind: type[Message], said: object) -> Message | None:
    try:
        return parse(kind, said, "there")
    except WireError as error:
        refused = error
    assert refused.peer == "there"
    assert len(str(refused)) < 2000
    return None


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=examples(200), deadline=None)
@given(said=st.one_of(_JUNK, st.dictionaries(st.sampled_from(_KEYS), _JUNK)))
def test_junk(kind: type[Message], said: object) -> None:
    parsed_or_refused(kind, said)


@settings(max_examples=examples(500), deadline=None)
@given(key=st.sampled_from(sorted(SIDE)), junk=_JUNK, inside=st.booleans())
def test_a_side_with_one_wrong_member(key: str, junk: object, inside: bool) -> None:
    """One that is accepted can be made a side of, whose blocks are whole pages."""
    said = json.loads(json.dumps(SIDE))
    if inside and isinstance(said[key], list) and said[key]:
        first = said[key][0]
        first[sorted(first)[0]] = junk
    else:
        said[key] = junk
    looked = parsed_or_refused(Looked, {"side": said})
    if isinstance(looked, Looked):
        side = Side.from_said(looked.side)
        assert side.pid is None
        assert side.findings or set(side.rooms or {}) == {block.name for block in side.blocks}
        assert all(block.npages * block.page_size == block.size for block in side.blocks)


def test_a_side() -> None:
    side = Side.from_said(parse(Looked, {"side": SIDE}, "there").side)
    assert [(block.name, block.npages, block.hva) for block in side.blocks] == [("ram", 256, 0)]
    assert side.machine == {"target": "x86_64"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("machine", ["x86_64"]),
        ("machine", None),
        ("rooms", None),
        ("rooms", {}),
        ("rooms", {"another": ROOM}),
        ("blocks", []),
        ("blocks", [{"name": "ram", "size": 1 << 20, "page_size": 0}]),
        ("blocks", [{"name": "ram", "size": 1 << 20, "page_size": 4097}]),
        ("blocks", [{"name": "ram", "size": (1 << 20) + 1, "page_size": 4096}]),
        ("blocks", [{"name": "ram", "size": -4096, "page_size": 4096}]),
        ("blocks", [{"name": "ram", "size": 1 << 100, "page_size": 4096}]),
        ("blocks", [{"name": "\ud800", "size": 1 << 20, "page_size": 4096}]),
        ("blocks", [{"name": "r" * 300, "size": 1 << 20, "page_size": 4096}]),
        ("findings", [{"check": "a", "problem": "b"}]),
        ("findings", "none"),
    ],
)
def test_a_side_that_makes_no_sense(key: str, value: object) -> None:
    with pytest.raises(WireError, match="makes no sense"):
        parse(Looked, {"side": {**SIDE, key: value}}, "there")


@pytest.mark.parametrize(
    "said",
    [
        {"state": "asleep"},
        {"state": None},
        {},
        {"state": "running", "after_s": -1.0},
        {"state": "running", "after_s": 1e300},
        {"state": "running", "after_s": "soon"},
        {"state": "running", "reason": "x" * 5000},
    ],
)
def test_an_outcome_that_makes_no_sense(said: object) -> None:
    with pytest.raises(WireError):
        parse(Told, said, "there")


def test_unknown_members_are_ignored() -> None:
    told = parse(Told, {"state": "running", "of_a_later_release": 1}, "there")
    assert told.state is State.RUNNING


def test_numbers_have_bounds() -> None:
    opening = {"session": "a", "blocks": ["ram"], "reconnect_s": 1e308, "silence_s": 1.0}
    assert parse(Open, opening, "there").reconnect_s == 1e308  # the receiver has its own limit
    for change in ({"silence_s": 0.0}, {"reconnect_s": -1.0}, {"blocks": ["r"] * 5000}):
        with pytest.raises(WireError):
            parse(Open, {**opening, **change}, "there")
    with pytest.raises(WireError):
        parse(Load, {"end": envelope.STATE_LIMIT + 1, "timeout_s": 1.0}, "there")
    with pytest.raises(WireError):
        parse(Go, {"run": 1}, "there")
