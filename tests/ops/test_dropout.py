from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F

import torchbp.functional as B

INPUTS = [
    torch.randn(5, 7), torch.randn(5, 7).bfloat16(), torch.randn(4, 6)[:, ::2], torch.tensor(1.0),
    torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last), torch.randn(0, 3),
]  # fmt: skip


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("x", INPUTS, ids=lambda x: f"{tuple(x.shape)}-{x.dtype}")
def test_draws_as_torch_does(x, p, inplace):
    results = []
    for home in (F, B):
        torch.manual_seed(4)
        given = x.clone()
        y = home.dropout(given, p, True, inplace)
        assert (y is given) == (inplace or p == 0 or x.numel() == 0)
        results.append((y, torch.get_rng_state()))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][0].stride() == results[1][0].stride()
    assert torch.equal(results[0][1], results[1][1])


def test_the_gradient_meets_the_same_noise():
    x = torch.ones(200, dtype=torch.float64, requires_grad=True)
    y = B.dropout(x, 0.25)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, y.detach())
    assert {*grad.tolist()} == {0.0, 1 / 0.75}


@pytest.mark.parametrize("p", [-0.1, 1.5])
def test_probabilities_are_checked(p):
    with pytest.raises(ValueError, match=f"between 0 and 1, but got {p}"):
        B.dropout(torch.ones(2), p)


CHANNELS = {
    "dropout1d": [(4, 3, 5), (3, 5)],
    "dropout2d": [(4, 3, 5, 2), (4, 3, 5)],
    "dropout3d": [(4, 3, 5, 2, 2), (3, 5, 2, 2)],
    "alpha_dropout": [(4, 30), (6,)],
    "feature_alpha_dropout": [(4, 30), (4, 3, 2, 2)],
}


@pytest.mark.filterwarnings("ignore:.*dropout2d.*3D")
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", CHANNELS)
def test_the_others_draw_as_torch_does(name, p, inplace):
    for shape in CHANNELS[name]:
        results = []
        for home in (F, B):
            torch.manual_seed(4)
            given = torch.arange(1.0, 1 + math.prod(shape)).reshape(shape)
            y = getattr(home, name)(given, p, True, inplace)
            if home is B:
                assert (y is given) == (inplace or p == 0)
            results.append((y, torch.get_rng_state()))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("name", CHANNELS)
def test_without_training_the_input_comes_back(name):
    x = torch.randn(CHANNELS[name][0])
    assert getattr(B, name)(x, 0.5, False) is x
    with pytest.raises(ValueError, match=r"between 0 and 1, but got 1\.5"):
        getattr(B, name)(x, 1.5, False)


@pytest.mark.parametrize(
    ("name", "shape", "warns"),
    [
        ("dropout1d", (3,), False),
        ("dropout2d", (3,), True),
        ("dropout3d", (3,), True),
        ("dropout2d", (4, 3, 2), True),
        ("dropout3d", (4, 3, 2), True),
        ("feature_alpha_dropout", (3,), False),
    ],
)
def test_odd_shapes_meet_the_warnings_and_errors_of_torch(name, shape, warns):
    results = []
    for home in (F, B):
        torch.manual_seed(1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                results.append(getattr(home, name)(torch.ones(shape), 0.5, True))
            except RuntimeError:
                results.append(torch.tensor(torch.nan))
        assert any("dropout" in str(w.message) for w in caught) == warns
        if warns and home is B:
            assert caught[0].filename == __file__
    torch.testing.assert_close(*results, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["dropout", "dropout1d", "feature_alpha_dropout"])
def test_vmap_draws_for_each_entry_if_told_to(name):
    def drop(x):
        return getattr(B, name)(x, training=True)

    x = torch.ones(16, 2, 3, 4)
    same, different = (torch.func.vmap(drop, randomness=r)(x) for r in ("same", "different"))
    assert all(torch.equal(row, same[0]) for row in same)
    assert not all(torch.equal(row, different[0]) for row in different)


LAYOUTS = [
    torch.randn(5, 7), torch.randn(5, 7).bfloat16(), torch.randn(4, 6)[:, ::2], torch.tensor(1.0),
    torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last), torch.randn(3, 5, 7).mT,
    torch.randn(3, 5, 7).transpose(0, 1), torch.randn(3, 1, 7, 2).permute(3, 1, 0, 2),
]  # fmt: skip


@pytest.mark.parametrize("p", [0.1, 0.3, 0.9])
@pytest.mark.parametrize("x", LAYOUTS, ids=lambda x: f"{tuple(x.shape)}-{x.stride()}-{x.dtype}")
def test_value_and_gradient_are_those_of_torch(x, p):
    results = []
    for home in (F, B):
        torch.manual_seed(4)
        leaf = x.detach().requires_grad_()
        y = home.dropout(leaf, p)
        (grad,) = torch.autograd.grad(y, leaf, torch.arange(1.0, 1 + x.numel()).view(x.shape).to(x))
        results.append((y.detach(), grad, torch.get_rng_state()))
    assert all(map(torch.equal, *results))
    assert results[0][0].stride() == results[1][0].stride()
