"""The command line: ``torchbp verify``, ``torchbp ops`` and ``torchbp doctor``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments without the program's name; ``None`` for those of the process.

    Returns:
        The exit status: 0 for success, 1 if a check failed. Bad usage exits with 2.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        return options.command(options)
    except UsageError as error:
        parser.exit(2, f"torchbp: {error}\n")


class UsageError(Exception):
    """What was asked makes no sense; the message says why."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("torchbp", description="Explicit backward passes and blame.")
    commands = parser.add_subparsers(required=True, metavar="command")
    verify = commands.add_parser(
        "verify",
        help="check functions against finite differences, vmap, torch.compile and more",
        description="Checks functions of torchbp, or yours. Exits with 1 if a check fails.",
    )
    verify.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="an op such as linear, or package.module:Attribute (a function, an "
        "autograd.Function, or a Module that needs no arguments); default: every op",
    )
    verify.add_argument(
        "--inputs",
        metavar="SHAPES",
        help='random float64 arguments for package.module:Attribute, such as "3x4,4"; default: '
        "what Attribute.example_inputs() returns",
    )
    verify.add_argument("--backend", default="aot_eager", help="of torch.compile (%(default)s)")
    verify.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there too")
    verify.set_defaults(command=_verify)
    ops = commands.add_parser("ops", help="list every op, the layers it serves and its blame rules")
    ops.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there too")
    ops.set_defaults(command=_ops)
    doctor = commands.add_parser("doctor", help="describe this installation, for bug reports")
    doctor.set_defaults(command=_doctor)
    return parser


def _doctor(options: argparse.Namespace) -> int:
    from torchbp.doctor import doctor

    print(doctor())
    return 0


def _ops(options: argparse.Namespace) -> int:
    from torchbp.verify.catalogue import catalogue

    table = catalogue()
    print(table)
    if options.markdown:
        options.markdown.write_text(table.markdown() + "\n", encoding="utf-8")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from torchbp.verify import Report, Row, check, verify

    own = [name for name in options.names if ":" not in name]
    if options.inputs and len(own) == len(options.names):
        raise UsageError("--inputs is for NAMEs of the form package.module:Attribute")
    # Every target is resolved first: a misspelt one should not cost minutes.
    targets = [_target(name, options.inputs) for name in options.names if ":" in name]
    rows: list[Row] = []
    try:
        if own or not options.names:
            rows += verify(own or None, options.backend).rows
        for subject, inputs in targets:
            rows += check(subject, *inputs, backend=options.backend).rows
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(str(error)) from error
    report = Report(rows)
    print(report)
    if options.markdown:
        options.markdown.write_text(report.markdown(), encoding="utf-8")
    return 0 if report.passed else 1


def _target(name: str, shapes: str | None) -> tuple[Any, Sequence[Any]]:
    module_name, _, attribute = name.partition(":")
    sys.path.insert(0, "")  # as python -m does
    try:
        subject = importlib.import_module(module_name)
        for part in attribute.split("."):
            subject = getattr(subject, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"{name}: {error}") from error
    finally:
        sys.path.remove("")
    if shapes is not None:
        inputs = _random_inputs(shapes)
    elif hasattr(subject, "example_inputs"):
        inputs = subject.example_inputs()
    else:
        raise UsageError(f"{name}: give --inputs, or define {attribute}.example_inputs()")
    return _instance(name, subject), inputs


def _instance(name: str, subject: Any) -> Any:
    from torch import nn

    if not (isinstance(subject, type) and issubclass(subject, nn.Module)):
        return subject
    try:
        return subject()
    except TypeError as error:
        raise UsageError(
            f"{name}: a Module class must be constructible without arguments: {error}"
        ) from error


def _random_inputs(shapes: str) -> list[Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    try:
        sizes = [[int(size) for size in shape.split("x")] for shape in shapes.split(",")]
        return [torch.randn(s, dtype=torch.float64, generator=generator) for s in sizes]
    except (ValueError, RuntimeError):
        raise UsageError(f'--inputs: expected shapes such as "3x4,4", got {shapes!r}') from None
