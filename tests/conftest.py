from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator

import pytest
import torch

from torchbp import kernels


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where tensors of tests live: cpu or cuda")


def pytest_configure(config: pytest.Config) -> None:
    """Tests name no device: what they make is made on the default one, at import time too."""
    device = config.getoption("device")
    if device.startswith("cuda"):
        if missing := missing_for_cuda():
            raise pytest.UsageError(f"--device {device}: {missing}")
    torch.set_default_device(device)


def missing_for_cuda() -> str:
    """What keeps the CUDA kernels from running, or nothing."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    if not torch.cuda.is_available():
        return "no GPU: torch finds no NVIDIA driver or device"
    if not kernels.status()["cuda"]:
        return f"torchbp was built without CUDA kernels {kernels.status()['reason']}".strip()
    return ""


def pytest_report_header(config: pytest.Config) -> list[str]:
    if not config.getoption("device").startswith("cuda"):
        return []
    smi = shutil.which("nvidia-smi")
    query = [str(smi), "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.strip() if smi else ""
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    return [
        f"device: {torch.cuda.get_device_name()}, compute capability {capability}",
        f"driver: {driver or 'unknown, no nvidia-smi'}, CUDA {torch.version.cuda}",
        f"torch: {torch.__version__}, kernels built with {kernels.status()['built_with']}",
    ]


@pytest.fixture(autouse=True)
def _on_the_cpu(request: pytest.FixtureRequest) -> None:
    """Leave out, on any other device, what is about the CPU."""
    if request.node.get_closest_marker("cpu") and torch.get_default_device().type != "cpu":
        pytest.skip("about the CPU")


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """Every test starts from one seed and one thread, and leaves torch's defaults as they were."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
