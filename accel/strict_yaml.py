"""YAML as people mean it: safe, no aliases, no key twice, keys that are text."""

from __future__ import annotations

from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """The safe loader, refusing aliases: a few of them can mean billions of values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if not isinstance(key, str):
                raise yaml.YAMLError(f"the key {key!r} is no text; put quotes around it")
        if len(set(keys)) != len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            line = node.start_mark.line + 1
            raise yaml.YAMLError(f"the key {twice!r} is there twice (mapping at line {line})")
        return super().construct_mapping(node, deep)


def read(data: bytes) -> Any:
    """What one document in UTF-8 says.

    Raises:
        ValueError: it cannot be read; says why in one line.
    """
    try:
        return yaml.load(data.decode("utf-8"), Loader=_Loader)
    except UnicodeDecodeError as error:
        raise ValueError(f"not valid UTF-8 (byte {error.start + 1})") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(" ".join(f"not valid YAML: {error}".split())) from None
