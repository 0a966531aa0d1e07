"""Networks that the composition tests convert, with an input for each."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

import torchbp


class Residual(nn.Module):
    """A user's own forward around layers with drop-ins."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.SiLU())
        self.pool, self.head = nn.AvgPool2d(2), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        return self.head(self.pool(x + self.body(x)).flatten(1))


def mlp() -> tuple[nn.Module, Tensor]:
    layers = [nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Dropout(0.0), nn.Linear(8, 3)]
    return nn.Sequential(*layers), torch.randn(4, 6)


def cnn() -> tuple[nn.Module, Tensor]:
    return Residual(), torch.randn(4, 2, 4, 4)


def encoder() -> tuple[nn.Module, Tensor]:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    body = nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 3))
    return body, torch.randn(4, 3, 8)


NETS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "mlp": mlp,
    "cnn": cnn,
    "encoder": encoder,
}


def pair(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module, Tensor]:
    """A network of torch's, the same converted, and an input; in evaluation mode."""
    torch.manual_seed(0)
    theirs, x = NETS[name]()
    theirs.to(dtype).eval()
    return theirs, torchbp.convert(copy.deepcopy(theirs)), x.to(dtype)


def step(model: nn.Module, x: Tensor, call: Callable[..., Tensor] | None = None) -> list[Tensor]:
    """Output, input gradient and parameter gradients."""
    model.zero_grad(set_to_none=True)
    x = x.detach().clone().requires_grad_()
    output = (model if call is None else call)(x)
    weights = torch.linspace(-1, 2, output.numel(), dtype=torch.float64).view(output.shape)
    (output * weights.to(output)).sum().backward()
    return [output.detach(), x.grad, *(p.grad for p in model.parameters())]
