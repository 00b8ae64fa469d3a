from __future__ import annotations

import json
from dataclasses import replace

import pytest

from migrator.link.session import Link
from migrator.migration.wards import LocalWard, RemoteWard, Wards
from migrator.qemu.rollback import Before
from migrator.qemu.settings import Settings

SETTINGS = Settings({"x-ignore-shared": True}, {"max-bandwidth": 1 << 20})
BEFORE = Before(was_running=True, settings=SETTINGS, paused_by_us=True)


@pytest.mark.parametrize(
    "destination",
    [
        LocalWard("/run/b.qmp", 4711, replace(SETTINGS, parameters={})),
        RemoteWard(Link("192.0.2.2", 7000, tls="keys").to_json(), "0" * 32),
    ],
)
def test_what_a_guard_is_told_arrives(destination: LocalWard | RemoteWard) -> None:
    wards = Wards("/run/a.qmp", destination, BEFORE)
    line = wards.to_json()
    assert "\n" not in line
    assert Wards.from_json(line) == wards


@pytest.mark.parametrize("missing", ["source", "destination", "before"])
def test_what_is_not_whole_is_an_error(missing: str) -> None:
    told = json.loads(Wards("/run/a.qmp", RemoteWard({}, ""), BEFORE).to_json())
    del told[missing]
    with pytest.raises(KeyError):
        Wards.from_json(json.dumps(told))
