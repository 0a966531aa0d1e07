from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import torchbp
import torchbp.functional as B

SETTINGS = [
    {"stride": s, "padding": p, "dilation": d, "groups": g}
    for s, p, d, g in [
        (1, 0, 1, 1), (2, 1, 1, 1), ((3, 2), (0, 2), 1, 2), ((2,), [1, 1], (2, 1), 4),
        (4, 3, 1, 1), (1, "same", 1, 2), (1, "same", (3, 2), 1), (3, "valid", 2, 1),
    ]
]  # fmt: skip
# Shapes of x and of the weight of one group.
TRANSPOSED = [
    ("conv_transpose1d", (4, 5), (4, 3, 3), {"stride": 3, "padding": 1, "output_padding": 2}),
    ("conv_transpose1d", (4, 5), (4, 2, 2), {"dilation": 3, "output_padding": 2, "groups": 2}),
    ("conv_transpose2d", (4, 4, 3), (4, 3, 1, 1), {}),
    ("conv_transpose2d", (4, 4, 3), (4, 1, 3, 2), {"stride": (2, 1), "padding": 1, "groups": 4}),
    ("conv_transpose2d", (4, 3, 4), (4, 3, 2, 3), {"stride": 2, "dilation": (3, 1),
                                                   "output_padding": (2, 1)}),
    ("conv_transpose3d", (4, 2, 3, 2), (4, 1, 2, 1, 3), {"stride": (2, 1, 2), "groups": 2}),
    ("conv1d", (4, 9), (2, 2, 3), {"stride": 2, "padding": 2, "groups": 2}),
    ("conv1d", (4, 9), (2, 4, 1), {}),
    ("conv1d", (4, 9), (2, 4, 1), {"padding": 2}),
    ("conv3d", (4, 4, 3, 5), (6, 2, 3, 2, 2), {"padding": "same", "groups": 2}),
    ("conv3d", (4, 4, 3, 5), (4, 1, 2, 2, 3), {"stride": (2, 1, 3), "padding": 1, "groups": 4}),
]  # fmt: skip


def gradients(function, tensors, **settings):
    leaves = [
        t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors
    ]
    y = function(*leaves, **settings)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    return y, torch.autograd.grad(y, leaves, weights)


@pytest.mark.parametrize("kernel", [(3, 2), (2, 3), (1, 1)])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_gradients_equal_torch(settings, kernel):
    tensors = (
        torch.randn(3, 4, 9, 8, dtype=torch.float64),
        torch.randn(4, 4 // settings["groups"], *kernel, dtype=torch.float64),
        torch.randn(4, dtype=torch.float64),
    )
    for x in (tensors[0], tensors[0][0], tensors[0].to(memory_format=torch.channels_last)):
        y, ours = gradients(B.conv2d, (x, *tensors[1:]), **settings)
        y_torch, theirs = gradients(F.conv2d, (x, *tensors[1:]), **settings)
        assert torch.equal(y, y_torch) and y.stride() == y_torch.stride()
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name, shape, weight, settings", TRANSPOSED, ids=str)
def test_gradients_of_the_others_equal_torch(name, shape, weight, settings):
    outputs = weight[1] * settings.get("groups", 1) if "transpose" in name else weight[0]
    for samples in ((), (3,), (0,)):
        tensors = [torch.randn(s, dtype=torch.float64)
                   for s in ((*samples, *shape), weight, (outputs,))]  # fmt: skip
        y, ours = gradients(getattr(B, name), tensors, **settings)
        y_torch, theirs = gradients(getattr(F, name), tensors, **settings)
        assert torch.equal(y, y_torch) and y.stride() == y_torch.stride()
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["conv1d", "conv2d", "conv_transpose2d", "conv_transpose3d"])
def test_complex_gradients_are_conjugated_as_in_torch(name):
    dims = int(name[-2])
    shapes = (2, 2, *(4, 5, 3)[:dims]), (2, 2, *(2, 3, 2)[:dims]), (2,)
    tensors = [torch.randn(*s, dtype=torch.complex128) for s in shapes]
    ours, theirs = (gradients(getattr(source, name), tensors, stride=2)[1] for source in (B, F))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("needed", range(3))
def test_one_gradient_alone(needed):
    tensors = [torch.randn(s, dtype=torch.float64) for s in ((2, 3, 5, 5), (3, 3, 2, 2), (3,))]
    for name in ("conv2d", "conv_transpose2d"):
        results = []
        for source in (B, F):
            leaves = [t.clone().requires_grad_(i == needed) for i, t in enumerate(tensors)]
            getattr(source, name)(*leaves).square().sum().backward()
            results.append(leaves[needed].grad)
        torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes_pad_with_our_op(mode):
    layer = torch.nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode=mode).double()
    ours = torchbp.convert(torch.nn.Sequential(layer))[0]
    x = torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    y = ours(x)
    parents = [type(node).__name__ for node, _ in y.grad_fn.next_functions if node]
    assert any("Pad" in name and "Backward0" not in name for name in parents), parents
    expected = F.conv2d(F.pad(x, (2, 2, 1, 1), mode=mode), layer.weight, layer.bias)
    assert torch.equal(y, expected)


def test_a_transposed_layer_gives_the_size_asked_for():
    layer = torchbp.convert(torch.nn.Sequential(torch.nn.ConvTranspose2d(2, 3, 3, stride=2)))[0]
    x = torch.randn(1, 2, 4, 4)
    assert layer(x, output_size=[9, 10]).shape == (1, 3, 9, 10)
    assert layer(x, output_size=[1, 3, 10, 9]).shape == (1, 3, 10, 9)
    with pytest.raises(ValueError, match="requested an output size"):
        layer(x, output_size=[9, 12])
    layer.padding_mode = "circular"
    with pytest.raises(ValueError, match="only zeros can be padded, got 'circular'"):
        layer(x)


@pytest.mark.parametrize(
    "settings",
    [{"stride": (1, 2, 3)}, {"stride": 0}, {"padding": -1}, {"padding": "full"}, {"groups": 3},
     {"padding": "same", "stride": 2}, {"dilation": 9}, {"output_padding": 2}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d"])
def test_the_same_errors(name, settings):
    x, weight = torch.randn(1, 4, 6, 6), torch.randn(4, 4, 3, 3)
    if name == "conv_transpose2d" and settings == {"dilation": 9}:
        settings = {"dilation": 0}  # any other is taken
    kinds = []
    for source in (F, B):
        with pytest.raises(Exception) as caught:
            getattr(source, name)(x, weight, **settings)
        kinds.append(caught.type)
    assert kinds[0] is kinds[1]


@pytest.mark.parametrize(
    ("shape", "weight", "settings"),
    [
        ((2, 3, 70), (4, 3, 64), {}),
        ((2, 1, 100), (4, 1, 64), dict(stride=30, padding=7)),
        ((2, 2, 150), (3, 2, 40), dict(dilation=3, stride=20)),
        ((2, 3, 13, 14), (4, 3, 12, 11), dict(padding=(0, 1), stride=(2, 3))),
        ((1, 2, 3), (2, 2, 64), dict(padding="same")),
        ((2, 4, 8, 8, 8), (3, 4, 7, 7, 7), dict(dilation=1)),
        ((3, 70), (4, 3, 64), {}),
    ],
)
def test_long_windows_at_few_positions(shape, weight, settings):
    """Their weight gradient is one matrix product."""
    x, w = torch.randn(shape).double().requires_grad_(), torch.randn(weight).double()
    w.requires_grad_()
    dims = len(weight) - 2
    found = []
    for home in (torchbp.functional, torch.nn.functional):
        output = getattr(home, f"conv{dims}d")(x, w, None, **settings)
        found.append(torch.autograd.grad(output, (x, w), torch.ones_like(output) * output.detach()))
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-11)
