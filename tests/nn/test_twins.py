"""Every drop-in against its torch.nn twin: outputs bit for bit, gradients, state and errors."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchbp.nn import DROP_INS, Add

Make = Callable[[type[nn.Module]], nn.Module]


def image(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


CASES: dict[type[nn.Module], list[tuple[Make, Callable[[], tuple]]]] = {
    nn.Linear: [(lambda c: c(5, 3), lambda: (image(4, 5),)),
                (lambda c: c(5, 3, bias=False), lambda: (image(2, 4, 5),))],
    nn.Conv2d: [(lambda c: c(4, 6, 3, stride=2, padding=1, groups=2), lambda: (image(2, 4, 7, 6),)),
                (lambda c: c(2, 3, 2, padding="same", dilation=3), lambda: (image(2, 2, 7, 6),)),
                (lambda c: c(2, 3, 3, padding=1, padding_mode="reflect"),
                 lambda: (image(2, 2, 5, 5),)),
                (lambda c: c(2, 3, 3, padding="same", padding_mode="circular", bias=False),
                 lambda: (image(2, 5, 5),)),
                (lambda c: c(2, 3, 3).to(memory_format=torch.channels_last),
                 lambda: (image(2, 2, 5, 5).to(memory_format=torch.channels_last),))],
    nn.ReLU: [(lambda c: c(), lambda: (image(3, 4),)),
              (lambda c: c(inplace=True), lambda: (image(3, 4),))],
    nn.LeakyReLU: [(lambda c: c(0.3), lambda: (image(3, 4),)),
                   (lambda c: c(0.3, inplace=True), lambda: (image(3, 4),))],
    nn.GELU: [(lambda c: c(), lambda: (image(3, 4),)),
              (lambda c: c(approximate="tanh"), lambda: (image(3, 4),))],
    nn.SiLU: [(lambda c: c(), lambda: (image(3, 4),)),
              (lambda c: c(inplace=True), lambda: (image(3, 4),))],
    nn.Tanh: [(lambda c: c(), lambda: (image(3, 4),))],
    nn.Sigmoid: [(lambda c: c(), lambda: (image(3, 4),))],
    nn.Softplus: [(lambda c: c(2.0, 1.0), lambda: (image(3, 4),))],
    nn.MaxPool2d: [(lambda c: c(3, 2, 1, ceil_mode=True), lambda: (image(2, 2, 6, 7),)),
                   (lambda c: c(2, return_indices=True), lambda: (image(2, 4, 4),))],
    nn.AvgPool2d: [(lambda c: c(3, 2, 1, ceil_mode=True), lambda: (image(2, 2, 6, 7),)),
                   (lambda c: c(2, count_include_pad=False, padding=1), lambda: (image(2, 4, 4),)),
                   (lambda c: c((2, 3), divisor_override=5), lambda: (image(2, 2, 6, 7),))],
    nn.AdaptiveAvgPool2d: [(lambda c: c(1), lambda: (image(2, 2, 6, 7),)),
                           (lambda c: c((4, None)), lambda: (image(2, 2, 6, 7),))],
    nn.Flatten: [(lambda c: c(), lambda: (image(2, 3, 4),)),
                 (lambda c: c(0, 1), lambda: (image(2, 3, 4),))],
    nn.Dropout: [(lambda c: c(0.4), lambda: (image(30, 4),)),
                 (lambda c: c(0.4, inplace=True), lambda: (image(30, 4),)),
                 (lambda c: c(1.0), lambda: (image(3, 4),))],
    nn.BatchNorm1d: [(lambda c: c(3), lambda: (image(5, 3),)),
                     (lambda c: c(3, momentum=None), lambda: (image(5, 3, 2),)),
                     (lambda c: c(3, affine=False, track_running_stats=False),
                      lambda: (image(5, 3),)),
                     (lambda c: c(3), lambda: (image(0, 3),))],
    nn.BatchNorm2d: [(lambda c: c(3, eps=1e-2, momentum=0.3), lambda: (image(4, 3, 2, 2),))],
    nn.LayerNorm: [(lambda c: c(4), lambda: (image(3, 4),)),
                   (lambda c: c((3, 4), elementwise_affine=False), lambda: (image(2, 3, 4),)),
                   (lambda c: c(4, bias=False), lambda: (image(2, 3, 4),))],
    nn.Softmax: [(lambda c: c(1), lambda: (image(3, 4),))],
    nn.LogSoftmax: [(lambda c: c(0), lambda: (image(3, 4),))],
    nn.CrossEntropyLoss: [
        (lambda c: c(), lambda: (image(5, 4), torch.randint(4, (5,)))),
        (lambda c: c(weight=torch.rand(4), ignore_index=1, reduction="sum", label_smoothing=0.1),
         lambda: (image(5, 4), torch.randint(4, (5,)))),
        (lambda c: c(reduction="none"), lambda: (image(5, 4, 2), image(5, 4, 2).softmax(1)))],
    nn.MSELoss: [(lambda c: c(), lambda: (image(3, 4), image(3, 4)))],
    nn.BCEWithLogitsLoss: [
        (lambda c: c(), lambda: (image(3, 4), image(3, 4).sigmoid())),
        (lambda c: c(weight=torch.rand(4), pos_weight=torch.rand(4), reduction="none"),
         lambda: (image(3, 4), image(3, 4).sigmoid()))],
    nn.Identity: [(lambda c: c(), lambda: (image(3, 4),))],
    nn.Hardsigmoid: [(lambda c: c(), lambda: (image(3, 4) * 3,)),
                     (lambda c: c(inplace=True), lambda: (image(3, 4) * 3,))],
    nn.RReLU: [(lambda c: c(0.1, 0.4), lambda: (image(3, 4),)),
               (lambda c: c(0.1, 0.4, inplace=True), lambda: (image(3, 4),))],
    nn.Dropout1d: [(lambda c: c(0.4), lambda: (image(5, 4, 3),))],
    nn.Dropout2d: [(lambda c: c(0.4), lambda: (image(5, 4, 3, 2),))],
    nn.Dropout3d: [(lambda c: c(0.4), lambda: (image(5, 4, 3, 2, 2),))],
    nn.AlphaDropout: [(lambda c: c(0.4), lambda: (image(30, 4),))],
    nn.FeatureAlphaDropout: [(lambda c: c(0.4), lambda: (image(5, 4, 3, 2),))],
    nn.ChannelShuffle: [(lambda c: c(2), lambda: (image(2, 4, 3, 2),))],
    nn.PixelShuffle: [(lambda c: c(2), lambda: (image(2, 8, 3, 2),))],
    nn.PixelUnshuffle: [(lambda c: c(2), lambda: (image(2, 2, 4, 6),))],
    nn.Unflatten: [(lambda c: c(1, (2, 3)), lambda: (image(4, 6),))],
    nn.Fold: [(lambda c: c((4, 5), (2, 3), stride=(2, 1)), lambda: (image(2, 12, 6),))],
    nn.Unfold: [(lambda c: c((2, 3), padding=1, dilation=2), lambda: (image(2, 3, 5, 6),))],
    nn.Upsample: [(lambda c: c(scale_factor=2), lambda: (image(2, 3, 4, 3),)),
                  (lambda c: c(scale_factor=1.5, mode="bilinear"), lambda: (image(2, 3, 4, 3),)),
                  (lambda c: c(size=7, mode="linear", align_corners=True),
                   lambda: (image(2, 3, 4),)),
                  (lambda c: c(scale_factor=2, mode="bicubic"), lambda: (image(1, 2, 4, 3),)),
                  (lambda c: c(scale_factor=2, mode="trilinear"), lambda: (image(1, 2, 3, 2, 2),))],
    nn.UpsamplingNearest2d: [(lambda c: c(scale_factor=2), lambda: (image(2, 3, 4, 3),))],
    nn.UpsamplingBilinear2d: [(lambda c: c(size=(5, 7)), lambda: (image(2, 3, 4, 3),))],
    nn.MaxUnpool1d: [(lambda c: c(2), lambda: F.max_pool1d(image(2, 3, 6), 2, None, 0, 1, False,
                                                           True))],
    nn.MaxUnpool2d: [(lambda c: c(2), lambda: F.max_pool2d(image(2, 3, 6, 4), 2, None, 0, 1, False,
                                                           True))],
    nn.MaxUnpool3d: [(lambda c: c(2), lambda: F.max_pool3d(image(1, 2, 4, 4, 2), 2, None, 0, 1,
                                                           False, True))],
    nn.EmbeddingBag: [(lambda c: c(7, 3, padding_idx=2), lambda: (torch.randint(7, (4, 5)),)),
                      (lambda c: c(7, 3, mode="max"), lambda: (torch.randint(7, (4, 5)),)),
                      (lambda c: c(7, 3, mode="sum", max_norm=1.0),
                       lambda: (torch.randint(7, (9,)), torch.tensor([0, 4, 4])))],
    nn.CosineSimilarity: [(lambda c: c(), lambda: (image(3, 4), image(3, 4)))],
    nn.PairwiseDistance: [(lambda c: c(3.0), lambda: (image(3, 4), image(3, 4)))],
    nn.TripletMarginLoss: [(lambda c: c(swap=True),
                            lambda: (image(5, 4), image(5, 4), image(5, 4)))],
    nn.TripletMarginWithDistanceLoss: [(lambda c: c(margin=0.5),
                                        lambda: (image(5, 4), image(5, 4), image(5, 4)))],
    nn.NLLLoss2d: [(lambda c: c(), lambda: (image(2, 4, 3, 3), torch.randint(4, (2, 3, 3))))],
    nn.AdaptiveLogSoftmaxWithLoss: [(lambda c: c(6, 9, [3, 6]),
                                     lambda: (image(5, 6), torch.randint(9, (5,))))],
    nn.modules.linear.NonDynamicallyQuantizableLinear: [(lambda c: c(5, 3),
                                                         lambda: (image(4, 5),))],
    nn.TransformerDecoder: [
        (lambda c: c(nn.TransformerDecoderLayer(8, 2, 12, dropout=0.3, batch_first=True), 2),
         lambda: (image(2, 3, 8), image(2, 4, 8)))],
}  # fmt: skip

PAIRS = [
    pytest.param(twin, make, inputs, id=f"{twin.__name__}-{i}")
    for twin, cases in CASES.items()
    for i, (make, inputs) in enumerate(cases)
]


def test_every_drop_in_is_covered():
    """Here, or by PyTorch's own inputs in test_module_db.py."""
    module_db = pytest.importorskip("torch.testing._internal.common_modules").module_db
    elsewhere = {info.module_cls for info in module_db}
    # Needs a process group in training; in evaluation it is batch norm.
    assert {*DROP_INS} - {*CASES} - elsewhere == {nn.SyncBatchNorm}


def run(module: nn.Module, inputs: tuple, steps: int = 2) -> list[torch.Tensor]:
    """Outputs, gradients, state and random state after a few forward and backward passes."""
    torch.manual_seed(5)
    seen = []
    for _ in range(steps):
        given = [t.detach().clone() for t in inputs]
        if given[0].is_floating_point():
            given[0].requires_grad_()
        # In-place modules may not write into a leaf.
        output = module(given[0] * 1, *given[1:])
        values = [*output] if isinstance(output, tuple) else [output]
        weights = torch.linspace(-1, 2, values[0].numel()).view_as(values[0]).to(values[0])
        (values[0] * weights).sum().backward()
        grads = [given[0].grad, *(p.grad for p in module.parameters())]
        seen += values + [torch.zeros(()) if g is None else g for g in grads]
    return [*seen, *module.state_dict().values(), torch.get_rng_state()]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("twin", "make", "inputs"), PAIRS)
def test_drop_in_equals_twin(twin, make, inputs, dtype, training):
    theirs = make(twin).to(dtype).train(training)
    ours = copy.deepcopy(theirs)
    ours.__class__ = DROP_INS[twin]
    given = tuple(t.to(dtype) if t.is_floating_point() else t for t in inputs())
    tolerance = (
        dict(rtol=1e-12, atol=1e-13) if dtype == torch.float64 else dict(rtol=2e-5, atol=1e-6)
    )
    if twin is nn.Hardsigmoid:  # torch's own float64 backward multiplies by a sixth in float32
        tolerance = dict(rtol=1e-7, atol=1e-8)
    first = True
    for a, b in zip(run(ours, given), run(theirs, given), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        if first:
            assert torch.equal(a, b)  # the first output, before any state could differ
            first = False
        torch.testing.assert_close(a, b, **tolerance)


BAD = [
    (nn.Linear, lambda c: c(5, 3), (image(4, 6),)),
    (nn.Conv2d, lambda c: c(2, 3, 3), (image(1, 3, 5, 5),)),
    (nn.Conv2d, lambda c: c(2, 3, 3), (image(2, 5),)),
    (nn.Conv2d, lambda c: c(2, 3, 7), (image(1, 2, 5, 5),)),
    (nn.BatchNorm1d, lambda c: c(3), (image(1, 3),)),
    (nn.BatchNorm1d, lambda c: c(3), (image(2, 4),)),
    (nn.BatchNorm2d, lambda c: c(3), (image(2, 3),)),
    (nn.LayerNorm, lambda c: c(3), (image(2, 4),)),
    (nn.MaxPool2d, lambda c: c(2), (image(4),)),
    (nn.AvgPool2d, lambda c: c(2, padding=2), (image(2, 4, 4),)),
    (nn.AdaptiveAvgPool2d, lambda c: c(2), (image(4),)),
    (nn.GELU, lambda c: c(approximate="cubic"), (image(4),)),
    (nn.CrossEntropyLoss, lambda c: c(), (image(3, 4), torch.tensor([0, 1, 4]))),
    (nn.CrossEntropyLoss, lambda c: c(), (image(3, 4), torch.tensor([0, 1]))),
    (nn.BCEWithLogitsLoss, lambda c: c(), (image(3, 4), image(3))),
    (nn.Flatten, lambda c: c(3), (image(3, 4),)),
    (nn.Linear, lambda c: c(3, 2), ([1.0, 2.0, 3.0],)),
    (nn.GELU, lambda c: c(), (None,)),
]


@pytest.mark.parametrize(("twin", "make", "inputs"), BAD)
def test_the_same_errors(twin, make, inputs):
    errors = []
    for kind in (twin, DROP_INS[twin]):
        module = make(twin).double()
        module.__class__ = kind
        with pytest.raises(Exception) as caught:
            module(*inputs)
        errors.append(caught.value)
    assert type(errors[0]) is type(errors[1]), errors


def test_add_sums_both_branches():
    a, b = image(3, 4).requires_grad_(), image(4).requires_grad_()
    total = Add()(a, b)
    assert torch.equal(total, a + b)
    weights = image(3, 4)
    grads = torch.autograd.grad((total * weights).sum(), (a, b))
    torch.testing.assert_close(grads, (weights, weights.sum(0)))
