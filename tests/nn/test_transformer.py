"""Multi-head attention and the transformer layers against torch.nn, mask by mask, path by path."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchbp
import torchbp.functional as B
from torchbp.nn import TransformerEncoderLayer
from torchbp.ops.attention import Attention
from torchbp.verify.secants import _Recorder

EXACT = dict(rtol=1e-12, atol=1e-12)
CAUSAL = nn.Transformer.generate_square_subsequent_mask(5).double()
PADDED = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False, True, True, True, True]])


def pair(module: nn.Module, training: bool = True) -> tuple[nn.Module, nn.Module]:
    theirs = module.double().train(training)
    return torchbp.convert(copy.deepcopy(theirs)), theirs


def run(module: nn.Module, *args: Any, **kwargs: Any) -> list[Tensor | None]:
    """Outputs, gradients of every argument and of every parameter."""
    torch.manual_seed(3)
    outputs = module(*args, **kwargs)
    outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o is not None]
    total = sum((o * torch.arange(o.numel()).view(o.shape).cos()).sum() for o in outputs)
    wrt = [t for t in (*args, *module.parameters()) if t.requires_grad]
    return [*outputs, *torch.autograd.grad(total, wrt, allow_unused=True)]


def compare(ours: list[Any], theirs: list[Any], **tolerance: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        torch.testing.assert_close(a, b, **(tolerance or EXACT), equal_nan=True)


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


ATTENTION: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "no weights": ({}, dict(need_weights=False)),
    "each head": ({}, dict(average_attn_weights=False)),
    "no bias": (dict(bias=False), dict(need_weights=False)),
    "extra keys": (dict(add_bias_kv=True, add_zero_attn=True), dict(need_weights=False)),
    "extra keys, masked": (
        dict(add_bias_kv=True, add_zero_attn=True),
        dict(attn_mask=CAUSAL, key_padding_mask=PADDED.double() * -9),
    ),
    "dropout": (dict(dropout=0.3), {}),
    "dropout, no weights": (dict(dropout=0.3), dict(need_weights=False)),
    "padding": ({}, dict(key_padding_mask=PADDED)),
    "padding, no weights": ({}, dict(key_padding_mask=PADDED, need_weights=False)),
    "boolean mask": ({}, dict(attn_mask=CAUSAL != 0, need_weights=False)),
    "both masks": (
        {}, dict(attn_mask=CAUSAL != 0, key_padding_mask=PADDED, need_weights=False)),
    "mask of each head": ({}, dict(attn_mask=torch.randn(6, 5, 5).double())),
    "causal": ({}, dict(attn_mask=CAUSAL, is_causal=True, need_weights=False)),
    "causal, weights": ({}, dict(attn_mask=CAUSAL, is_causal=True)),
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_is_torchs(name, batch_first, training):
    made, called = ATTENTION[name]
    ours, theirs = pair(nn.MultiheadAttention(4, 2, batch_first=batch_first, **made), training)
    x, memory = tokens(3, 5, 4), tokens(3, 5, 4)
    if not batch_first:
        x, memory = (t.detach().transpose(0, 1).requires_grad_() for t in (x, memory))
    for args in ((x, x, x), (x, memory, memory), (x, memory, x)):
        compare(run(ours, *args, **called), run(theirs, *args, **called))


def test_attention_over_other_widths_without_batch():
    module = nn.MultiheadAttention(4, 2, kdim=3, vdim=5, bias=False)
    ours, theirs = pair(module)
    args = tokens(2, 4), tokens(6, 3), tokens(6, 5)
    hidden = torch.arange(6) > 3
    compare(run(ours, *args), run(theirs, *args))
    compare(run(ours, *args, key_padding_mask=hidden), run(theirs, *args, key_padding_mask=hidden))


def test_one_tensor_is_projected_once():
    module = torchbp.convert(nn.MultiheadAttention(4, 2, batch_first=True))
    x, memory = torch.randn(3, 5, 4), torch.randn(3, 5, 4)
    counts = []
    for args in ((x, x, x), (x, memory, memory), (x, memory, x)):
        with _Recorder() as recorder:
            module(*args, need_weights=False)
        counts.append(sum(call.op.__name__ == "Linear" for call in recorder.calls))
    assert counts == [2, 3, 4]


def test_static_keys_and_values():
    weight, bias, out = tokens(12, 4), tokens(12), tokens(4, 4)
    x, keys = tokens(5, 3, 4), tokens(6, 7, 2)
    results = []
    for home in (F, B):
        output, weights = home.multi_head_attention_forward(
            x, x, x, 4, 2, weight, bias, None, None, True, 0.0, out, None,
            static_k=keys, static_v=keys,
        )  # fmt: skip
        grads = torch.autograd.grad(output.sin().sum(), (x, keys, weight), allow_unused=True)
        results.append([output, weights, *grads])
    compare(*results)


BAD_ATTENTION: list[tuple[dict[str, Any], tuple[int, ...], dict[str, Any]]] = [
    ({}, (3, 5, 6), {}),
    ({}, (5,), {}),
    ({}, (3, 5, 4), dict(is_causal=True)),
    ({}, (3, 5, 4), dict(attn_mask=torch.zeros(5, 4))),
    ({}, (3, 5, 4), dict(attn_mask=torch.zeros(3, 5, 5))),
    ({}, (3, 5, 4), dict(attn_mask=torch.zeros(1, 6, 5, 5))),
    ({}, (3, 5, 4), dict(attn_mask=torch.zeros(5, 5, dtype=torch.int64))),
    ({}, (3, 5, 4), dict(key_padding_mask=torch.zeros(5))),
    ({}, (3, 5, 4), dict(key_padding_mask=torch.zeros(3, 4))),
    ({}, (5, 4), dict(attn_mask=torch.zeros(3, 5, 5))),
    (dict(dropout=1.5), (3, 5, 4), {}),
    (dict(dropout=1.5), (3, 5, 4), dict(need_weights=False)),
]


@pytest.mark.parametrize(("made", "shape", "called"), BAD_ATTENTION)
def test_attention_refuses_what_torch_refuses(made, shape, called):
    ours, theirs = pair(nn.MultiheadAttention(4, 2, batch_first=True, **made))
    x, kinds = tokens(*shape), []
    for module in (theirs, ours):
        with pytest.raises(Exception) as caught:
            module(x, x, x, **called)
        kinds.append(caught.type)
    assert kinds[0] is kinds[1]


def other_batch(module: nn.Module) -> None:
    module(tokens(5, 3, 4), tokens(5, 2, 4))


def other_width(module: nn.Module) -> None:
    module(tokens(5, 3, 4), tokens(5, 3, 6))


@pytest.mark.parametrize("call", [other_batch, other_width])
def test_transformer_refuses_what_torch_refuses(call):
    for module in pair(nn.Transformer(4, 2, 1, 1, 8)):
        with pytest.raises(RuntimeError, match="must be equal"):
            call(module)


def encoder_layer(**settings: Any) -> nn.TransformerEncoderLayer:
    settings = {"dropout": 0.2, "batch_first": True, **settings}
    return nn.TransformerEncoderLayer(4, 2, 8, **settings)


LAYERS: dict[str, dict[str, Any]] = {
    "relu": {},
    "gelu": dict(activation="gelu"),
    "norm first": dict(norm_first=True, activation=F.gelu),
    "no bias": dict(bias=False),
    "module": dict(activation=nn.SiLU()),
    "callable": dict(activation=lambda x: x.sin()),
    "other function": dict(activation=torch.tanh),
    "sequence first": dict(batch_first=False),
}
MASKS: dict[str, dict[str, Any]] = {
    "no mask": {},
    "causal": dict(src_mask=CAUSAL, is_causal=True),
    "causal and padding": dict(src_mask=CAUSAL != 0, src_key_padding_mask=PADDED),
    "padding": dict(src_key_padding_mask=PADDED),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("name", LAYERS)
def test_encoder_layer_is_torchs(name, masks, training):
    ours, theirs = pair(encoder_layer(**LAYERS[name]), training)
    x = tokens(3, 5, 4) if LAYERS[name].get("batch_first", True) else tokens(5, 3, 4)
    compare(run(ours, x, **MASKS[masks]), run(theirs, x, **MASKS[masks]))
    if not training:  # torch.nn takes another way where no gradient is asked for
        with torch.no_grad():
            compare([ours(x, **MASKS[masks])], [theirs(x, **MASKS[masks])], rtol=1e-9, atol=1e-10)


def test_a_layer_takes_children_that_are_not_converted():
    theirs = encoder_layer().double().eval()
    ours = copy.deepcopy(theirs)
    ours.__class__ = TransformerEncoderLayer
    x = tokens(3, 5, 4)
    compare(run(ours, x), run(theirs, x))


@pytest.mark.parametrize("activation", [F.relu, torch.relu, F.gelu, torch.nn.functional.silu])
def test_activation_functions_give_way_to_ours(activation):
    layer = torchbp.convert(encoder_layer(activation=activation).eval())
    with _Recorder() as recorder:
        layer(torch.randn(2, 5, 4))
    names = [call.op.__name__ for call in recorder.calls]
    assert len(names) == 10, names  # 4 linear, attention, 2 sums, 2 norms and the activation
    assert names.count("Linear") == 4 and names.count("Add") == 2


def test_hooks_of_children_are_called_in_inference():
    layer, called = torchbp.convert(encoder_layer().eval()), []
    for name, child in layer.named_modules():
        if name not in ("", "self_attn.out_proj"):
            child.register_forward_hook(lambda *_, name=name: called.append(name))
    with torch.no_grad():
        layer(torch.randn(2, 5, 4))
    children = {name for name, _ in layer.named_modules()} - {"", "self_attn.out_proj"}
    assert set(called) == children


@pytest.mark.parametrize("norm_first", [True, False])
def test_decoder_layer_is_torchs(norm_first):
    layer = nn.TransformerDecoderLayer(4, 2, 8, 0.2, "gelu", norm_first=norm_first)
    memory_mask = torch.rand(5, 6) > 0.9
    masks = dict(tgt_mask=CAUSAL, tgt_is_causal=True, memory_mask=memory_mask)
    for training in (True, False):
        ours, theirs = pair(layer, training)
        x, memory = tokens(5, 3, 4), tokens(6, 3, 4)
        compare(run(ours, x, memory), run(theirs, x, memory))
        compare(run(ours, x, memory, **masks), run(theirs, x, memory, **masks))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_whole_transformer_is_torchs(batch_first, training):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = nn.Transformer(4, 2, 2, 2, 8, 0.1, batch_first=batch_first)
    ours, theirs = pair(module, training)
    x, y = tokens(3, 5, 4), tokens(3, 5, 4)
    if not batch_first:
        x, y = (t.detach().transpose(0, 1).requires_grad_() for t in (x, y))
    hidden = torch.zeros(3, 5).double().masked_fill(PADDED, -torch.inf)
    masks = dict(tgt_mask=CAUSAL, src_key_padding_mask=hidden, memory_key_padding_mask=hidden)
    compare(run(ours, x, y), run(theirs, x, y))
    compare(run(ours, x, y, **masks), run(theirs, x, y, **masks))


PADDINGS: dict[str, Tensor] = {
    "at the end": PADDED,
    "in the middle": torch.tensor([[False, True, False, False, False]] * 3),
    "floating": torch.zeros(3, 5).double().masked_fill(PADDED, -torch.inf),
    "finite": PADDED.double() * -2,
    "none": torch.zeros(3, 5, dtype=torch.bool),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("name", PADDINGS)
def test_padded_positions_come_out_as_torchs(name, norm):
    norms = nn.LayerNorm(4) if norm else None
    if norms is not None:
        nn.init.ones_(norms.bias)
    ours, theirs = pair(nn.TransformerEncoder(encoder_layer(), 2, norms), training=False)
    x = tokens(3, 5, 4)
    if name != "finite":  # which torch takes for a boolean mask in inference, and so do its layers
        compare(
            run(ours, x, src_key_padding_mask=PADDINGS[name]),
            run(theirs, x, src_key_padding_mask=PADDINGS[name]),
        )
    for training in (False, True):  # torch leaves the padding in when it trains
        with torch.no_grad():
            outputs = [run_seeded(m.train(training), x, PADDINGS[name]) for m in (ours, theirs)]
        torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-10)


def run_seeded(module: nn.Module, x: Tensor, padding: Tensor) -> Tensor:
    torch.manual_seed(3)
    return module(x, src_key_padding_mask=padding)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_nested_tensor_is_left_to_torch():
    nested = torch.nested.nested_tensor([torch.randn(3, 4).double(), torch.randn(5, 4).double()])
    encoder = nn.TransformerEncoder(encoder_layer(), 2)
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    for module, copies in ((encoder, 1), (attention, 3)):
        results = []
        with torch.no_grad():
            for one in pair(module, training=False):
                output = one(*[nested] * copies)
                results.append(output[0] if isinstance(output, tuple) else output)
        for a, b in zip(*(r.unbind() for r in results), strict=True):
            assert torch.equal(a, b)


def test_the_encoder_finds_out_that_a_mask_is_causal():
    ours, theirs = pair(nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=False))
    x = tokens(3, 5, 4)
    compare(run(ours, x, mask=CAUSAL), run(theirs, x, mask=CAUSAL))
    with _Recorder() as recorder:
        ours(x, mask=CAUSAL)
    causal = [call.args[5] for call in recorder.calls if call.op is Attention]
    assert causal == [True, True]


def test_convert_reaches_every_child_and_revert_undoes_it():
    model = nn.Transformer(4, 2, 1, 1, 8, batch_first=True)
    before = [type(m) for m in model.modules()]
    torchbp.convert(model)
    assert not [row for row in torchbp.conversion_report(model) if row[2] != "torchbp"]
    assert [type(m) for m in torchbp.revert(model).modules()] == before
