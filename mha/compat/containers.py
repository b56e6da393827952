"""Nested dicts in place of arrays, as Ivy's containers: a function of arrays runs once for every leaf."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mha.compat.differentiable import Backward
from mha.optional import array_module

#: (output, weights or None), and its backward.
Call = tuple[tuple[Any, Any], Backward]


@dataclass(frozen=True)
class Selection:
    """Which leaves the function is for; the fields are Ivy's arguments.

    key_chains : "a/b" for the leaf b in the dict a, "a" for all in a; None is all leaves.
    to_apply : whether those are the ones the function is for, or the ones it is not for.
    prune_unapplied : leave the others out of the result, in which else the first container's value stands.
    map_sequences : lists and tuples are containers too.
    """

    key_chains: Iterable[str] | None = None
    to_apply: bool = True
    prune_unapplied: bool = False
    map_sequences: bool = False

    def nested(self, x: Any) -> bool:
        """Whether `x` is a container."""
        return isinstance(x, Mapping) or (self.map_sequences and isinstance(x, (list, tuple)))

    def applies(self, chain: str) -> bool:
        """Whether the function is for the leaf with this chain of keys."""
        if self.key_chains is None:
            return True
        found = any(f"{chain}/".startswith(f"{each}/") for each in self.key_chains)
        return found == bool(self.to_apply)


def run(function: Callable[..., Call], arguments: Mapping[str, Any], selection: Selection, chain: str = "") -> Call:
    """Call `function` for the leaves of its arguments; those that are no containers go into every call.

    Raises
    ------
    ValueError
        If containers have different keys.
    """
    nested = {name: x for name, x in arguments.items() if selection.nested(x)}
    if not nested:
        return function(**arguments) if selection.applies(chain) else _unapplied(arguments)
    keys = {name: _keys(x) for name, x in nested.items()}
    first = next(iter(keys.values()))
    if any(set(each) != set(first) for each in keys.values()):
        raise ValueError(f"containers with different keys{f' in {chain!r}' if chain else ''}: {keys}. Give them alike.")
    children = {}
    for key in first:
        inner = {name: x[key] if name in nested else x for name, x in arguments.items()}
        at = f"{chain}/{key}" if chain else str(key)
        leaf = not any(selection.nested(inner[name]) for name in nested)
        if leaf and not selection.applies(at):
            if not selection.prune_unapplied:
                children[key] = _unapplied({name: inner[name] for name in nested})
            continue
        child = run(function, inner, selection, at)
        if leaf or child[0][0]:
            children[key] = child
    like = next(iter(nested.values()))
    parts = [_like(like, {key: child[0][i] for key, child in children.items()}) for i in range(2)]

    def backward(grad_output: Any, grad_weights: Any = None, mask_gradients: bool = False) -> dict[str, Any]:
        made = {
            key: child[1](grad_output[key], None if grad_weights is None else grad_weights[key], mask_gradients)
            for key, child in children.items()
        }
        return _collected(made, nested)

    return (parts[0], parts[1]), backward


def _keys(x: Any) -> list[Any]:
    return list(x) if isinstance(x, Mapping) else list(range(len(x)))


def _like(container: Any, children: dict[Any, Any]) -> Any:
    return children if isinstance(container, Mapping) else list(children.values())


def _unapplied(arguments: Mapping[str, Any]) -> Call:
    """The first container's value as it is, without weights."""
    name, value = next(iter(arguments.items()))
    others = {other: x for other, x in arguments.items() if other != name and hasattr(x, "shape")}

    def backward(grad_output: Any, grad_weights: Any = None, mask_gradients: bool = False) -> dict[str, Any]:
        zeros = {other: array_module(x).zeros(x.shape, x.dtype) for other, x in others.items()}
        return zeros | {name: grad_output}

    return (value, None), backward


def _collected(made: dict[Any, dict[str, Any]], nested: dict[str, Any]) -> dict[str, Any]:
    """Gradients by parameter: a container where the argument was one, else the sum over the calls it went into."""
    gradients: dict[str, Any] = {}
    for name in {name: None for each in made.values() for name in each}:
        by_key = {key: each[name] for key, each in made.items() if name in each}
        first, *others = by_key.values()
        gradients[name] = _like(nested[name], by_key) if name in nested else sum(others, first)
    return gradients
