"""`from_x` and `to_x` for every format, made from the table in `formats`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from numpy.typing import NDArray

from mha.convert.formats import FAMILIES, FORMATS, READ_BY, Format
from mha.convert.parameters import WORDS, Layer, PackedParameters
from mha.convert.reading import read
from mha.convert.writing import reasons_against, write

Array = NDArray[Any]


class Reader(Protocol):
    """A `from_x`."""

    def __call__(
        self, state_dict: Mapping[str, Any], num_heads: int | None = None, prefix: str = "", *,
        num_kv_heads: int | None = None,
    ) -> PackedParameters: ...  # fmt: skip


class Writer(Protocol):
    """A `to_x`."""

    def __call__(self, parameters: PackedParameters, prefix: str = "") -> dict[str, Array]: ...


def family(name: str) -> list[Format]:
    """The formats that `from_<name>` reads and `to_<name>` chooses from."""
    return [FORMATS[one] for one in FAMILIES.get(name, (name,))]


def reader(name: str) -> Reader:
    """``from_<name>``."""
    formats = family(name)

    def read_one(
        state_dict: Mapping[str, Any], num_heads: int | None = None, prefix: str = "", *,
        num_kv_heads: int | None = None,
    ) -> PackedParameters:  # fmt: skip
        return read(formats, state_dict, prefix, num_heads, num_kv_heads).packed()

    read_one.__name__ = read_one.__qualname__ = f"from_{name}"
    read_one.__doc__ = _READER.format(title=formats[0].title, tensors=_listed(formats))
    return read_one


#: Formats of a family that are written only by their own name: another object's, or another argument's of it.
_ON_REQUEST = ("paddle_flat", "paddle_nn")


def writer(name: str) -> Writer:
    """``to_<name>``."""
    formats = [FORMATS[name]] if name in _ON_REQUEST else [one for one in family(name) if one.name not in _ON_REQUEST]

    def write_one(parameters: PackedParameters, prefix: str = "") -> dict[str, Array]:
        layer = Layer.unpacked(parameters)
        best = min(formats, key=lambda one: len(reasons_against(one, layer)))
        return write(best, layer, prefix)

    write_one.__name__ = write_one.__qualname__ = f"to_{name}"
    write_one.__doc__ = _WRITER.format(title=formats[0].title, tensors=_listed(formats))
    return write_one


_READER = """Pack one attention layer of {title}.

    Parameters
    ----------
    state_dict : mapping of str to array or torch tensor
        Nested mappings count as names with slashes; None counts as absent; tensors of whatever device are read into
        NumPy arrays.

{tensors}
    num_heads : int, optional
        Query heads H; needed where shapes do not tell them.
    prefix : str
        What stands before these names; other names are not looked at.
    num_kv_heads : int, optional
        Key and value heads of a layer with grouped heads; None is `num_heads`.

    Returns
    -------
    PackedParameters
        A copy, of the tensors' dtype.

    Raises
    ------
    ValueError
        If tensors are missing or unknown, or shapes do not fit together and the heads.
    TypeError
        If tensors are not floating or differ in dtype.
    """

_WRITER = """Write packed parameters as one attention layer of {title}; undoes its reader bit for bit.

    Parameters
    ----------
    parameters : PackedParameters
    prefix : str
        Put before every name.

    Returns
    -------
    dict of str to array
        Views of `io_weight_bias` where the format's axes allow it.

{tensors}

    Raises
    ------
    ValueError
        If the format cannot say the layer, with every property that it has no place for.
    TypeError
        If the arrays differ in dtype.

    Warns
    -----
    UserWarning
        If the format always has biases, or all of them as soon as one, and the layer has not: then they are zeros.
    """


def _listed(formats: list[Format]) -> str:
    lines = []
    for i, one in enumerate(formats):
        if i:
            lines.append("or")
        fused = any(len(tensor.holds) > 1 and not tensor.is_bias for tensor in one.tensors)
        for tensor in one.tensors:
            words = ", ".join(WORDS[letter] for letter in tensor.holds)
            optional = "" if tensor.required else ", optional"
            lines.append(f"- ``{tensor.name}`` {tensor.axes.axes}{optional}: {words}")
        if fused:
            lines.append(f"Fused is {one.order.words}.")
        if one.scale is not None:
            lines.append(f"Scores are multiplied by {one.scale:g}.")
    return "\n".join(f"        {line}" for line in lines)


#: By the name in ``from_<name>`` and ``to_<name>``.
FROM: dict[str, Reader] = {name: reader(name) for name in dict.fromkeys(READ_BY.values())}
TO: dict[str, Writer] = {name: writer(name) for name in (*FROM, *_ON_REQUEST)}
