"""YAML from a file: what is ambiguous in it, or cannot reach the system, is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from migrator.errors import ConfigError

_MERGE = "tag:yaml.org,2002:merge"


class _Invalid(Exception):
    """Valid YAML that is not taken.

    :ivar key: the key it is about, or ``""``
    """

    def __init__(self, expected: str, key: str = "") -> None:
        super().__init__(expected)
        self.expected = expected
        self.key = key


class _Loader(yaml.SafeLoader):
    """Refuses keys that are given twice, and strings that no system call takes."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """As it is written: merges (``<<``), which bring keys that others override, come later."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise _Invalid(
                    f"line {line}: a duplicate key, first given in line {lines[key.value]}",
                    key.value,
                )
            lines[key.value] = line
        return node

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        """Any text, keys included."""
        text = super().construct_scalar(node)
        if isinstance(text, str):
            line = node.start_mark.line + 1
            if "\0" in text:
                raise _Invalid(f"line {line}: a string with a NUL byte")
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise _Invalid(f"line {line}: a string that is not valid Unicode")
        return text


def read(path: Path) -> Any:
    """The content of a YAML file.

    :raise ConfigError: it cannot be read, is not YAML, is nested too deeply, gives a key twice, or
        has a string in it that cannot reach the system
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=str(path)) from error
    except _Invalid as error:
        raise ConfigError(error.expected, file=str(path), key=error.key) from error
    except RecursionError as error:
        raise ConfigError("expected YAML: it is nested too deeply", file=str(path)) from error
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError) as error:
        # the latter: PyYAML's own, for values that do not go with their tag, such as !!int x
        told = " ".join(str(error).split())  # PyYAML tells it in several lines
        raise ConfigError(f"expected YAML: {told}", file=str(path)) from error
