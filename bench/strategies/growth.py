"""What a strategy costs as guests grow: a line through what was measured. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_GIB = 1 << 30
_MIB = 1 << 20
_LEAST_SIZES = 3
_FAR_GIB = 1024

Cell = dict[str, Any]


def fits(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Fit ``a + b * GiB``, by least squares, wherever there are three sizes or more.

    :param cells: see :mod:`bench.strategies.run`
    :return: see there: ``growth``
    """
    measured = [cell for cell in cells if cell["state"] == "complete" and cell["usage"]]
    found = []
    for strategy, workload in dict.fromkeys((c["strategy"], c["workload"]) for c in measured):
        some = [c for c in measured if (c["strategy"], c["workload"]) == (strategy, workload)]
        if len({cell["memory"] for cell in some}) < _LEAST_SIZES:
            continue
        for what, of in _QUANTITIES.items():
            samples = [(cell["memory"] / _GIB, value) for cell in some for value in of(cell)]
            found.append(
                {"strategy": strategy, "workload": workload, "what": what, **line(samples)}
            )
    return found


def line(samples: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """The line through samples of (GiB, value); there have to be three or more.

    :return: ``a``, ``b``, ``at_1_tib``, its standard error ``at_1_tib_error``, and the ``samples``
    """
    gib, values = np.array(samples, float).T
    terms = np.stack([np.ones_like(gib), gib], axis=1)
    far = np.array([1.0, _FAR_GIB])
    coefficients = np.linalg.lstsq(terms, values, rcond=None)[0]
    variance = ((values - terms @ coefficients) ** 2).sum() / (len(gib) - 2)
    error = np.sqrt(variance * (far @ np.linalg.inv(terms.T @ terms) @ far))
    a, b = coefficients.tolist()
    return {
        "a": a,
        "b": b,
        "at_1_tib": float(far @ coefficients),
        "at_1_tib_error": float(error),
        "samples": [list(sample) for sample in samples],
    }


def arm_ms(cell: Cell) -> list[float]:
    """What it takes until writes are tracked, and what was copied is known, in each round."""
    return [round_["start_ms"] + round_["start_digest_ms"] for round_ in cell["rounds"]]


def idle_ms(cell: Cell) -> list[float]:
    """What a collection takes when nothing was written, in each round."""
    return [_ms(_one(round_, "idle")) for round_ in cell["rounds"]]


def running_ms(cell: Cell) -> list[float]:
    """What each collection takes while the guest runs, and writes."""
    collections = (c for round_ in cell["rounds"] for c in round_["collections"])
    return [_ms(collection) for collection in collections if collection["when"] == "running"]


def ns_per_page(cell: Cell, least_pages: int = 64) -> list[float]:
    """What a page that is reported adds to a collection, while the guest stands, in each round.

    It is a difference of two times, and may be negative where that is noise. Collections of few
    pages do not tell.
    """
    pairs = [(_one(round_, "idle"), _one(round_, "last")) for round_ in cell["rounds"]]
    return [
        (_ms(last) - _ms(idle)) * 1e6 / last["pages"]
        for idle, last in pairs
        if last["pages"] >= least_pages
    ]


def tracker_mib(cell: Cell) -> list[float]:
    """Memory that the source takes, in its process and in those it starts; one number."""
    usage = cell["usage"]
    return [(usage["tracker_bytes"] - usage["before_bytes"] + usage["children_bytes"]) / _MIB]


_QUANTITIES = {"arm ms": arm_ms, "collect ms": idle_ms, "tracker MiB": tracker_mib}


def _one(round_: dict[str, Any], when: str) -> dict[str, Any]:
    return next(c for c in round_["collections"] if c["when"] == when)


def _ms(collection: dict[str, Any]) -> float:
    return float(collection["ms"] + collection["digest_ms"])
