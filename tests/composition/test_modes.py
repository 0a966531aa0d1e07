"""Converted models under autocast, checkpointing, hooks, parametrisation, copies and devices."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from nets import NETS, pair, step
from torch import nn
from torch.utils.checkpoint import checkpoint

import torchbp
from torchbp.nn import DROP_INS

CLOSE = dict(rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NETS)
def test_autocast(name: str, dtype: torch.dtype) -> None:
    theirs, ours, x = pair(name, torch.float32)
    found = []
    for model in (ours, theirs):

        def call(v: torch.Tensor, model: nn.Module = model) -> torch.Tensor:
            with torch.autocast("cpu", dtype):
                return model(v)

        found.append(step(model, x, call))
    tolerance = 16 * torch.finfo(dtype).eps
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_activation_checkpointing(name: str, reentrant: bool) -> None:
    theirs, ours, x = pair(name)
    found = step(ours, x, lambda v: checkpoint(ours, v, use_reentrant=reentrant))
    torch.testing.assert_close(found, step(theirs, x), **CLOSE)


@pytest.mark.parametrize("name", NETS)
def test_saved_tensor_hooks(name: str) -> None:
    theirs, ours, x = pair(name)
    packed: list[torch.Size] = []

    def pack(tensor: torch.Tensor) -> bytes:
        packed.append(tensor.shape)
        file = io.BytesIO()
        torch.save(tensor.detach(), file)
        return file.getvalue()

    def unpack(data: bytes) -> torch.Tensor:
        return torch.load(io.BytesIO(data), weights_only=True)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        output = ours(x)
    found = step(ours, x, lambda v: ours(v))
    assert packed
    torch.testing.assert_close(found, step(theirs, x), **CLOSE)
    ours.zero_grad()
    with torch.autograd.graph.save_on_cpu():
        again = step(ours, x)
    torch.testing.assert_close(again, found)
    torch.testing.assert_close(output.detach(), found[0])


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrised_weights(name: str, order: str) -> None:
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    ours = copy.deepcopy(theirs)
    parametrize = getattr(nn.utils.parametrizations, name)
    if order == "before":
        torchbp.convert(ours)
    for model in (theirs, ours):
        torch.manual_seed(1)
        parametrize(model[0])
        model.eval()
    if order == "after":
        torchbp.convert(ours)
    x = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(step(ours, x), step(theirs, x), **CLOSE)
    statuses = {row[0]: row[2] for row in torchbp.conversion_report(ours)}
    assert statuses["0"] == "torchbp"
    copied = copy.deepcopy(ours)
    torchbp.revert(ours)
    assert {row[2] for row in torchbp.conversion_report(ours) if row[0] == "0"} == {"torch"}
    assert isinstance(copied[0], torchbp.nn.Linear) and not isinstance(ours[0], torchbp.nn.Linear)
    torch.testing.assert_close(step(ours, x), step(theirs, x), **CLOSE)
    nn.utils.parametrize.remove_parametrizations(copied[0], "weight")
    assert type(copied[0]) is torchbp.nn.Linear


def test_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(torch.tanh(self.embed(ids)))

    torch.manual_seed(0)
    theirs = Tied().double()
    ours = torchbp.convert(copy.deepcopy(theirs))
    assert ours.head.weight is ours.embed.weight
    ids = torch.tensor([[1, 2, 2], [6, 0, 1]])
    for model in (theirs, ours):
        model(ids).square().sum().backward()
    torch.testing.assert_close(ours.embed.weight.grad, theirs.embed.weight.grad, **CLOSE)


@pytest.mark.parametrize("name", NETS)
def test_copies_and_pickles(name: str) -> None:
    _, ours, x = pair(name)
    expected = step(ours, x)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(file, weights_only=False),
    ):
        assert [type(m) for m in twin.modules()] == [type(m) for m in ours.modules()]
        torch.testing.assert_close(step(twin, x), expected)


@pytest.mark.parametrize("name", NETS)
def test_state_goes_both_ways(name: str) -> None:
    theirs, ours, x = pair(name)
    other = NETS[name]()[0].double().eval()
    other.load_state_dict(ours.state_dict())
    torch.testing.assert_close(step(other, x), step(theirs, x))


@pytest.mark.parametrize("name", NETS)
def test_meta_device(name: str) -> None:
    _, ours, x = pair(name)
    ours.to("meta")
    output = ours(x.to("meta").requires_grad_())
    assert output.device.type == "meta"
    output.sum().backward()
    assert all(p.grad.shape == p.shape for p in ours.parameters())
    ours.to_empty(device="cpu")
    assert ours(x).shape == output.shape


def test_built_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = torchbp.convert(nn.Sequential(nn.Linear(3, 4), nn.ReLU()))
    assert model(torch.empty(2, 3, device="meta")).shape == (2, 4)


def test_channels_last() -> None:
    theirs, ours, x = pair("cnn", torch.float32)
    for training in (False, True):
        found = []
        for model in (ours, theirs):
            model.train(training).to(memory_format=torch.channels_last)
            given = x.contiguous(memory_format=torch.channels_last)
            found.append(step(model, given))
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    stem = x.contiguous(memory_format=torch.channels_last)
    assert ours.stem(stem).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", NETS)
def test_deterministic_mode(name: str) -> None:
    theirs, ours, x = pair(name)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = step(ours, x), step(ours, x)
        torch.testing.assert_close(first, step(theirs, x), **CLOSE)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_hooks_of_the_user_run() -> None:
    _, ours, x = pair("mlp")
    seen: list[str] = []
    layer = ours[0]
    layer.register_forward_pre_hook(lambda *a: seen.append("before"))
    layer.register_forward_hook(lambda *a: seen.append("after"))
    layer.register_full_backward_hook(lambda *a: seen.append("backward"))
    layer.weight.register_hook(lambda grad: seen.append("weight"))
    step(ours, x)
    assert sorted(seen) == ["after", "backward", "before", "weight"]
    torchbp.revert(ours)
    assert type(layer) is nn.Linear
    seen.clear()
    step(ours, x)
    assert sorted(seen) == ["after", "backward", "before", "weight"]


@pytest.mark.parametrize("kind", DROP_INS)
def test_no_drop_in_adds_state(kind: type[nn.Module]) -> None:
    """Swapping classes is enough: no attribute of ours, no slot, no new constructor."""
    ours = DROP_INS[kind]
    assert "__init__" not in vars(ours) and "__slots__" not in vars(ours)
    assert ours.__bases__[0] is kind


def test_gradients_accumulate() -> None:
    theirs, ours, x = pair("mlp")
    for model in (theirs, ours):
        for part in x.split(1):
            model(part).square().sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, **CLOSE)
