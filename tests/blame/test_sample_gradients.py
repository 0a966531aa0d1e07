"""Per-sample gradients against their definition: each loss differentiated by itself."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from gradient_cases import CASES, N, case, definition, losses
from test_untouched import fingerprint, same
from torch import nn

import torchbp
from torchbp.blame.sample_gradients import sample_gradients

TOLERANCE = 1e-10


def close(a, b, scale=1.0):
    assert a.shape == b.shape
    error = float((a - b).abs().max()) if a.numel() else 0.0
    assert error <= TOLERANCE * max(float(b.abs().max()), scale), error


def flat(g):
    return g.reshape(len(g), -1)


@pytest.mark.parametrize("memory", [1, 1 << 28], ids=["one sample a tile", "one tile"])
@pytest.mark.parametrize("name", CASES)
def test_equal_to_each_loss_differentiated_by_itself(name, memory):
    model, x, y = case(name)
    each, expected = definition(model, x, y)
    found = sample_gradients(model, x, y, F.cross_entropy, memory=memory)
    close(found.losses, each)
    assert set(found.names) | set(found.unused) == set(expected)
    for parameter, g in expected.items():
        parts = [*found.tiles(parameter)]
        assert [p.start for p, _ in parts] == [0, *(p.stop for p, _ in parts[:-1])]
        close(torch.cat([tile for _, tile in parts]), g)
        close(found.square_norms(parameter), flat(g).square().sum(1))
        close(found.gram(name=parameter), flat(g) @ flat(g).T)
        close(found.total(parameter), g.sum(0))
        direction = torch.randn_like(g[0])
        close(found.dot({parameter: direction}), flat(g) @ direction.flatten())
    close(found.square_norms(), sum(flat(g).square().sum(1) for g in expected.values()))
    close(found.gram(), sum(flat(g) @ flat(g).T for g in expected.values()))


@pytest.mark.parametrize("name", CASES)
def test_sums_of_absolute_values_squares_and_groups(name):
    model, x, y = case(name)
    _, expected = definition(model, x, y)
    found = sample_gradients(model, x, y, F.cross_entropy)
    groups = torch.tensor([0, 2, 0, 1, 0])
    for parameter in found.names:
        g, factor = expected[parameter], found.factor(parameter)
        close(factor.absolute(1 << 20), g.abs().sum(0))
        close(factor.square(1 << 20), g.square().sum(0))
        sums = torch.stack([g[groups == k].sum(0) for k in range(3)])
        close(factor.grouped(groups, 3, 1 << 20), sums)


@pytest.mark.parametrize("name", ["linear 2-D", "linear 4-D", "embedding with padding", "tied",
                                  "conv 1d", "shared by calls and modules", "LSTM"])  # fmt: skip
def test_inner_products_with_other_samples_at_another_checkpoint(name):
    model, x, y = case(name)
    other, x2, y2 = case(name, n=3, seed=1)
    a, b = (sample_gradients(*args, F.cross_entropy) for args in ((model, x, y), (other, x2, y2)))
    (_, g), (_, h) = definition(model, x, y), definition(other, x2, y2)
    close(a.gram(b), sum(flat(g[p]) @ flat(h[p]).T for p in g))


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("name", ["linear 2-D", "linear 4-D", "attention, batch second", "LSTM",
                                  "flattened, samples inside", "tied"])  # fmt: skip
def test_small_batches(name, n):
    model, x, y = case(name, n=n)
    _, expected = definition(model, x, y)
    found = sample_gradients(model, x, y, F.cross_entropy)
    assert not found.one_by_one
    for parameter in found.names:
        close(torch.cat([t for _, t in found.tiles(parameter)]), expected[parameter])


@pytest.mark.parametrize("name", ["conv 2d, grouped, dilated, strided", "LSTM", "encoder"])
def test_converted_models_give_the_same(name):
    model, x, y = case(name)
    _, expected = definition(model, x, y)
    found = sample_gradients(torchbp.convert(model), x, y, F.cross_entropy)
    assert not found.one_by_one
    for parameter in found.names:
        close(torch.cat([t for _, t in found.tiles(parameter)]), expected[parameter])


def test_only_what_no_tape_can_see_goes_one_by_one():
    slow = {
        name: sample_gradients(*case(name), F.cross_entropy).one_by_one
        for name in CASES
    }  # fmt: skip
    assert slow.pop("odd functions") == ("gate",)
    assert slow.pop("LSTM cell") == ("start",)
    assert all(p.startswith("layer.") for p in slow.pop("LSTM, packed"))
    assert not any(slow.values())


def test_ghost_norms_and_products_agree():
    # Both ways of getting norms, by pairs of positions and by gradients, at their border.
    for positions, width in ((2, 50), (60, 4)):
        model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3)).double()
        x, y = torch.randn(4, positions, width).double(), torch.randint(3, (4, positions))
        found = sample_gradients(model, x, y, lambda o, t: F.cross_entropy(o.mT, t))
        for p in found.names:
            close(found.square_norms(p), sum_of_squares(found, p))
    conv = nn.Sequential(nn.Conv2d(8, 16, 3, groups=2), nn.Flatten(), nn.Linear(64, 3)).double()
    found = sample_gradients(conv, torch.randn(4, 8, 4, 4).double(), torch.arange(4) % 3, losses)
    close(found.square_norms("0.weight"), sum_of_squares(found, "0.weight"))


def sum_of_squares(found, name):
    return torch.cat([flat(t).square().sum(1) for _, t in found.tiles(name)])


def test_dropout_in_training_is_the_same_for_all_ways():
    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.LSTM(4, 5, 2, dropout=0.5, batch_first=True)
            self.drop, self.head = nn.Dropout(0.5), nn.Linear(5, 3)
            self.gate = nn.Parameter(torch.randn(5))

        def forward(self, x):
            from gradient_cases import Product

            return self.head(Product.apply(self.drop(self.layer(x)[0][:, -1]), self.gate))

    torch.manual_seed(0)
    model, x, y = Dropped().double().train(), torch.randn(N, 3, 4).double(), torch.arange(N) % 3
    state = torch.get_rng_state()
    _, expected = definition(model, x, y)
    torch.set_rng_state(state)
    with pytest.warns(UserWarning, match="training mode"):
        found = sample_gradients(model, x, y, F.cross_entropy)
    torch.manual_seed(7)  # what happens to the random state later must not matter
    assert found.one_by_one == ("gate",)
    for parameter in found.names:
        close(torch.cat([t for _, t in found.tiles(parameter)]), expected[parameter])


def test_batch_norm_in_training_gives_shares_that_add_up_and_says_so():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(6, 4).double(), torch.arange(6) % 3
    before = fingerprint(model, x)
    with pytest.warns(UserWarning, match="share in the blame of this batch"):
        found = sample_gradients(model, x, y, F.cross_entropy)
    assert same(before, fingerprint(model, x)) and found.coupled
    assert not found.one_by_one
    F.cross_entropy(model(x), y, reduction="sum").backward()
    for name, p in model.named_parameters():
        close(found.total(name), p.grad)
        close(torch.cat([t for _, t in found.tiles(name)]).sum(0), p.grad)
    assert not sample_gradients(model.eval(), x, y, F.cross_entropy).coupled


def test_samples_coupled_by_the_users_own_function_are_noticed():
    class Contrast(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            z = self.layer(x)
            return z - z.mean(0)

    with pytest.warns(UserWarning, match="depend on other samples"):
        sample_gradients(Contrast(), torch.randn(5, 4), torch.arange(5) % 3, F.cross_entropy)


@pytest.mark.parametrize("name", ["conv 2d, grouped, dilated, strided", "odd functions", "tied"])
def test_nothing_of_the_users_changes(name):
    model, x, y = case(name)
    losses(model(x), y).sum().backward()
    next(model.parameters()).requires_grad_(False)
    before = fingerprint(model, x)
    found = sample_gradients(model, x, y, F.cross_entropy)
    for parameter in found.names:
        list(found.tiles(parameter))
    found.square_norms()
    assert same(before, fingerprint(model, x))
    assert not any(hasattr(t, "_torchbp_side") for t in (x, y, *model.parameters()))
    with pytest.raises(ValueError, match="targets"):
        sample_gradients(model, x, y[:2], F.cross_entropy)
    assert same(before, fingerprint(model, x))


def test_frozen_parameters_are_treated_like_others():
    model, x, y = case("linear 2-D")
    expected = sample_gradients(model, x, y, F.cross_entropy).square_norms()
    model.requires_grad_(False)
    with torch.no_grad():
        close(sample_gradients(model, x, y, F.cross_entropy).square_norms(), expected)


def test_chosen_parameters_by_any_of_their_names():
    model, x, y = case("tied")
    found = sample_gradients(model, x, y, F.cross_entropy, ["head.weight", "scale"])
    assert found.names == ("tokens.weight", "scale") and not found.unused
    _, expected = definition(model, x, y)
    close(found.square_norms(), sum(flat(expected[p]).square().sum(1) for p in found.names))


def test_graphs_are_released():
    model, x, y = case("linear 2-D")
    seen = []
    model.layers[0].register_forward_hook(lambda m, a, out: seen.append(weakref.ref(out)))
    found = sample_gradients(model, x, y, F.cross_entropy)
    gc.collect()
    assert seen and not any(ref() is not None for ref in seen)
    assert not found.losses.requires_grad and not found.output.requires_grad


def test_memory_of_a_tile_is_bounded():
    model = nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 3)).double()
    x, y = torch.randn(64, 7, 30).double(), torch.randint(3, (64, 7))
    memory = 5 * 2 * 30 * 40 * 8
    found = sample_gradients(model, x, y, lambda o, t: F.cross_entropy(o.mT, t), memory=memory)
    assert max(len(tile) for _, tile in found.tiles("0.weight")) == 5


def test_parameters_changed_since_are_noticed():
    model, x, y = case("odd functions")
    found = sample_gradients(model, x, y, F.cross_entropy)
    before = torch.cat([t for _, t in found.tiles("first.weight")])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    close(torch.cat([t for _, t in found.tiles("first.weight")]), before)  # needs no weights
    for parameter in ("gate", "matrix"):
        with pytest.raises(RuntimeError, match="changed since"):
            list(found.tiles(parameter))


class Reordered(nn.Module):
    """A model that puts the samples of its batch into another order, and back."""

    def __init__(self, there, back):
        super().__init__()
        self.there, self.back = there, back
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(self.back(self.first(self.there(x)).tanh(), x))


REORDERED = {
    # Samples 0 and 1 stay where they are: two of them alone show nothing.
    "by value": (lambda x: x[x[:, 0].argsort()], lambda h, x: h[x[:, 0].argsort().argsort()]),
    "by two": (lambda x: x.roll(2, 0), lambda h, x: h.roll(-2, 0)),
    "by slices": (lambda x: torch.cat([x[1:], x[:1]]), lambda h, x: torch.cat([h[-1:], h[:-1]])),
    "flipped": (lambda x: x.flip(0), lambda h, x: h.flip(0)),
}


@pytest.mark.parametrize("name", REORDERED)
def test_samples_in_another_order_keep_their_gradients(name):
    torch.manual_seed(0)
    model = Reordered(*REORDERED[name]).double().eval()
    x, y = torch.randn(6, 4).double(), torch.randint(3, (6,))
    x[:, 0] = torch.tensor([0.0, 1.0, 4.0, 3.0, 5.0, 2.0])
    _, expected = definition(model, x, y)
    found = sample_gradients(model, x, y, F.cross_entropy)
    assert not found.coupled and "last.weight" not in found.one_by_one
    for parameter, g in expected.items():
        close(torch.cat([tile for _, tile in found.tiles(parameter)]), g)


def test_sequences_sorted_before_a_recurrent_layer_keep_their_gradients():
    class Sorted(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.LSTM(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            order = x[:, 0, 0].argsort()
            return self.head(self.rnn(x[order].transpose(0, 1))[0][-1][order.argsort()])

    model = Sorted().double().eval()
    x, y = torch.randn(6, 7, 4).double(), torch.randint(3, (6,))
    x[:, 0, 0] = torch.tensor([0.0, 1.0, 4.0, 3.0, 5.0, 2.0])  # samples 0 and 1 stay
    _, expected = definition(model, x, y)
    found = sample_gradients(model, x, y, F.cross_entropy)
    for parameter, g in expected.items():
        close(torch.cat([tile for _, tile in found.tiles(parameter)]), g)


def test_picking_from_every_sample_leaves_the_closed_forms():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, x, length):
            return self.head(self.rnn(x)[0][torch.arange(len(x)), length - 1])

    model = Last().double().eval()
    x, y = torch.randn(6, 7, 4).double(), torch.randint(3, (6,))
    found = sample_gradients(model, (x, torch.randint(1, 8, (6,))), y, F.cross_entropy)
    assert not found.one_by_one


@pytest.mark.parametrize("error", [KeyError, ZeroDivisionError, RuntimeError])
def test_a_model_that_takes_no_other_batch_goes_one_by_one(error):
    class Fixed(nn.Linear):
        def forward(self, x):
            if len(x) != 5:
                raise error("expected 5 samples")
            return super().forward(x)

    model, x, y = Fixed(4, 3).double().eval(), torch.randn(5, 4).double(), torch.randint(3, (5,))
    found = sample_gradients(model, x, y, F.cross_entropy)
    assert found.one_by_one == ("weight", "bias")
    each, expected = definition(model, x, y)
    close(found.losses, each)
    close(torch.cat([tile for _, tile in found.tiles("weight")]), expected["weight"])
    with pytest.raises(error, match="expected 5 samples"):  # its own error is not hidden
        sample_gradients(model, x[:4], y[:4], F.cross_entropy)
    model.train()
    with pytest.raises(RuntimeError, match="mode have changed since"):
        found.total("weight")


def test_tokens_overwritten_since_do_not_count():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 3)).double()
    tokens, y = torch.randint(1, 7, (6, 3)), torch.randint(3, (6,))
    found = sample_gradients(model, tokens, y, F.cross_entropy)
    before = found.total("0.weight").clone()
    tokens.zero_()
    close(found.total("0.weight"), before)


def test_a_table_that_shortens_its_rows_does_so_to_a_copy():
    model = nn.Sequential(nn.Embedding(7, 4, max_norm=0.5), nn.Flatten(), nn.Linear(12, 3))
    tokens, y = torch.randint(7, (6, 3)), torch.randint(3, (6,))
    before = fingerprint(model, tokens)
    total = sample_gradients(model, tokens, y, F.cross_entropy).total("0.weight")
    torchbp.attribute(model, tokens, y, F.cross_entropy)
    assert same(before, fingerprint(model, tokens))
    _, expected = definition(model, tokens, y)
    torch.testing.assert_close(total, expected["0.weight"].sum(0))


def test_bad_input_is_named():
    model, x, y = case("linear 2-D")
    ok = (model, x, y, F.cross_entropy)
    with pytest.raises(ValueError, match=r"parameters: unknown name 'layers.0.weigth'.*did you"):
        sample_gradients(*ok, parameters=["layers.0.weigth"])
    with pytest.raises(ValueError, match="batch is empty"):
        sample_gradients(model, x[:0], y[:0], F.cross_entropy)
    with pytest.raises(ValueError, match="neither a sum nor a mean over samples"):
        sample_gradients(model, x, y, lambda o, t: (o - o.mean(0)).square().sum() + o.std())
    with pytest.raises(TypeError, match="model: expected"):
        sample_gradients(lambda x: x, x, y, F.cross_entropy)
    with pytest.raises(TypeError, match="loss_fn"):
        sample_gradients(model, x, y, "cross_entropy")
    with pytest.raises(ValueError, match="memory: expected"):
        sample_gradients(*ok, memory=0)
    found = sample_gradients(*ok)
    with pytest.raises(ValueError, match=r"unknown name 'layers.0.wait'"):
        found.square_norms("layers.0.wait")
    with pytest.raises(
        ValueError, match=r"direction: 'layers.0.bias' has shape \(6,\), got \(5,\)"
    ):
        found.dot({"layers.0.bias": torch.ones(5)})
    wider = nn.Sequential(nn.Linear(5, 9), nn.Linear(9, 3)).double()
    narrow = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3)).double()
    a, b = (sample_gradients(m, x, y, F.cross_entropy) for m in (wider, narrow))
    with pytest.raises(ValueError, match=r"other: '0\.weight' has shape"):
        a.gram(b)
