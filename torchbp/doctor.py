"""What of torchbp is active in this installation, and why the rest is not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil

import torch

from . import kernels

OPTIONAL_PACKAGES = ("tensorboard", "pandas", "matplotlib")

Row = tuple[str, str, str]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _compiler() -> Row:
    for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        path = shutil.which(name) if name else None
        if path is not None:
            return "C++ compiler", path, ""
    return "C++ compiler", "none", "needed only to build the compiled kernels"


def _kernel_rows() -> list[Row]:
    status = kernels.status()
    built_with = str(status["built_with"])
    if status["extension"]:
        without_cuda = "" if status["cuda"] else "built without nvcc or with a torch without CUDA"
        return [
            ("compiled kernels", f"built with torch {built_with}", ""),
            ("instruction set", str(status["isa"]), ""),
            ("CUDA kernels", "yes" if status["cuda"] else "no", without_cuda),
        ]
    return [
        ("compiled kernels", "no: PyTorch reference", str(status["reason"])),
        ("instruction set", "chosen by PyTorch", ""),
        ("CUDA kernels", "no", "they are part of the compiled kernels"),
    ]


def _cuda_device() -> Row:
    if torch.cuda.is_available():
        return "CUDA device", torch.cuda.get_device_name(), ""
    reason = "torch was built without CUDA" if torch.version.cuda is None else "none found"
    return "CUDA device", "none", reason


def _package(name: str) -> Row:
    version = _version(name)
    if version is None and importlib.util.find_spec(name) is not None:
        version = "present, version unknown"
    return name, version or "none", "" if version else "optional, not installed"


def rows() -> list[Row]:
    """Look at the installation.

    Returns:
        One ``(name, value, why not)`` for each thing looked at; the last is empty where nothing
        is missing.
    """
    torchbp = _version("torchbp")
    return [
        ("torchbp", torchbp or "from source", "" if torchbp else "not installed as a package"),
        ("torch", str(torch.__version__), ""),
        ("python", platform.python_version(), ""),
        *_kernel_rows(),
        _cuda_device(),
        _compiler(),
        *map(_package, OPTIONAL_PACKAGES),
    ]


def doctor() -> str:
    """Describe the installation.

    Returns:
        One line ``name  value  (why not)`` for each entry of `rows`, in columns.
    """
    table = rows()
    name_width = max(len(name) for name, _, _ in table)
    value_width = max(len(value) for _, value, _ in table)
    return "\n".join(
        f"{name:{name_width}}  {value:{value_width}}  {f'({why_not})' if why_not else ''}".rstrip()
        for name, value, why_not in table
    )
