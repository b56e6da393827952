"""Attention layers, and any tensors, from and to files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mha.convert.auto import Probe, auto, find_layers, verified
from mha.convert.config import config_beside
from mha.convert.containers import Contents, Refused, contents, write
from mha.convert.formats import READ_BY
from mha.convert.parameters import Layer, PackedParameters
from mha.convert.reading import some, under
from mha.convert.systems import FROM, Reader
from mha.optional import as_array
from mha.packing import PackedLayout
from mha.problem import COMPUTING

Array = NDArray[Any]

#: Of the metadata of a file: the layouts of its packed layers, JSON by their prefixes.
LAYOUTS = "mha.layouts"


def load(
    path: str | os.PathLike[str],
    num_heads: int | None = None,
    prefix: str | None = None,
    *,
    format: str | None = None,
    num_kv_heads: int | None = None,
    verify: Probe | None = None,
) -> PackedParameters:
    """Pack one attention layer of a model in a file.

    Parameters
    ----------
    path : path
        ``.safetensors``, ``.npz``, the ``.index.json`` of a model in shards, or a folder with one of these.
    num_heads, num_kv_heads : int, optional
        None is what ``config.json`` beside the file says, if there is one, or the shapes. From there also comes what
        else names leave open: the type of the model and the scale.
    prefix : str, optional
        Of the layer; None if the file has one layer only.
    format : str, optional
        One of ``mha.convert.FORMATS``; None is what the names and the type of the model say, see `auto`.
    verify : Probe, optional
        What the layer should answer.

    Returns
    -------
    PackedParameters
        Of the file's dtype; bfloat16 needs ml_dtypes.

    Raises
    ------
    ValueError
        If the file is damaged or no such file, has no such layer or several, or as `auto`.
    ImportError
        For safetensors without the package of that name.
    OSError
        If the file cannot be read.
    """
    path = Path(path)
    with contents(path) as found:
        packed = layouts(found)
        layers = [*packed, *find_layers(found.tensors)] if prefix is None else [prefix]
        arrays = found.arrays(layers[0]) if len(layers) == 1 else {}
    if len(layers) != 1:
        raise ValueError(f"{path} has {len(layers)} attention layers, {some(layers)}. Give the prefix of one.")
    (prefix,) = layers
    if prefix in packed and format in (None, "packed"):
        return verified(own_layer(path, under(arrays, prefix), packed[prefix]), verify)
    config = config_beside(path)
    num_heads, num_kv_heads = config.heads(num_heads, num_kv_heads)
    # A stated scale comes before the probe.
    probe = verify if format is None and config.scale is None else None
    read: Reader
    if format is None:
        read = partial(auto, model_type=config.model_type, verify=probe)
    elif format in READ_BY:
        read = FROM[READ_BY[format]]
    else:
        raise ValueError(f"format {format!r} is none of {', '.join(READ_BY)}. Choose one, or None.")
    parameters = config.applied(read(arrays, num_heads, prefix, num_kv_heads=num_kv_heads))
    return parameters if probe is not None else verified(parameters, verify)


def load_tensors(path: str | os.PathLike[str], prefix: str = "") -> dict[str, Array]:
    """The tensors of a file as arrays, all or those whose names begin with `prefix`; errors as `load`."""
    with contents(Path(path)) as found:
        return found.arrays(prefix)


def save(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Array] | PackedParameters,
    prefix: str = "",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors, or one packed layer, to a ``.safetensors`` or ``.npz`` file, whole or not at all.

    Parameters
    ----------
    path : path
    tensors : mapping of str to array, or PackedParameters
        NumPy arrays or PyTorch tensors. Of a packed layer: ``io_weight_bias``, ``bias_k`` and ``bias_v``, with its
        layout in the metadata, from where `load` reads it.
    prefix : str
        Put before every name.
    metadata : mapping of str to str, optional

    Raises
    ------
    ValueError
        For another suffix.
    ImportError
        For safetensors without the package of that name.
    OSError
        If the file cannot be written, as in a folder that is not there.
    """
    path, notes = Path(path), dict(metadata or {})
    check_target(path)
    if isinstance(tensors, PackedParameters):
        notes[LAYOUTS] = json.dumps({prefix: described(tensors)})
        tensors = own_tensors(tensors)
    # Not ascontiguousarray, which gives a number an axis.
    arrays = {prefix + name: np.asarray(as_array(x), order="C") for name, x in tensors.items()}
    # Where a link leads to, so that the link stays.
    path = path.resolve()
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(unfinished, arrays, notes, path.suffix)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def check_target(path: Path) -> None:
    """Whether `save` can write such a file."""
    if path.suffix not in (".safetensors", ".npz"):
        raise ValueError(f"{path} is neither .safetensors nor .npz. Choose one of these suffixes.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is no folder. Make it first.")


def own_tensors(parameters: PackedParameters) -> dict[str, Array]:
    """A packed layer's arrays by name."""
    named = {name: getattr(parameters, name) for name in ("io_weight_bias", "bias_k", "bias_v")}
    return {name: x for name, x in named.items() if x is not None}


def described(parameters: PackedParameters) -> dict[str, Any]:
    """A packed layer's layout and scale as plain values."""
    layout = parameters.layout
    scale = None if parameters.scale is None else float(parameters.scale)
    return {name: getattr(layout, name) for name in PackedLayout.__annotations__} | {"scale": scale}


def layouts(found: Contents) -> dict[str, dict[str, Any]]:
    """Of its packed layers, by their prefixes."""
    if LAYOUTS not in found.metadata:
        return {}
    stated = json.loads(found.metadata[LAYOUTS])
    if not isinstance(stated, dict) or not all(isinstance(x, dict) for x in stated.values()):
        raise Refused(f"has metadata {LAYOUTS} that is not a layout for each prefix.")
    return stated


def own_layer(path: Path, arrays: dict[str, Array], options: dict[str, Any]) -> PackedParameters:
    """A packed layer as `save` wrote it."""
    try:
        given = dict(options)
        scale = given.pop("scale")
        if scale is not None and not (type(scale) in (int, float) and 0 < scale < math.inf):
            raise ValueError(f"its scale is {scale!r}, not a positive number")
        layout = PackedLayout(given.pop("embed_dim"), given.pop("num_heads"), **given)
        rows = arrays.get("bias_k"), arrays.get("bias_v")
        parameters = PackedParameters(arrays["io_weight_bias"], layout, *rows, scale)
        if parameters.io_weight_bias.dtype not in COMPUTING:
            raise TypeError(f"io_weight_bias is {parameters.io_weight_bias.dtype}, not floating")
        Layer.unpacked(parameters)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has a packed layer that contradicts its layout: {error}. Write it again.") from error
    return parameters
