"""Helper processes that run something else than they should."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from tracker import child


def replace(monkeypatch: pytest.MonkeyPatch, module: str, program: str) -> None:
    """Let each helper process whose function is in a module run another program.

    :param module: such as ``tracker.inject.injector``
    :param program: Python; ``{arguments}`` in it becomes the tuple that the function would be given
    """
    usual = child.program

    def text(call: partial[Any]) -> str:
        if call.func.__module__ != module:
            return usual(call)
        return program.replace("{arguments}", repr(call.args))

    monkeypatch.setattr(child, "program", text)
