"""What modules return: tensors, tuples of them, diffusers' output objects."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any


def leaves(output: Any) -> list[Any]:
    import torch

    if isinstance(output, torch.Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output
    if isinstance(output, (dict, tuple, list)):
        return [leaf for part in parts for leaf in leaves(part)]
    return []


def first_leaf(output: Any) -> Any:
    """The first tensor of an output."""
    return leaves(output)[0]


def combined(outputs: list[Any], weights: tuple[float, ...]) -> Any:
    """Sum of weighted outputs of one structure, in float32, in their own type."""

    def total(*tensors: Any) -> Any:
        weighted = [w * t.float() for w, t in zip(weights, tensors, strict=True)]
        return functools.reduce(operator.add, weighted).to(tensors[0].dtype)

    return map_tensors(total, *outputs)


def map_tensors(change: Callable, *outputs: Any) -> Any:
    """`change` of the tensors of outputs of one structure, which the result has, too."""
    import torch

    first = outputs[0]
    if isinstance(first, torch.Tensor):
        return change(*outputs)
    if isinstance(first, dict):
        return type(first)(**{k: map_tensors(change, *(o[k] for o in outputs)) for k in first})
    if isinstance(first, (tuple, list)):
        return type(first)(map_tensors(change, *parts) for parts in zip(*outputs, strict=True))
    return first


def size_of(output: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves(output))


def memory_name(output: Any) -> str:
    """What a report calls the bytes of an output, by where it is."""
    on_host = all(leaf.device.type == "cpu" for leaf in leaves(output))
    return "bytes_host" if on_host else "bytes_device"


def versions_of(output: Any) -> tuple[int, ...]:
    """Counters of changes in place; of none in inference mode, which does not count."""
    return tuple(0 if leaf.is_inference() else leaf._version for leaf in leaves(output))


def shape_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Shape of the first tensor of a call."""
    for value in (*args, *kwargs.values()):
        if hasattr(value, "shape"):
            return value.shape
    return None


def passed(layout: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a block returns that does nothing: its inputs, in the order it returns them."""
    names = {"hidden": ("hidden_states", 0), "text": ("encoder_hidden_states", 1)}
    found = []
    for part in layout:
        name, place = names[part]
        found.append(args[place] if place < len(args) else kwargs[name])
    return found[0] if len(found) == 1 else tuple(found)


def hidden_of(layout: tuple[str, ...], output: Any) -> Any:
    """The hidden tokens that a block returns in this order."""
    return output if len(layout) == 1 else output[layout.index("hidden")]


def with_hidden(layout: tuple[str, ...], output: Any, hidden: Any) -> Any:
    """What a block returns, with other hidden tokens."""
    if len(layout) == 1:
        return hidden
    at = layout.index("hidden")
    return type(output)((*output[:at], hidden, *output[at + 1 :]))
