"""Models whose per-sample gradients are hard to get right, and the definition they must meet."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, rnn
from torch.utils.checkpoint import checkpoint

N = 5


def losses(output, targets):
    return F.cross_entropy(output, targets, reduction="none")


def definition(model, inputs, targets):
    """Every sample's loss differentiated by itself, on the model as it is."""
    leaves = {n: p.detach().requires_grad_() for n, p in model.named_parameters()}
    each = losses(functional_call(model, leaves, (inputs,)), targets)
    each = each.flatten(1).sum(1) if each.dim() > 1 else each
    rows = [
        torch.autograd.grad(
            one, [*leaves.values()], retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for one in each
    ]
    return each.detach(), {n: torch.stack([r[i] for r in rows]) for i, n in enumerate(leaves)}


class Mean(nn.Module):
    """Layers, then the mean over positions; ``channels``: the dimension of the classes."""

    def __init__(self, *layers, channels=-1):
        super().__init__()
        self.layers, self.channels = nn.Sequential(*layers), channels

    def forward(self, x):
        x = self.layers(x).movedim(self.channels, -1)
        return x.flatten(1, -2).mean(1) if x.dim() > 2 else x


class Tokens(nn.Module):
    """Token and position embeddings; tied to the decoder, with a loss for every token."""

    def __init__(self, tied=False, **settings):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(7, 6, **settings), nn.Embedding(9, 6)
        self.scale = nn.Parameter(torch.tensor(1.3))
        self.head = nn.Linear(6, 7 if tied else 3)
        if tied:
            self.head.weight = self.tokens.weight
        self.tied, self.unused = tied, nn.Linear(2, 2)

    def forward(self, ids):
        x = self.tokens(ids) * self.scale + self.positions(torch.arange(ids.shape[1]))
        # A sine, so that the errors of one token differ in sign from position to position.
        x = self.head(torch.sin(3 * x))
        return x.transpose(1, 2) if self.tied else x.mean(1)


class Codes(nn.Module):
    """A learned code for every place in the batch, and a look-up by function."""

    def __init__(self):
        super().__init__()
        self.codes, self.table = nn.Parameter(torch.randn(8, 1, 6)), nn.Parameter(torch.randn(7, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, ids):
        x = F.embedding(ids, self.table, padding_idx=-2) + self.codes[: len(ids)]
        return self.head(torch.sin(3 * x)).mean(1)


class Shared(nn.Module):
    """One weight, used by two calls of one module and by another module."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.other = nn.Linear(4, 4, bias=False)
        self.other.weight = self.inner.weight

    def forward(self, x):
        return self.head(self.other(torch.tanh(self.inner(torch.tanh(self.inner(x))))))


class Attention(nn.Module):
    def __init__(self, cross=False, **settings):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, **settings)
        self.embed, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.cross, self.batch_first = cross, settings.get("batch_first", False)

    def forward(self, x):
        x = self.embed(x)
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.attention(x, x * 2 if self.cross else x, x)[0]
        return self.head(x if self.batch_first else x.transpose(0, 1)).mean(1)


class Encoder(nn.Module):
    """A transformer encoder behind a learned class token."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(4, 3)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return self.head(self.encoder(x)[:, 0])


class Recurrent(nn.Module):
    def __init__(self, kind, packed=False, **settings):
        super().__init__()
        self.layer, self.packed = kind(4, 5, **settings), packed
        self.head = nn.Linear(10 if settings.get("bidirectional") else 5, 3)
        self.batch_first = settings.get("batch_first", False)

    def forward(self, x):
        if self.packed:
            lengths = [3, 4, 2, 1, 4][: len(x)]
            x = rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            return self.head(self.layer(x)[1][0][-1])
        states = self.layer(x if self.batch_first else x.transpose(0, 1))[0]
        return self.head(states.mean(1 if self.batch_first else 0))


class Cell(nn.Module):
    """An LSTM cell from a learned initial state."""

    def __init__(self):
        super().__init__()
        self.cell, self.start = nn.LSTMCell(4, 5), nn.Parameter(torch.randn(5))
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        h, c = self.start.expand(len(x), 5), x.new_zeros(len(x), 5)
        for t in range(x.shape[1]):
            h, c = self.cell(x[:, t], (h, c))
        return self.head(h)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(checkpoint(self.block, x, use_reentrant=False))


class Flattened(nn.Module):
    """Tokens of all samples as rows of one matrix, samples outside or inside of positions."""

    def __init__(self, inner):
        super().__init__()
        self.first, self.inner = nn.Linear(4, 6), inner
        self.weight, self.bias = nn.Parameter(torch.randn(6, 3)), nn.Parameter(torch.randn(3))

    def forward(self, x):
        n, t, _ = x.shape
        rows = x.transpose(0, 1).reshape(t * n, -1) if self.inner else x.reshape(n * t, -1)
        out = torch.addmm(self.bias, torch.tanh(self.first(rows)), self.weight)
        return (out.view(t, n, 3).transpose(0, 1) if self.inner else out.view(n, t, 3)).mean(1)


class Product(torch.autograd.Function):
    """What no tape can see."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w, (g * x).sum(0)


class Odd(nn.Module):
    """Functions without a closed form, in-place sums, and a Function of the user's."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 6), nn.Bilinear(6, 6, 3)
        self.matrix = nn.Parameter(torch.randn(6, 6))
        self.scale, self.gate = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))

    def forward(self, x):
        x = self.first(x) - self.gate
        x = x + torch.einsum("nti,ij->ntj", x, self.matrix)
        x += self.scale
        x = torch.where(x > 0, x * self.scale.type_as(x), self.scale)
        x = Product.apply(x, self.gate).mean(1)
        return self.head(x, x.tanh())


def ids(n):
    return torch.randint(7, (n, 6))


def normal(*shape):
    return lambda n: torch.randn(n, *shape)


def classes(n):
    return torch.randint(3, (n,))


def conv1d():
    return Mean(
        nn.Conv1d(4, 6, 3, padding="same", dilation=2), nn.PReLU(6),
        nn.Conv1d(6, 3, 2, padding=1, padding_mode="circular"), channels=1,
    )  # fmt: skip


def conv2d():
    return Mean(
        nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2), nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, dilation=2, padding=2, groups=8), nn.BatchNorm2d(8), nn.GELU(),
        nn.GroupNorm(2, 8), nn.Conv2d(8, 3, 1), channels=1,
    )  # fmt: skip


def conv3d():
    return Mean(
        nn.Conv3d(2, 4, (2, 3, 1), stride=(1, 2, 1)), nn.PReLU(),
        nn.ConvTranspose3d(4, 6, 2, stride=2, groups=2, output_padding=1, dilation=2),
        nn.InstanceNorm3d(6, affine=True), nn.Tanh(), nn.Conv3d(6, 3, 1), channels=1,
    )  # fmt: skip


def reparametrised():
    return nn.Sequential(
        parametrizations.weight_norm(nn.Linear(4, 6)), nn.Tanh(),
        parametrizations.spectral_norm(nn.Linear(6, 3)),
    )  # fmt: skip


def linear():
    return Mean(nn.Linear(5, 6), nn.GELU(), nn.LayerNorm(6), nn.RMSNorm(6), nn.Linear(6, 3))


#: By name: the model, its inputs and its targets, each for n samples.
CASES = {
    "linear 2-D": (linear, normal(5), classes),
    "linear 3-D, positions = samples = features": (linear, normal(N, N), classes),
    "linear 4-D": (linear, normal(2, 3, 5), classes),
    "linear, many positions": (linear, normal(40, 5), classes),
    "conv 1d": (conv1d, normal(4, 9), classes),
    "conv 2d, grouped, dilated, strided": (conv2d, normal(4, 9, 7), classes),
    "conv 3d and transposed": (conv3d, normal(2, 3, 5, 4), classes),
    "embedding with padding": (lambda: Tokens(padding_idx=2), ids, classes),
    "embedding by frequency": (lambda: Tokens(padding_idx=-1, scale_grad_by_freq=True), ids,
                               classes),
    "codes for places in the batch": (Codes, ids, classes),
    "tied": (lambda: Tokens(tied=True), ids, ids),
    "tied with padding": (lambda: Tokens(tied=True, padding_idx=1), ids, ids),
    "shared by calls and modules": (Shared, normal(4), classes),
    "attention, batch second": (Attention, normal(N, 4), classes),
    "attention, batch first": (lambda: Attention(batch_first=True), normal(N, 4), classes),
    "attention, separate inputs": (lambda: Attention(cross=True), normal(3, 4), classes),
    "attention, bias_kv": (lambda: Attention(add_bias_kv=True, add_zero_attn=True), normal(3, 4),
                           classes),
    "encoder": (Encoder, normal(3, 4), classes),
    "LSTM": (lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True, batch_first=True),
             normal(N, 4), classes),
    "LSTM, batch second": (lambda: Recurrent(nn.LSTM), normal(N, 4), classes),
    "LSTM, packed": (lambda: Recurrent(nn.LSTM, packed=True, batch_first=True), normal(4, 4),
                     classes),
    "GRU": (lambda: Recurrent(nn.GRU, batch_first=True), normal(3, 4), classes),
    "RNN": (lambda: Recurrent(nn.RNN, num_layers=2), normal(3, 4), classes),
    "LSTM cell": (Cell, normal(3, 4), classes),
    "checkpointing": (Checkpointed, normal(4), classes),
    "flattened, samples outside": (lambda: Flattened(False), normal(N, 4), classes),
    "flattened, samples inside": (lambda: Flattened(True), normal(N, 4), classes),
    "reparametrised": (reparametrised, normal(4), classes),
    "odd functions": (Odd, normal(3, 4), classes),
}  # fmt: skip


def case(name, n=N, seed=0):
    """The model in evaluation mode with ``n`` samples, in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        make, inputs, targets = CASES[name]
        model, x, y = make().double().eval(), inputs(n), targets(n)
    return model, x.double() if x.is_floating_point() else x, y
