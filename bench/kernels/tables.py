"""Results of the kernels in tables: each beside numpy and memory, and which targets are met."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from bench.kernels.work import Case
from bench.parts import Part, Table
from bench.tables import head

_OUT_OF_CACHE_GIB = 1024  # 32 MiB a bitmap


def parts(results: dict[str, Any]) -> list[Part]:
    """All tables.

    :param results: of ``migrator-bench kernels --json``: ``machine``, and ``samples`` as
        :func:`bench.kernels.run.measure` yields them
    """
    samples: dict[Case, list[dict[str, Any]]] = {}
    for sample in results["samples"]:
        fields = {name: sample[name] for name in ("kernel", "guest_gib", "density", "sources")}
        samples.setdefault(Case(**fields), []).append(sample)
    return [
        head(results["machine"]),
        Table(
            "Medians. A rate counts what is read and what is written.",
            ["kernel", "guest GiB", "density", "sources", "GB/s", *_RATIOS],
            [_row(case, found) for case, found in samples.items()],
        ),
        Table(
            "What was aimed at, and the least of all medians.",
            ["", "target", "least", ""],
            _targets(samples),
        ),
    ]


_RATIOS = {
    "numpy's time : ours": "numpy_s",
    "rate : memcpy": "memcpy_s",
    "rate : reading": "read_s",
}


def _row(case: Case, samples: Sequence[dict[str, Any]]) -> list[str]:
    rate = median((s["bytes_read"] + s["bytes_written"]) / s["s"] for s in samples) / 1e9
    ratios = [f"{_ratio(samples, other):.2f}" for other in _RATIOS.values()]
    if samples[0]["bytes_written"] > 0.05 * samples[0]["bytes_read"]:
        ratios[-1] = ""  # not by far all that it does is reading
    about = [case.kernel, f"{case.guest_gib:g}", f"{case.density:g}", str(case.sources)]
    return [*about, f"{rate:.2f}", *ratios]


def _ratio(samples: Sequence[dict[str, Any]], other: str) -> float:
    return float(median(s[other] / s["s"] for s in samples))


def _targets(samples: dict[Case, list[dict[str, Any]]]) -> list[list[str]]:
    def of(what: str, target: float, other: str, wanted: Callable[[Case], bool]) -> list[str]:
        ratios = [_ratio(found, other) for case, found in samples.items() if wanted(case)]
        if not ratios:
            return [what, f"{target:g}", "", "not measured"]
        least = min(ratios)
        return [what, f"{target:g}", f"{least:.2f}", "met" if least >= target else "missed"]

    return [
        of(
            f"or and count of two sources, {_OUT_OF_CACHE_GIB} GiB, of memcpy",
            0.8,
            "memcpy_s",
            lambda case: case.kernel == "or" and case.guest_gib == _OUT_OF_CACHE_GIB,
        ),
        of("test for zeros, of reading", 0.5, "read_s", lambda case: case.kernel == "zero"),
        of("digests, of reading", 0.5, "read_s", lambda case: case.kernel == "digest"),
        of("runs, numpy's time", 1.0, "numpy_s", lambda case: case.kernel == "runs"),
    ]
