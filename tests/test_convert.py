from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import torchbp
from torchbp.nn import DROP_INS
from torchbp.ops.registry import OPS


def model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding="same"), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 4), nn.LayerNorm(4), nn.GELU(),
        nn.Linear(4, 3), nn.LogSoftmax(-1),
    )  # fmt: skip


def objects(module: nn.Module) -> dict[str, int]:
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: id(tensor) for name, tensor in named.items()}


def test_every_module_the_registry_names_has_a_drop_in():
    for entry in OPS.values():
        for twin in entry.modules:
            assert issubclass(DROP_INS[twin], twin), entry.name
    # The others compose registered functionals, or hand their input on.
    others = {
        nn.Identity,
        nn.AdaptiveLogSoftmaxWithLoss,
        nn.modules.linear.NonDynamicallyQuantizableLinear,
    }
    assert {m for e in OPS.values() for m in e.modules} == {*DROP_INS} - others


def test_only_classes_change():
    net = model()
    before, ids, calls = copy.deepcopy(net.state_dict()), objects(net), []
    net[0].register_forward_hook(lambda *a: calls.append("hook"))
    assert torchbp.convert(net) is net
    assert all(type(m).__module__.startswith("torchbp.nn") for m in net)
    assert objects(net) == ids
    after = net.state_dict()
    assert [*before] == [*after] and all(torch.equal(before[k], after[k]) for k in before)
    net(torch.randn(2, 1, 4, 4))
    assert calls == ["hook"]
    assert repr(net) == repr(model())
    assert isinstance(net[0], nn.Conv2d)


def test_revert_restores_the_classes():
    net = model()
    classes = [type(m) for m in net.modules()]
    torchbp.revert(torchbp.convert(torchbp.convert(net)))
    assert [type(m) for m in net.modules()] == classes


def test_the_root_itself_is_converted():
    layer = nn.Linear(3, 2)
    assert type(torchbp.convert(layer)) is torchbp.nn.Linear


def test_copies_and_pickles_of_a_converted_model_compute_the_same():
    net = torchbp.convert(model()).eval()
    x = torch.randn(2, 1, 4, 4)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert [type(m) for m in twin.modules()] == [type(m) for m in net.modules()]
        assert torch.equal(twin(x), net(x))


class Odd(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def test_what_is_left_is_listed_with_the_reason():
    net = nn.Sequential(
        nn.Linear(4, 4), Odd(4, 4), nn.LazyLinear(3), nn.CrossMapLRN2d(2),
        torch.jit.script(nn.Linear(2, 2)), torch.ao.nn.quantized.dynamic.Linear(2, 2),
    )  # fmt: skip
    x = torch.randn(2, 4)
    expected = net[:2](x)
    torchbp.convert(net)
    assert type(net[1]) is Odd and torch.equal(net[:2](x), expected)
    report = torchbp.conversion_report(net)
    status = {row[0]: (row[2], row[3]) for row in report}
    assert status["0"][0] == "torchbp"
    assert status["1"] == ("left", "a subclass of torch.nn.Linear that may compute otherwise")
    assert "lazy" in status["2"][1] and "no drop-in" in status["3"][1]
    assert "scripted" in status["4"][1] and "quantised" in status["5"][1]
    assert "1 of 7 layers are torchbp's" in str(report)


def test_a_layer_whose_forward_was_replaced_is_left():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].forward = lambda x: x
    torchbp.convert(net)
    assert type(net[1]) is nn.Linear
    assert [row[2] for row in torchbp.conversion_report(net)] == ["torchbp", "left"]


def test_a_failure_half_way_restores_the_model():
    class Stubborn(nn.ReLU):
        def __setattr__(self, name, value):
            if name == "__class__":
                raise RuntimeError("no")
            super().__setattr__(name, value)

    net = nn.Sequential(nn.Linear(2, 2), Stubborn(), nn.Linear(2, 2))
    DROP_INS[Stubborn] = torchbp.nn.ReLU
    try:
        with pytest.raises(RuntimeError, match="no"):
            torchbp.convert(net)
    finally:
        del DROP_INS[Stubborn]
    assert [type(m) for m in net] == [nn.Linear, Stubborn, nn.Linear]


def test_a_model_without_supported_layers_is_named():
    with pytest.warns(UserWarning, match=r"no layer of the model has a drop-in .*CrossMapLRN2d"):
        torchbp.convert(nn.CrossMapLRN2d(2))


@pytest.mark.parametrize("function", [torchbp.convert, torchbp.revert, torchbp.conversion_report])
def test_only_modules_can_be_converted(function):
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got dict"):
        function({})
