"""``python -m mha info [--json]``, ``python -m mha demo`` and ``python -m mha convert``."""

from __future__ import annotations

import argparse
import sys

from mha.convert import command


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m mha", description="Fused multi-head attention for NumPy arrays.")
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="versions, threads, and the kernels of both backends")
    info.add_argument("--json", action="store_true", help="as JSON")
    commands.add_parser("demo", help="a trained vision transformer on NumPy arrays", add_help=False)
    convert = commands.add_parser("convert", help="the attention layers of a model's file in another format")
    command.add_arguments(convert)
    options, rest = parser.parse_known_args(argv)
    if options.command == "demo":
        from mha import demo

        return int(demo.main(rest) or 0)
    if rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    if options.command == "convert":
        return command.run(options)
    from mha.info import show_config

    show_config(options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
