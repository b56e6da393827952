"""Which format a state is in, from its names; and whether a converted layer computes what it should."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mha.convert.formats import FORMATS, READ_BY, Format
from mha.convert.parameters import PackedParameters
from mha.convert.reading import flat, matching, of_type, read, under
from mha.functional import multi_head_attention

Array = NDArray[Any]


class Probe(NamedTuple):
    """What a layer is known to answer.

    Attributes
    ----------
    query : (N, L, E) or (L, E) array
    output : array
        The answer in evaluation.
    key, value : arrays, optional
        None is the query, or for the value the key.
    is_causal : bool
    tolerance : float, optional
        Largest difference, relative to the largest of `output`; None is 1e-5, for half types 2e-2.
    """

    query: Array
    output: Array
    key: Array | None = None
    value: Array | None = None
    is_causal: bool = False
    tolerance: float | None = None


def find_layers(state_dict: Mapping[str, Any]) -> dict[str, list[str]]:
    """The attention layers of a whole model, by what their names say.

    Parameters
    ----------
    state_dict : mapping of str to array or torch tensor

    Returns
    -------
    dict of str to list of str
        The layers' prefixes, in the order of the state, and the formats that each may be in, by the names of their
        readers.
    """
    state = flat(state_dict)
    marks: dict[str, list[Format]] = {}
    for one in FORMATS.values():
        marks.setdefault(one.weights[0].name, []).append(one)
    found: dict[str, list[str]] = {}
    for name in state:
        for mark, formats in marks.items():
            prefix = name.removesuffix(mark)
            if prefix == name or prefix[-1:] not in ("", ".", "/", ":"):
                continue
            fitting = matching(formats, state, prefix)
            if fitting:
                found.setdefault(prefix, []).extend(READ_BY[one.name] for one in fitting)
    return found


def auto(
    state_dict: Mapping[str, Any],
    num_heads: int | None = None,
    prefix: str = "",
    *,
    num_kv_heads: int | None = None,
    model_type: str | None = None,
    verify: Probe | None = None,
) -> PackedParameters:
    """Pack one attention layer of whatever format its names say.

    Parameters
    ----------
    state_dict, num_heads, prefix, num_kv_heads
        As of every reader.
    model_type : str, optional
        Of Hugging Face's ``config.json``: decides between formats with the same names.
    verify : Probe, optional
        What the layer should answer: decides between formats with the same names, and is checked in any case.

    Returns
    -------
    PackedParameters

    Raises
    ------
    ValueError
        If no format has these names, or several do that read different layers from them (with the list of these), or
        the layer does not answer what `verify` says.
    TypeError
        As of every reader.
    """
    state = flat(state_dict)
    fitting = of_type(matching(list(FORMATS.values()), state, prefix), model_type)
    if not fitting:
        layers = list(find_layers(state))
        hint = f"Layers are under {layers[:12]}." if layers else "No layer of a known format is in this state."
        raise ValueError(f"no format has the names {sorted(under(state, prefix))[:12]} under prefix {prefix!r}. {hint}")
    made: dict[str, PackedParameters] = {}
    refused: dict[str, ValueError] = {}
    for one in fitting:
        try:
            made[READ_BY[one.name]] = read([one], state, prefix, num_heads, num_kv_heads).packed()
        except ValueError as error:
            refused[one.name] = error
    if not made:
        raise next(iter(refused.values()))
    if verify is not None:
        differences = {name: difference(parameters, verify) for name, parameters in made.items()}
        right = [name for name, found in differences.items() if found <= _tolerance(verify)]
        if not right:
            raise ValueError(
                f"the layer under prefix {prefix!r} does not answer what verify says: relative differences "
                f"{ {name: float(f'{x:.2g}') for name, x in differences.items()} }, allowed {_tolerance(verify):g}. "
                "Check num_heads, num_kv_heads and the probe."
            )
        return made[right[0]]
    names = list(made)
    if any(_differ(made[names[0]], made[name]) for name in names[1:]):
        raise ValueError(
            f"the names under prefix {prefix!r} are those of {', '.join(names)}, which order their features otherwise. "
            f"Call {' or '.join(f'from_{name}' for name in names)}, or give model_type or verify."
        )
    return made[names[0]]


def _differ(a: PackedParameters, b: PackedParameters) -> bool:
    return a.layout != b.layout or a.scale != b.scale or bool((a.io_weight_bias != b.io_weight_bias).any())


def _tolerance(probe: Probe) -> float:
    if probe.tolerance is not None:
        return probe.tolerance
    return 1e-5 if probe.query.dtype.itemsize > 2 else 2e-2


def difference(parameters: PackedParameters, probe: Probe) -> float:
    """The largest difference of the layer's answer, relative to the largest of the probe's output; inf if the shapes
    do not fit."""
    key = probe.query if probe.key is None else probe.key
    value = key if probe.value is None else probe.value
    try:
        output = multi_head_attention(
            probe.query, key, value, attn_drop=0.0, out_drop=0.0, is_causal=probe.is_causal, training=False,
            **parameters.options,
        ).attn_output  # fmt: skip
    except ValueError:
        return np.inf
    if output.shape != probe.output.shape:
        return np.inf
    if not output.size:
        return 0.0
    expected = probe.output.astype(np.float64)
    largest = float(abs(output.astype(np.float64) - expected).max())
    return largest / max(float(abs(expected).max()), float(np.finfo(np.float32).tiny))


def verified(parameters: PackedParameters, probe: Probe | None) -> PackedParameters:
    """The parameters, if they answer what the probe says.

    Raises
    ------
    ValueError
        With the difference, if they do not.
    """
    if probe is not None and (found := difference(parameters, probe)) > _tolerance(probe):
        raise ValueError(
            f"the layer does not answer what verify says: relative difference {found:.2g}, allowed "
            f"{_tolerance(probe):g}. Check the format, num_heads, num_kv_heads and the probe."
        )
    return parameters
