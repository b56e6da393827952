"""A foreign format's tensors -> `Layer`. Names decide, never a guess; names that a format has not are refused."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from numpy.typing import NDArray

from mha.convert.axes import Heads
from mha.convert.formats import Format, Tensor
from mha.convert.parameters import Layer, Projection
from mha.optional import array_module, as_array

Array = NDArray[Any]
State = Mapping[str, Any]

_APPENDED = ("bias_k", "bias_v")


def flat(state: Any) -> dict[str, Any]:
    """The tensors by name; nested mappings, as Flax has them, become names with slashes. None counts as absent.

    Raises
    ------
    TypeError
        If it is not a mapping.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"state_dict is a {type(state).__name__}, not a mapping. Pass module.state_dict().")
    return dict(_entries(state))


def _entries(state: State, above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in state.items():
        if isinstance(value, Mapping):
            yield from _entries(value, f"{above}{name}/")
        elif value is not None:
            yield f"{above}{name}", value


def some(names: Iterable[str], limit: int = 12) -> str:
    """The first of them, for a message."""
    listed = list(names)
    return f"{listed[:limit]} and {len(listed) - limit} more" if len(listed) > limit else str(listed)


def under(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Those whose names begin with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def matching(formats: Sequence[Format], state: Mapping[str, Any], prefix: str = "") -> list[Format]:
    """Those of which all that a layer always has is there under the prefix, with as many axes."""

    def matches(one: Format) -> bool:
        return all(x.axes.fit(_shape(state.get(prefix + x.name))) for x in one.tensors if x.required) and not any(
            prefix + name in state for name in one.never
        )

    return [one for one in formats if matches(one)]


def of_type(formats: Sequence[Format], model_type: str | None) -> list[Format]:
    """Those that a model of this type in Hugging Face's sense can be in; None is any type."""
    if model_type is None:
        return list(formats)
    named = [one for one in formats if one.model_types is not None and model_type in one.model_types]
    return named or [one for one in formats if one.model_types is None] or list(formats)


def _shape(x: Any) -> tuple[int, ...]:
    return tuple(getattr(x, "shape", ()))


def chosen(formats: Sequence[Format], state: Mapping[str, Any]) -> Format:
    """The one of a family that the names and axes fit, else the one whose names fit best, for its error message."""
    fitting = matching(formats, state)
    if fitting:
        return fitting[0]
    return max(formats, key=lambda one: sum(x.name in state for x in one.weights))


def read(
    formats: Sequence[Format], state_dict: Any, prefix: str, num_heads: int | None, num_kv_heads: int | None = None
) -> Layer:
    """The layer under `prefix`, in the one of the formats that its names and axes fit.

    Raises
    ------
    ValueError
        If tensors are missing or unknown, shapes do not fit together, or the number of heads is needed.
    TypeError
        If `state_dict` is no mapping or the tensors differ in dtype.
    """
    state = flat(state_dict)
    found = under(state, prefix)
    one = chosen(formats, found)
    arrays = _arrays(one, formats, state, found, prefix)
    heads = _heads(one, arrays, num_heads, num_kv_heads)
    projections: dict[str, Projection] = {}
    for tensor in one.weights:
        projections |= _weights(one, tensor, arrays[tensor.name], heads)
    for tensor in one.tensors:
        if tensor.is_bias and tensor.name in arrays:
            _add_biases(one, tensor, arrays[tensor.name], heads, projections)
    return Layer(projections, heads.query, heads.key, one.scale, *(arrays.get(name) for name in _APPENDED))


def _arrays(
    one: Format, formats: Sequence[Format], state: dict[str, Any], found: dict[str, Any], prefix: str
) -> dict[str, Array]:
    optional = {tensor.name for tensor in one.tensors} | (set(_APPENDED) if one.appended else set())
    missing = [tensor.name for tensor in one.weights if tensor.name not in found]
    unknown = sorted(name for name in found if name not in optional and not one.passes_over(name))
    if missing or unknown:
        marks = [other.weights[0].name for other in formats]
        others = [
            name.removesuffix(mark)
            for name in state
            for mark in marks
            if name.endswith(mark) and name != prefix + mark
        ]  # fmt: skip
        hint = f"Give the prefix of one layer, the part of its names before {' or '.join(marks)}, and only known names."
        if missing and others:
            hint += f" Prefixes of such names: {some(others)}."
        raise ValueError(
            f"{one.title}, prefix {prefix!r}: missing {missing}, not understood {some(unknown)}, "
            f"present {some(sorted(found))}. {hint}"
        )
    arrays = {name: _native(as_array(found[name])) for name in found if name in optional}
    array_module(*arrays.values())
    if len({array.dtype for array in arrays.values()}) > 1:
        listed = ", ".join(f"{name} {array.dtype}" for name, array in arrays.items())
        raise TypeError(f"the tensors under prefix {prefix!r} differ in dtype: {listed}. Convert them to one dtype.")
    for tensor in one.tensors:
        if tensor.name in arrays and not tensor.axes.fit(arrays[tensor.name].shape):
            raise ValueError(
                f"{tensor.name} has shape {arrays[tensor.name].shape}, not the axes {tensor.axes.axes} of {one.title}. "
                "Is it another format's?"
            )
    return arrays


def _heads(one: Format, arrays: dict[str, Array], num_heads: int | None, num_kv_heads: int | None) -> Heads:
    said: dict[str, int] = {}
    for word, given in (("query", num_heads), ("key", num_kv_heads)):
        counts = {} if given is None else {f"num_{'kv_' * (word == 'key')}heads": _whole(given)}
        for tensor in one.tensors:
            if tensor.name not in arrays or tensor.axes.says_heads is None:
                continue
            if any((x in "qo") == (word == "query") for x in tensor.holds):
                counts[f"{tensor.name} {arrays[tensor.name].shape}"] = tensor.axes.says_heads(arrays[tensor.name].shape)
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise ValueError(f"the {word} heads are not one number: {listed}. Give none, and check the tensors.")
        if counts:
            said[word] = next(iter(counts.values()))
    if "query" not in said:
        raise ValueError(f"{one.title} does not say how many heads there are. Give num_heads.")
    query = said["query"]
    key = said.get("key", one.kv_heads or query)
    if min(query, key) < 1 or query % key:
        raise ValueError(f"{query} query heads and {key} key heads do not go together. Key heads divide query heads.")
    if key != query and not one.order.grouped:
        raise ValueError(f"{one.title} has {one.order.words}, so to {query} query heads {query} key heads, not {key}.")
    return Heads(query, key)


def _native(x: Array) -> Array:
    return x if x.dtype.isnative else x.astype(x.dtype.newbyteorder("="))


def _whole(given: Any) -> int:
    try:
        return operator.index(given)
    except TypeError:
        raise TypeError(f"a number of heads is {given!r}, a {type(given).__name__}. Give an int.") from None


def _weights(one: Format, tensor: Tensor, x: Array, heads: Heads) -> dict[str, Projection]:
    plain = tensor.axes.plain(x)
    if len(tensor.holds) == 1:
        return {tensor.holds: Projection(plain, None, tensor.name)}
    parts = _split(one, tensor, x.shape, plain, heads)
    return {
        letter: Projection(part, None, f"{tensor.name} ({letter})")
        for letter, part in zip(tensor.holds, parts, strict=True)
    }


def _split(one: Format, tensor: Tensor, shape: tuple[int, ...], plain: Array, heads: Heads) -> list[Array]:
    count = heads.query + 2 * heads.key
    if plain.shape[-1] % count:
        raise ValueError(
            f"{tensor.name} has shape {shape}: {plain.shape[-1]} features cannot be {heads.query} query, {heads.key} "
            f"key and {heads.key} value heads of one width. Check num_heads and num_kv_heads."
        )
    return one.order.split(plain, heads)


def _add_biases(one: Format, tensor: Tensor, x: Array, heads: Heads, projections: dict[str, Projection]) -> None:
    plain = tensor.axes.plain(x)
    widths = [projections[letter].weight.shape[1] for letter in tensor.holds]
    if plain.shape != (sum(widths),):
        of = " and ".join(f"{projections[letter].name} {widths[i]}" for i, letter in enumerate(tensor.holds))
        raise ValueError(f"{tensor.name} has shape {x.shape}, but there is one bias for each out-feature: {of}.")
    if len(tensor.holds) > 1 and any(other.holds == tensor.holds for other in one.weights):
        parts = _split(one, tensor, x.shape, plain, heads)
    else:
        bounds = [sum(widths[:i]) for i in range(len(widths) + 1)]
        parts = [plain[start:stop] for start, stop in pairwise(bounds)]
    for letter, part in zip(tensor.holds, parts, strict=True):
        projections[letter] = projections[letter]._replace(bias=part)
