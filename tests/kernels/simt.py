"""CUDA kernels compiled for the CPU: see ``cpp/tests/simt.h`` for how to test a family with it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

CPP = Path(__file__).parents[2] / "cpp"
COMPILER = shutil.which("g++")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # the order in simt.h
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}
SEEDS = (0, 1, 2)  # 0: in order
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
wide_dtypes = pytest.mark.parametrize("dtype", DTYPES[:2], ids=["float32", "float64"])

FLAGS = ["-std=c++20", "-fPIC", "-Wall", "-Wextra", "-Werror", f"-I{CPP}", f"-I{CPP / 'include'}"]
UNDEFINED = "-fsanitize=undefined"
# Reads and writes call functions of memory.cpp, instead of those of the compiler's own checker.
# The header must come before all others, whatever order the formatter puts includes in.
KERNEL_FLAGS = ["-O1", UNDEFINED, "-fno-sanitize-recover", "-fsanitize=thread", "-fno-gnu-unique"]
KERNEL_FLAGS += ["-include", "tests/simt.h"]
RUNTIME_FLAGS = ["-O2"]
LINK_FLAGS = ["-shared", UNDEFINED, "-Wl,-Bsymbolic,-z,defs"]
RUNTIME = ("simt", "memory")


class SimtError(AssertionError):
    """What a kernel does is undefined, or depends on the order of its threads."""


def _state(t: Tensor) -> Tensor:
    """All memory of a tensor from its first to its last element, as bytes."""
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    count = last + 1 if t.numel() else 0
    return t.as_strided((count,), (1,), t.storage_offset()).view(torch.uint8)


class Family:
    """The entries of one ``simt_<family>.cpp``, as methods."""

    def __init__(self, library: Path):
        self._library = ctypes.CDLL(str(library))
        self._library.simt_error.restype = ctypes.c_char_p

    def __getattr__(self, entry: str) -> Callable[..., None]:
        function = getattr(self._library, entry)
        return lambda *arguments: self._call(function, arguments)

    def _call(self, function: Any, arguments: Sequence[Any]) -> None:
        """Run an entry once per seed, each on copies of the tensors, and compare the results."""
        originals = {t.data_ptr(): _state(t) for t in arguments if isinstance(t, Tensor)}
        runs = []
        for seed in SEEDS:
            copies = {at: state.clone() for at, state in originals.items()}
            self._library.simt_begin(ctypes.c_uint64(seed))
            for number, argument in enumerate(arguments):
                if isinstance(argument, Tensor):
                    copy = copies[argument.data_ptr()]
                    name = ctypes.c_char_p(f"argument {number}".encode())
                    size = ctypes.c_size_t(copy.numel())
                    self._library.simt_memory(ctypes.c_void_p(copy.data_ptr()), size, name)
            function(*(_as_c(a, copies) for a in arguments))
            if error := self._library.simt_error().decode():
                raise SimtError(error)
            runs.append(copies)
        for at, state in originals.items():
            if any(not torch.equal(runs[0][at], run[at]) for run in runs[1:]):
                raise SimtError("order: results depend on the order of threads")
            state.copy_(runs[0][at])


def _as_c(value: Any, copies: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(copies[value.data_ptr()].data_ptr())
    if isinstance(value, torch.dtype):
        return ctypes.c_int64(DTYPES.index(value))
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, (list, tuple)):
        return (ctypes.c_int64 * len(value))(*value)
    of_type = {bool: ctypes.c_bool, int: ctypes.c_int64, float: ctypes.c_double}
    return of_type[type(value)](value)


def _run(*command: object) -> None:
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{command[-1]}: {result.stderr}")


def _key(name: str) -> str:
    """Changes whenever anything does that goes into the library."""
    sources = [*CPP.glob("include/**/*.h"), *CPP.glob("cuda/*h"), *CPP.glob("tests/*.h")]
    sources += [CPP / "tests" / f"{stem}.cpp" for stem in (f"simt_{name}", *RUNTIME)]
    digest = hashlib.sha256(
        " ".join([str(COMPILER), *FLAGS, *KERNEL_FLAGS, *RUNTIME_FLAGS]).encode()
    )
    for source in sorted(sources):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _build(name: str, folder: Path) -> Path:
    """The library of a family: compiled, unless that was done before."""
    library = folder / f"{name}-{_key(name)}.so"
    if library.exists():
        return library
    for outdated in folder.glob(f"{name}-*"):
        outdated.unlink()
    objects = []
    for stem, flags in [
        (f"simt_{name}", KERNEL_FLAGS),
        *((stem, RUNTIME_FLAGS) for stem in RUNTIME),
    ]:
        objects.append(library.with_suffix(f".{stem}.{os.getpid()}.o"))
        source = CPP / "tests" / f"{stem}.cpp"
        _run(COMPILER, *FLAGS, *flags, "-c", source, "-o", objects[-1])
    linked = library.with_suffix(f".{os.getpid()}")
    _run(
        COMPILER,
        "-shared",
        "-fsanitize=undefined",
        "-Wl,-Bsymbolic,-z,defs",
        *objects,
        "-o",
        linked,
    )
    for done in objects:
        done.unlink()
    return linked.replace(library)


_wanted: list[str] = []
_built: dict[str, Future[Path]] = {}


def family(name: str) -> Any:
    """A fixture for `Family`: compiles, at its first use, the families of all collected tests."""
    _wanted.append(name)

    @pytest.fixture(scope="module")
    def fixture(pytestconfig: pytest.Config) -> Family:
        if COMPILER is None:
            pytest.skip("needs g++")
        if torch.get_default_device().type != "cpu":
            pytest.skip("runs the CUDA source on the CPU")
        folder = Path(pytestconfig.cache.mkdir("simt"))
        if name not in _built:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                _built.update({each: pool.submit(_build, each, folder) for each in _wanted})
        return Family(_built[name].result())

    return fixture


def unwritten(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """A result for a kernel to fill: NaN, contiguous if a shape is given, else as ``like`` is."""
    dtype = dtype or like.dtype
    empty = torch.empty(shape, dtype=dtype) if shape else torch.empty_like(like, dtype=dtype)
    return empty.fill_(float("nan"))


def close(got: Tensor, expected: Tensor, scale: float = 1.0) -> None:
    """Equal up to rounding, of terms up to ``scale`` that may have been added in another order."""
    tolerance = TOLERANCE[got.dtype]
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * scale)
