"""Our migration against QEMU's own, in tables: ratios and targets, and what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.parts import Bullets, Part, Table
from bench.tables import head, spread
from bench.versus.targets import TARGETS, Entry, Ratio, completed, ratio

_MB = 1_000_000


def parts(results: dict[str, Any]) -> list[Part]:
    """All tables."""
    entries = results["entries"]
    qemus = list(dict.fromkeys(entry["qemu"] for entry in entries))
    found: list[Part] = [head(results["machine"])]
    for qemu in qemus:
        cases = _cases([entry for entry in entries if entry["qemu"] == qemu])
        found += [_ratios(qemu, cases), *_notes(cases), _samples(qemu, cases)]
    if not results["versus"]["throttle"]:
        found.append("This migrator cannot slow a guest: what outruns its link does not converge.")
    return found


def _cases(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Those of the same guest and link together, ours first."""
    names = dict.fromkeys((entry["workload"], entry["link"]) for entry in entries)
    return [
        [entry for entry in entries if (entry["workload"], entry["link"]) == name] for name in names
    ]


# -- ratios --------------------------------------------------------------------------------------


def _ratios(qemu: str, cases: Sequence[Sequence[Entry]]) -> Table:
    rows, met, of = [], 0, 0
    for ours, *theirs in cases:
        found = [ratio(target, ours, theirs) for target in TARGETS]
        met += sum(r.met for r in found if r)
        of += sum(r is not None for r in found)
        rows.append([_case(ours), *map(_ratio, found), _who(ours, theirs)])
    return Table(
        f"The migrator : {qemu} with its best setting in each measure; {met} of {of} targets met.",
        ["guest, link", *map(str, TARGETS), "completed"],
        rows,
    )


def _ratio(found: Ratio | None) -> str:
    if found is None:
        return "–"
    verdict = "met" if found.met else "missed"
    return f"{spread(found.values, 2)} {verdict}, {found.best or 'plain'}"


def _who(ours: Entry, theirs: Sequence[Entry]) -> str:
    """Who came to an end."""
    us = all(not sample["problem"] for sample in ours["samples"])
    them = any(map(completed, theirs))
    if us and them:
        return "both"
    if us:
        return "migrator only"
    return "QEMU only: missed" if them else "neither"


def _case(entry: Entry) -> str:
    return f"{entry['workload']}, {entry['link']}"


# -- samples -------------------------------------------------------------------------------------


def _samples(qemu: str, cases: Sequence[Sequence[Entry]]) -> Table:
    rows = [
        [
            f"{_case(entry)}: {_way(entry)}",
            _values(entry, "total_s", digits=1),
            _values(entry, "downtime_ms"),
            _values(entry, "felt_ms"),
            _values(entry, "bytes", 1 / _MB),
            _values(entry, "progress", 100),
            _values(entry, "rounds"),
            _remarks(entry),
        ]
        for case in cases
        for entry in case
    ]
    limit = cases[0][0]["downtime_limit_ms"]
    heads = ["total s", "downtime ms", "longest gap ms", "MB sent", "guest %", "rounds", "remarks"]
    return Table(f"{qemu}: what was measured; downtime limit {limit:.0f} ms.", ["", *heads], rows)


def _way(entry: Entry) -> str:
    return ", ".join(part for part in (entry["who"], entry["setting"]) if part)


def _values(entry: Entry, measure: str, scale: float = 1.0, digits: int = 0) -> str:
    values = [sample[measure] * scale for sample in completed(entry) if sample[measure] is not None]
    return spread(values, digits) if values else "–"


def _remarks(entry: Entry) -> str:
    samples = [*entry["samples"], *entry["checks"]]
    remarks = {
        "did not complete": sum(sample["gave_up"] for sample in samples),
        "broke": sum(bool(sample["problem"]) and not sample["gave_up"] for sample in samples),
        "lost": sum(bool(sample["lost"]) for sample in samples),
    }
    said = [f"{words}: {count} of {len(samples)}" for words, count in remarks.items() if count]
    slowed = [s for sample in completed(entry) if (s := sample["throttle_percent"])]
    return ", ".join([*said, *([f"slowed by {max(slowed)} %"] if slowed else [])])


def _notes(cases: Sequence[Sequence[Entry]]) -> list[Part]:
    """Why something did not complete, or what was lost."""
    lines = [
        (f"{_case(entry)}: {_way(entry)}, {kind} {sample['run'] + 1}", words)
        for case in cases
        for entry in case
        for kind, samples in (("run", entry["samples"]), ("comparison", entry["checks"]))
        for sample in samples
        if (words := sample["problem"] or sample["lost"])
    ]
    return [Bullets(lines)] if lines else []
