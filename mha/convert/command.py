"""``python -m mha convert``: every attention layer of a model's file into another format."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from mha.convert.auto import auto, find_layers
from mha.convert.config import config_beside
from mha.convert.containers import contents
from mha.convert.files import LAYOUTS, check_target, described, layouts, own_layer, own_tensors, save
from mha.convert.reading import under
from mha.convert.systems import FROM, TO, family
from mha.optional import progress

Array = NDArray[Any]

PACKED = "packed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of the command."""
    parser.add_argument("source", type=Path, help=".safetensors, .npz, an .index.json of shards, or their folder")
    parser.add_argument("target", type=Path, help=".safetensors or .npz")
    parser.add_argument("--to", required=True, choices=[PACKED, *TO], help="format of the attention layers there")
    parser.add_argument(
        "--from", dest="source_format", choices=list(FROM), help="their format now, if names leave doubt"
    )
    parser.add_argument("--prefix", default="", help="only layers whose names begin so")
    parser.add_argument("--heads", type=count, help="query heads; else what config.json beside the source says")
    parser.add_argument("--kv-heads", type=count, help="key heads of grouped layers; likewise")
    parser.add_argument("--dry-run", action="store_true", help="only print which tensor becomes which")


def count(text: str) -> int:
    """A number of heads, by the name under which argparse refuses what is none."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def run(options: argparse.Namespace) -> int:
    """Convert; returns the exit status. What is no attention layer goes over unchanged."""
    try:
        return _run(options)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"mha convert: {error}", file=sys.stderr)
        return 1


def _run(options: argparse.Namespace) -> int:
    check_target(options.target)
    config = config_beside(options.source)
    heads, kv_heads = config.heads(options.heads, options.kv_heads)
    with contents(options.source) as found:
        packed = layouts(found)
        formats = find_layers(found.tensors)
        if options.source_format is not None:
            formats = {prefix: names for prefix, names in formats.items() if options.source_format in names}
        layers = [prefix for prefix in [*formats, *packed] if prefix.startswith(options.prefix)]
        tensors: dict[str, Array] = found.arrays()
        metadata = {name: text for name, text in found.metadata.items() if name != LAYOUTS}
    if not layers:
        of = "a known format" if options.source_format is None else options.source_format
        raise ValueError(f"{options.source} has no attention layer of {of} under {options.prefix!r}.")
    written = {prefix: layout for prefix, layout in packed.items() if prefix not in layers}
    read = partial(auto, model_type=config.model_type) if options.source_format is None else FROM[options.source_format]
    kept = len(tensors)
    for prefix in progress(layers, "converting"):
        if prefix in packed:
            parameters = own_layer(options.source, under(tensors, prefix), packed[prefix])
            names = list(own_tensors(parameters))
        else:
            try:
                parameters = config.applied(read(tensors, heads, prefix, num_kv_heads=kv_heads))
            except (ValueError, TypeError) as error:
                raise type(error)(f"layer {prefix!r}: {error} --from and --prefix choose layers.") from error
            own = [tensor.name for name in formats[prefix] for one in family(name) for tensor in one.tensors]
            names = [name for name in dict.fromkeys([*own, "bias_k", "bias_v"]) if prefix + name in tensors]
        kept -= len(names)
        if options.to == PACKED:
            made = {prefix + name: x for name, x in own_tensors(parameters).items()}
            written[prefix] = described(parameters)
        else:
            made = TO[options.to](parameters, prefix)
        before = {name: tensors.pop(prefix + name) for name in names}
        taken = sorted(made.keys() & tensors.keys())
        if taken:
            raise ValueError(f"{options.source} already has {taken} beside the layer {prefix!r}. Rename them first.")
        tensors |= made
        if options.dry_run:
            _show(prefix, before, {name.removeprefix(prefix): x for name, x in made.items()})
    if options.dry_run:
        print(f"{len(layers)} layers, {kept} other tensors unchanged; nothing is written")
        return 0
    save(options.target, tensors, metadata=metadata | ({LAYOUTS: json.dumps(written)} if written else {}))
    print(f"{options.target}: {len(layers)} layers as {options.to}, {kept} other tensors unchanged")
    return 0


def _show(prefix: str, before: dict[str, Array], after: dict[str, Array]) -> None:
    left = [f"{name} {x.shape} {x.dtype}" for name, x in before.items()]
    right = [f"{name} {x.shape}" for name, x in after.items()]
    width = max(map(len, left))
    print(prefix or "(no prefix)")
    for i in range(max(len(left), len(right))):
        before_that = left[i] if i < len(left) else ""
        print(f"  {before_that:<{width}}  {'->' if i == 0 else '  '}  {right[i] if i < len(right) else ''}".rstrip())
