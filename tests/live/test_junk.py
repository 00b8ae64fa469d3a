"""A receiver whose answers make no sense: the source says so, and its VM runs on."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

import pytest

from migrator import MigratorError, migrate
from migrator.link.session import Link
from migrator.migration.destination import LocalDestination
from migrator.qemu.qmp import Qmp
from migrator.receiver.door import listen
from migrator.receiver.receiver import Receiver
from tests.live.moving import VERIFIED, check_still_at_source
from tests.live.test_neighbours import SMALL
from tests.live.vms import Pair, pair

pytestmark = pytest.mark.live

JUNK: list[Any] = [
    {"side": []},
    {"side": {"findings": [], "blocks": [], "machine": ["list"], "rooms": None}},
    {"state": ["running"], "side": None, "round": -1, "frames": "many"},
    {"no": {"a": [1]}},
    {"vm": math.pi},
    {"busy": "yes", "state": "running\x1b[2J"},
]
STEPS = ["look", "open", "prepare", "begin-loading", "look-anew", "load"]


async def _moved(vms: Pair, junk: Callable[[str], Any]) -> BaseException | None:
    """Migrate to a receiver in this process, with the answers that ``junk`` puts in their place."""
    answer = Receiver._answer

    async def answering(self: Receiver, connection: Any, name: str, *rest: Any) -> dict[str, Any]:
        right = await answer(self, connection, name, *rest)
        wrong: dict[str, Any] | None = junk(name)
        return right if wrong is None else wrong

    qmp = await Qmp.connect("destination", vms.destination.qmp)
    destination = LocalDestination(qmp)
    with pytest.MonkeyPatch.context() as patch, listen("127.0.0.1", 0) as listener:
        patch.setattr(Receiver, "_answer", answering)
        receiver = Receiver(destination, None, None)
        serving = asyncio.ensure_future(receiver.serve(listener))
        link = Link("127.0.0.1", listener.getsockname()[1], reconnect_s=1.0, silence_s=2.0)
        try:
            await asyncio.wait_for(migrate(vms.source.qmp, link, VERIFIED), 120)
        except MigratorError as error:
            return error
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            await destination.close()
            await qmp.close()
    return None


@pytest.mark.parametrize("step", STEPS)
def test_an_answer_that_makes_no_sense(step: str) -> None:
    async def body() -> None:
        async with pair(SMALL) as vms:
            for junk in JUNK:
                error = await _moved(vms, {step: junk}.get)
                # an answer without members that are needed may be as good as an empty one
                if error is None:
                    assert step in ("open", "prepare", "begin-loading", "look-anew", "load")
                    return
                await check_still_at_source(vms)
                await vms.start_destination()

    asyncio.run(body())


def test_an_answer_to_go_that_makes_no_sense() -> None:
    """What became of it is asked anew, and is the truth."""

    async def body() -> None:
        async with pair(SMALL) as vms:
            junk = {"state": ["running"], "after_s": "soon"}
            assert await _moved(vms, {"go": junk}.get) is None
            await vms.check_heartbeat_unbroken()
            assert await vms.state(vms.source) == "postmigrate"

    asyncio.run(body())
