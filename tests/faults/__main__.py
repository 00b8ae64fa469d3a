"""The campaign from the command line: ``python -m tests.faults --count 1000 --jobs 3``."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import time

from migrator.transport.warm import warm_up
from tests.faults import campaign, plans
from tests.faults.campaign import Result
from tests.faults.kinds import TWO_HOSTS_ONLY, Fault


def main() -> int:
    """Run a campaign; the exit code is 1 if anything was violated, or could not be tried."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--count", type=int, default=60, help="how many migrations")
    parser.add_argument("--seed", type=int, help="of the whole campaign; default: a fresh one")
    parser.add_argument("--jobs", type=int, default=3, help="how many at the same time")
    parser.add_argument("--only", type=int, nargs="+", metavar="SEED", help="these, in detail")
    parser.add_argument("--hosts", type=float, default=0.3, help="part that is between two hosts")
    parser.add_argument("--fault", action="append", metavar="NAME", help="only faults so named")
    parser.add_argument("--times", type=int, default=1, help="with --only: how often each")
    parser.add_argument("--without", action="append", metavar="ORACLE", help="do not ask this one")
    asked = parser.parse_args()

    signal.signal(signal.SIGINT, signal.default_int_handler)  # also of child processes
    warm_up()
    base = asked.seed if asked.seed is not None else time.time_ns() % (1 << 32)
    named = frozenset(f for f in Fault if any(n in f.value for n in asked.fault or []))
    share = campaign.hosts_share(asked.hosts)
    if named and named <= TWO_HOSTS_ONLY:
        share = 1.0
    wanted = asked.only * asked.times if asked.only else campaign.seeds(base, asked.count)
    if not asked.only:
        print(f"seed {base}, {asked.count} migrations", flush=True)
    made = [plans.draw(seed, hosts_share=share, only=named) for seed in wanted]

    results: list[Result] = []

    def tell(result: Result) -> None:
        results.append(result)
        print(f"{len(results):>4}/{len(made)} {result.line()}", flush=True)

    async def all_of_them() -> None:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        await campaign.run(made, jobs=jobs, tell=tell, without=asked.without or ())

    began_s = time.monotonic()
    jobs = 1 if asked.only and asked.times == 1 else asked.jobs
    try:
        asyncio.run(all_of_them())
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("interrupted: these are the results until then")
    print("\n" + campaign.table(results))
    if bad := [result for result in results if result.violations or result.broken]:
        print("\n" + campaign.by_kind(results))
        options = " ".join([f"--hosts {share:g}", *(f"--fault {f!r}" for f in asked.fault or [])])
        print("\n" + campaign.details(bad, options=options, timelines=bool(asked.only)))
    elif asked.only and results:
        print("\n".join(results[-1].timeline))
    took_s = time.monotonic() - began_s
    violated = sum(bool(result.violations) for result in results)
    broken = sum(bool(result.broken) for result in results)
    print(f"\n{len(results)} migrations in {took_s:.0f} s; {violated} violated, {broken} not tried")
    return 1 if bad or len(results) < len(made) else 0


if __name__ == "__main__":
    sys.exit(main())
