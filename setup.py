"""Builds the compiled kernels; the metadata stands in pyproject.toml.

The extension is optional: where it cannot be built, installing goes on without it.

Environment:
    TORCHBP_NO_EXT=1         do not build it
    TORCHBP_CUDA=0|1|auto    leave out, demand, or (default) add the CUDA kernels where possible
    TORCHBP_SANITIZE=...     compile with -fsanitize=...; address,undefined and thread are tested,
                             see `make test-sanitizers`; CUDA kernels are left out
    TORCHBP_WERROR=1         warnings are errors, and a failed build fails the installation
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = "0x020d000000000000"  # 2.13
OLDEST_PYTHON = "0x030A0000"  # 3.10
CUDA_ARCHITECTURES = "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"
STRICT = os.environ.get("TORCHBP_WERROR") == "1"
SANITIZE = os.environ.get("TORCHBP_SANITIZE", "")
MUST_BUILD = STRICT or bool(SANITIZE) or os.environ.get("TORCHBP_CUDA") == "1"


def without(reason: object) -> dict:
    """Say once why there is no extension; nothing is passed to setup()."""
    print(f"torchbp: no compiled kernels ({reason}); the PyTorch reference kernels will serve.")
    return {}


def cuda_toolkit(torch_cuda: str | None, home: str | None) -> tuple[Path, Path] | None:
    """The include and library folders of the CUDA toolkit, or None to compile without.

    A GPU is not needed to compile. Where nvcc is a wrapper, ``home`` is the folder of the wrapper,
    and the toolkit is the folder ``cuda`` in it.
    """
    wanted = os.environ.get("TORCHBP_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        raise SystemExit(f"TORCHBP_CUDA: expected 0, 1 or auto, got {wanted!r}")
    if wanted == "0" or SANITIZE:
        missing = "TORCHBP_SANITIZE is set" if SANITIZE else "TORCHBP_CUDA=0"
    elif torch_cuda is None:
        missing = "this torch has no CUDA"
    elif home is None or shutil.which(f"{home}/bin/nvcc") is None:
        missing = "no nvcc"
    else:
        for top in (Path(home), Path(home, "cuda")):
            for lib in (top / "lib64", top / "lib"):
                if (lib / "libcudart_static.a").exists():
                    return top / "include", lib
        missing = f"no libcudart_static.a under {home}"
    if wanted == "1":
        raise SystemExit(f"TORCHBP_CUDA=1, but {missing}")
    print(f"torchbp: CUDA kernels left out ({missing}).")
    return None


def sanitize(ext: Extension) -> None:
    """Let the program stop at its first error, and tell the line; optimised as it is otherwise."""
    flags = [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all"]
    ext.extra_compile_args["cxx"] += [*flags, "-g1", "-fno-omit-frame-pointer"]
    ext.extra_link_args = flags
    if "thread" in SANITIZE:  # torch's threads are not instrumented, these are
        ext.sources.append("cpp/tests/parallel_for.cpp")
        ext.extra_link_args.append("-Wl,-Bsymbolic")


def extension() -> dict:
    """The arguments of setup() that build torchbp._C, or none where it cannot be built."""
    if os.environ.get("TORCHBP_NO_EXT") == "1":
        return without("TORCHBP_NO_EXT=1")
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        return without(error)
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13):
        return without(f"torch {torch.__version__} is older than 2.13")

    toolkit = cuda_toolkit(torch.version.cuda, cpp_extension.CUDA_HOME)
    sources = [*ROOT.glob("cpp/*.cpp"), *ROOT.glob("cpp/cpu/*.cpp")]
    common = [
        "-O3",
        "-std=c++20",
        f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}",
        f"-DPy_LIMITED_API={OLDEST_PYTHON}",
        f"-DTORCHBP_BUILT_WITH={torch.__version__.split('+')[0]}",
    ]
    # None of these changes a result: they only promise that nobody reads errno or the FP flags.
    host = ["-g0", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-fvisibility=hidden"]
    host += [f"-ffile-prefix-map={ROOT}/="]  # error messages name files as the repository does
    host += ["-ffp-contract=fast", "-Wall", "-Wextra", *(["-Werror"] if STRICT else [])]
    device = ["--expt-relaxed-constexpr", "-Xcompiler=-fvisibility=hidden"]
    options: dict = {"libraries": [], "library_dirs": []}
    system = []
    if toolkit:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
        sources += ROOT.glob("cpp/cuda/*.cu")
        common.append("-DTORCHBP_WITH_CUDA")
        system.append(str(toolkit[0]))
        options["library_dirs"] = [str(toolkit[1])]
        options["libraries"] = ["cudart_static", "rt", "dl", "pthread"]

    # A CppExtension even with .cu files: it links neither libtorch_cuda nor libcudart.so, so that
    # one .so loads in a torch without CUDA too.
    ext = cpp_extension.CppExtension(
        "torchbp._C",
        sorted(str(source.relative_to(ROOT)) for source in sources),
        py_limited_api=True,
        **options,
    )
    # torch's headers are not ours to warn about.
    system += ext.include_dirs
    ext.include_dirs = [str(ROOT / "cpp"), str(ROOT / "cpp" / "include")]
    quiet = [flag for directory in system for flag in ("-isystem", directory)]
    ext.extra_compile_args = {"cxx": common + host + quiet, "nvcc": common + device + quiet}
    if SANITIZE:
        sanitize(ext)
    elif sys.platform.startswith("linux"):
        ext.extra_link_args = ["-Wl,--exclude-libs,ALL", "-Wl,-s"]

    class OptionalBuild(cpp_extension.BuildExtension):
        """Goes on without the extension where it cannot be compiled."""

        def run(self) -> None:
            try:
                super().run()
            except (Exception, SystemExit) as error:
                if MUST_BUILD:
                    raise
                without(f"the build failed: {error}".strip().splitlines()[-1])
                self.extensions = self.distribution.ext_modules = []

    return {
        "ext_modules": [ext],
        "cmdclass": {"build_ext": OptionalBuild},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


if __name__ == "__main__":
    setup(**extension())
