"""Compile every CUDA kernel for every architecture; report registers, shared memory and spills.

Usage: python cpp/tests/nvcc_report.py [--output docs/cuda_report.md]

It needs nvcc and a torch whose headers know of CUDA, but no GPU. It fails where a kernel spills.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class Usage:
    """What ptxas says of one instantiation of a kernel."""

    source: str
    kernel: str
    architecture: int
    registers: int
    shared: int
    stack: int
    spills: int


def toolkit() -> tuple[str, list[str]]:
    """nvcc and the flags of setup.py, or an exit with what is missing."""
    os.environ["TORCHBP_CUDA"] = "1"
    sys.path.insert(0, str(ROOT))
    os.chdir(ROOT)
    import setup

    arguments = setup.extension()
    if not arguments:
        raise SystemExit("no CUDA report: the extension cannot be built here, see above")
    (extension,) = arguments["ext_modules"]
    from torch.utils import cpp_extension

    include = [f"-I{folder}" for folder in extension.include_dirs]
    flags = [*extension.extra_compile_args["nvcc"], *include]
    return f"{cpp_extension.CUDA_HOME}/bin/nvcc", flags


def compile_one(nvcc: str, flags: list[str], source: Path) -> str:
    """The report of ptxas on all architectures of one source."""
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, *flags, *targets, "-Xptxas=-v", "-c", source, "-o", f"{folder}/a.o"]
        run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        raise SystemExit(f"{source.name}: {run.stderr}")
    return run.stdout + run.stderr


def parse(source: str, report: str) -> Iterator[Usage]:
    """One entry after the other: its name, then its stack frame, then its registers."""
    kernel, architecture, stack, spills = "", 0, 0, 0
    for line in report.splitlines():
        if entry := ENTRY.search(line):
            kernel, architecture = entry[1], int(entry[2])
        elif frame := FRAME.search(line):
            stack, spills = int(frame[1]), int(frame[2]) + int(frame[3])
        elif (used := USED.search(line)) and kernel:
            shared = SHARED.search(line)
            size = int(shared[1]) if shared else 0
            yield Usage(source, kernel, architecture, int(used[1]), size, stack, spills)
            kernel = ""


def template_of(mangled: str) -> str:
    """``_ZN7torchbp14forward_kernelI...`` is forward_kernel."""
    at = re.match(r"_ZN7torchbp(\d+)", mangled)
    if at is None:
        return mangled
    return mangled[at.end() : at.end() + int(at[1])]


def table(usages: list[Usage]) -> Iterator[str]:
    """A row per kernel: the most that any instantiation takes."""
    heads = " | ".join(f"sm_{a}" for a in ARCHITECTURES)
    yield f"| source | kernel | instantiations | shared bytes | {heads} | spilled bytes |"
    yield "|---|---|" + "---:|" * (len(ARCHITECTURES) + 3)
    for source, kernel in dict.fromkeys((u.source, template_of(u.kernel)) for u in usages):
        of = [u for u in usages if u.source == source and template_of(u.kernel) == kernel]
        most = [max(u.registers for u in of if u.architecture == a) for a in ARCHITECTURES]
        count = len({u.kernel for u in of})
        shared, spilled = max(u.shared for u in of), max(u.spills for u in of)
        registers = " | ".join(map(str, most))
        yield f"| {source} | `{kernel}` | {count} | {shared} | {registers} | {spilled} |"


def main() -> None:
    """Write the report, and fail where anything spills."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "cuda_report.md")
    output = parser.parse_args().output.resolve()
    nvcc, flags = toolkit()
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release [\d.]+, V([\d.]+)", version)
    sources = sorted(ROOT.glob("cpp/cuda/*.cu"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reports = list(pool.map(lambda source: compile_one(nvcc, flags, source), sources))
    usages = [u for s, r in zip(sources, reports, strict=True) for u in parse(s.name, r)]
    seen = {(u.source, u.architecture) for u in usages}
    missing = {(s.name, a) for s in sources for a in ARCHITECTURES} - seen
    if missing:
        raise SystemExit(f"ptxas reported nothing on {sorted(missing)}")
    output.write_text(
        "# CUDA kernels as compiled\n\n"
        "Written by `make cuda-report`; compiled, not run. Registers per thread of the "
        "instantiation that takes most of them, and its static shared memory, by "
        f"`nvcc -Xptxas -v` {release[1] if release else ''} with the flags of `setup.py`.\n\n"
        + "\n".join(table(usages))
        + "\n"
    )
    bad = [u for u in usages if u.spills or u.stack]
    for u in bad:
        print(f"{u.source} sm_{u.architecture} {u.kernel}: {u.spills} bytes spilled, "
              f"{u.stack} bytes of stack")  # fmt: skip
    print(f"{len(usages)} kernels compiled for {len(ARCHITECTURES)} architectures: {output}")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
