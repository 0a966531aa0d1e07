"""Example calls of every kernel in `torchbp.kernels.KERNELS`; a new kernel needs some of each kind.

``SMALL`` covers the forms of a call: dtypes, layouts, optional arguments. ``LARGE`` is large enough
to be cut into tasks for several threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchbp import kernels

Arguments = tuple[Any, ...]


def sample(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values that depend on the shape alone."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, dtype=dtype, generator=generator)


X, B = sample(6, 5), sample(5)
Y = torch.tensor([0, 4, 1, 1, 3, 2])
IMAGE = sample(2, 3, 4, 5).to(memory_format=torch.channels_last)

BITS = torch.arange(4, dtype=torch.uint8) * 77
POOLED = kernels.max_pool(IMAGE, [2, 3], [1, 2], [1, 1], [1, 1], True)
WINDOW = [3, 3], [2, 2], [1, 1], [1, 1]
STATE = torch.Generator().manual_seed(3).get_state()

SMALL: dict[str, dict[str, Arguments]] = {
    "add_norm": {
        "": (X, None, None, 0.0, B, None, 1, False, 1e-5),
        "dropped": (X, X.flip(0), BITS, 0.5, B, B, 1, True, 1e-5),
        "half": (X.half(), X.half(), None, 0.0, None, None, 2, True, 1e-5),
    },
    "add_norm_backward": {
        "": (X, X, X, sample(6), sample(6).exp(), B, BITS, 0.5, 1),
        "rms": (X, None, X, None, sample(6).exp(), None, None, 0.0, 1),
    },
    "batch_norm_backward": {
        "": (IMAGE, IMAGE, B[:3], B[:3].exp(), None, True),
        "weighted": (IMAGE, IMAGE, B[:3], B[:3].exp(), B[2:], False),
        "groups": (IMAGE, IMAGE, X[:2, :1], X[:2, :1].exp(), None, True),
    },
    "bernoulli_bits": {
        "": (STATE, 21, 0.7),
        "several refreshes": (STATE, 1000, 0.1),
    },
    "bias_act": {
        "": (X, B, "gelu", 0.1),
        "plain": (IMAGE, None, "silu", 0.1),
        "strided": (X[:, ::2], None, "relu", 0.1),
        "transposed": (sample(5, 6).t(), B, "relu", 0.1),
    },
    "bias_act_backward": {
        "": (X, X, B, "tanh", 0.1),
        "plain": (IMAGE, IMAGE, None, "sigmoid", 0.1),
        "expanded": (sample(1).expand(2, 3, 4, 5), IMAGE, None, "gelu_tanh", 0.1),
    },
    "blame_reduce": {
        "": (X, X, -1, False),
        "image": (IMAGE, IMAGE, 1, True),
        "half": (X.half(), X.half(), 1, False),
    },
    "blame_reduce_into": {
        "": (X, X, -1, False, X.clone(), X[:3].clone()),
        "image": (IMAGE, IMAGE, 1, True, X[:2, :3].clone(), X[:3, :3].clone()),
        "half": (X.half(), X.half(), 1, False, X.clone(), X[:3].clone()),
        "empty": (IMAGE[:, :, :0], IMAGE[:, :, :0], 1, False, X[:2, :3].clone(), X[:3, :3].clone()),
    },
    "blame_settle": {
        "": ([X, X], [X[:3], X[:3]], torch.ones(6), torch.arange(6), 4, 0.5, [1, 0]),
        "plain": ([X.double()], [X.double()[:3]], torch.ones(6).double(), None, 4, 0.5, [2]),
    },
    "conv_grad_weight": {
        "": (sample(2, 4, 3, 4), IMAGE, [2, 2], [1, 1], [0, 0], [1, 1], 1),
        "depthwise": (sample(2, 3, 4, 5), IMAGE, [3, 3], [1, 1], [1, 1], [1, 1], 3),
        "one dim": (sample(2, 4, 3), sample(2, 2, 7), [3], [2], [0], [1], 2),
    },
    "dropout_apply": {
        "": (X, torch.arange(4, dtype=torch.uint8) * 77, 1.25),
        "image": (IMAGE, torch.arange(15, dtype=torch.uint8) * 17, 2.0),
        "half": (B.half(), torch.tensor([21], dtype=torch.uint8), 2.0),
    },
    "dropout_bits": {
        "": ((X > 0).int(),),
        "image": (IMAGE > 0,),
    },
    "cross_entropy": {
        "": (X, Y, None, 1, -100, 0.0, 0.0),
        "all": (X[:, ::2].double(), Y % 3, B[::2].double(), 0, 1, 0.1, 0.1),
        "half": (X.half(), Y, None, 2, -100, 0.1, 0.0),
    },
    "cross_entropy_backward": {
        "": (torch.tensor(0.5), X, Y, None, 1, -100, 0.0, 0.0),
        "rows": (B[:1].expand(6), X[:, ::2], Y % 3, B[::2], 0, 1, 0.1, 0.1),
        "half": (torch.tensor(0.5), X.half(), Y, None, 2, -100, 0.1, 0.0),
    },
    "cross_entropy_in_place": {
        "": (X.clone(), torch.tensor(0.5), Y, None, -100, 0.0, 0.0),
        "rows": (X.clone(), X[:, 0], Y, B, 1, 0.1, 0.1),
    },
    "elementwise_backward": {
        "": (X, X, 2, 0.0, 0.0),
        "image": (sample(2, 3, 4, 5), IMAGE.to(torch.bfloat16).float(), 7, 1.0, 20.0),
    },
    "gated": {
        "": (X, X.flip(0), "silu"),
        "packed": (IMAGE[:, :, :, :4], None, "gelu"),
        "halves": (*sample(6, 8).chunk(2, -1), "sigmoid"),
        "image": (IMAGE, IMAGE.contiguous(), "relu"),
    },
    "gated_backward": {
        "": (X, X, X.flip(0), "gelu_tanh"),
        "packed": (sample(2, 3, 4, 2), IMAGE[:, :, :, :4], None, "tanh"),
        "halves": (sample(6, 4), *sample(6, 8).chunk(2, -1), "silu"),
        "expanded": (sample(1).expand(2, 3, 4, 5), IMAGE, IMAGE.contiguous(), "relu"),
    },
    "layer_norm_backward": {
        "": (X, X, sample(6), sample(6).exp(), None, 1),
        "rms": (X, X, None, sample(6).exp(), B, 1),
        "two dims": (IMAGE, IMAGE, sample(2, 3), sample(2, 3).exp(), sample(4, 5), 2),
    },
    "linear_backward": {
        "": (sample(6, 4), X, sample(4, 5), True, True, True),
        "weight": (sample(6, 4).double(), X.double(), sample(4, 5).double(), False, True, False),
    },
    "max_pool": {
        "": (IMAGE, [2, 3], [1, 2], [1, 1], [1, 1], True),
        "one dim": (sample(2, 3, 20), [3], [2], [0], [2], False),
    },
    "max_pool_backward": {
        "": (POOLED[0], POOLED[1], [2, 3, 4, 5], [2, 3], [1, 2], [1, 1], [1, 1]),
    },
    "softmax_backward": {
        "": (X, X.softmax(-1), False),
        "logarithm": (X.half(), X.log_softmax(-1).half(), True),
    },
}

# Made when asked for: they take some megabytes.
LARGE: dict[str, Callable[[], list[Arguments]]] = {
    "add_norm": lambda: [
        (x := sample(*s), x, None, 0.0, sample(s[1]), None, 1, centre, 1e-5)
        for s in [(1025, 257), (3, 70_001)]
        for centre in (True, False)
    ],
    "add_norm_backward": lambda: [
        (x := sample(*s), x, x, sample(s[0]), sample(s[0]).exp(), sample(s[1]), None, 0.0, 1)
        for s in [(1025, 257), (3, 70_001)]
    ],
    "batch_norm_backward": lambda: (
        [
            (x, x, torch.zeros(s), torch.ones(s), None, True)
            for x, s in [
                (sample(33, 17, 31, 31), 17),
                (sample(1025, 257), 257),
                (sample(7, 6, 9000), 6),
            ]
        ]
        + [(x := sample(9, 12, 1023), x, torch.zeros(9, 3), torch.ones(9, 3), sample(12), True)]
    ),
    "bernoulli_bits": lambda: [(STATE, 70_001, 0.9)],
    "bias_act": lambda: [(sample(1025, 257), sample(257), act, 0.1) for act in ("gelu", "relu")],
    "bias_act_backward": lambda: [
        (g := sample(*s), g, bias, "gelu", 0.1)
        for s in [(4099, 65), (33, 4099), (1, 70_001)]
        for bias in (sample(s[-1]), None)
    ],
    "blame_reduce": lambda: [
        (sample(*s), sample(*s).flip(0), dim, False)
        for s, dim in [
            ((1025, 257), -1),
            ((9, 33, 31, 33), 1),
            ((9, 1023, 33), -1),
            ((1, 2, 90_001), 1),
        ]
    ],
    "blame_reduce_into": lambda: [
        (
            sample(*s),
            sample(*s).flip(0),
            dim,
            False,
            torch.empty(s[0], s[dim]),
            torch.empty(3, s[dim]),
        )
        for s, dim in [((1025, 257), -1), ((9, 33, 31, 33), 1)]
    ],
    "blame_settle": lambda: [
        (
            [sample(1025, n) for n in (100, 157)],
            [sample(3, n) for n in (100, 157)],
            sample(1025).abs(),
            torch.arange(1025) % 13,
            13,
            2.0,
            [kind, kind],
        )
        for kind in range(3)
    ],
    "conv_grad_weight": lambda: [
        (sample(9, 32, 31, 31), sample(9, 16, 31, 31), *[[3, 3], [1, 1], [1, 1], [1, 1]], 1),
        (sample(9, 32, 31, 31), sample(9, 32, 31, 31), *[[3, 3], [1, 1], [1, 1], [1, 1]], 32),
    ],
    "dropout_apply": lambda: [
        (x := sample(*s), kernels.dropout_bits(x > 0), 1.25) for s in [(263, 257), (70_001,)]
    ],
    "dropout_bits": lambda: [((sample(*s) > 0).int(),) for s in [(263, 257), (70_001,)]],
    "cross_entropy": lambda: [
        (sample(n, c), torch.arange(n) % c, None, 1, 2, e, e)
        for n, c in [(4099, 65), (65, 4099), (1, 90_001)]
        for e in (0.0, 0.1)
    ],
    "cross_entropy_backward": lambda: [
        (torch.tensor(0.5), sample(n, c), torch.arange(n) % c, None, 1, 2, e, e)
        for n, c in [(4099, 65), (65, 4099), (1, 90_001)]
        for e in (0.0, 0.1)
    ],
    "cross_entropy_in_place": lambda: [
        (sample(n, c), torch.tensor(0.5), torch.arange(n) % c, None, 2, 0.1, 0.1)
        for n, c in [(4099, 65), (65, 4099), (1, 90_001)]
    ],
    "elementwise_backward": lambda: [
        (sample(263, 257), sample(263, 257), f, 0.5, 1.5) for f in range(len(kernels.ELEMENTWISE))
    ],
    "gated": lambda: [
        (sample(*s), gate, "gelu")
        for s in [(4099, 66), (65, 4098), (1, 90_002)]
        for gate in (None, sample(*s).flip(-1))
    ],
    "gated_backward": lambda: [
        *((sample(s[0], s[1] // 2), sample(*s), None, "silu") for s in [(4099, 66), (1, 90_002)]),
        (x := sample(263, 257), x, x.flip(0), "silu"),
    ],
    "layer_norm_backward": lambda: [
        (x := sample(*s), x, mean, torch.ones(s[0]), sample(s[1]), 1)
        for s in [(4099, 65), (65, 4099), (3, 50_001)]
        for mean in (torch.zeros(s[0]), None)
    ],
    "linear_backward": lambda: [
        (sample(n, o), sample(n, i), sample(o, i), True, True, True)
        for n, i, o in [(257, 300, 270), (1, 600, 1100), (1100, 17, 33)]
    ],
    "max_pool": lambda: [
        (x, *WINDOW, False)
        for x in (
            sample(5, 17, 63, 65),
            sample(5, 17, 63, 65).to(memory_format=torch.channels_last),
        )
    ],
    "max_pool_backward": lambda: [
        (y, taps, [5, 17, 63, 65], *WINDOW)
        for x in (
            sample(5, 17, 63, 65),
            sample(5, 17, 63, 65).to(memory_format=torch.channels_last),
        )
        for y, taps in [kernels.max_pool(x, *WINDOW, False)]
    ],
    "softmax_backward": lambda: [
        (x := sample(*s), x.softmax(-1), logarithm)
        for s in [(4099, 65), (65, 4099), (1, 90_001)]
        for logarithm in (False, True)
    ],
}
