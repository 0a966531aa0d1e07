"""What torch's generator of the CPU draws for dropout, as one bit for each element."""

from __future__ import annotations

import torch
from torch import Tensor

from .dropout import _reference_bits
from .table import add, vmap_one_by_one

#: Bytes of the state of a generator of the CPU.
STATE_BYTES = 5056
# Of MT19937: the length of the state, and how far the word is that joins one.
_LENGTH, _FAR = 624, 397


def _check(state: Tensor, count: int, p: float) -> None:
    if state.dtype != torch.uint8 or state.numel() != STATE_BYTES:
        raise RuntimeError(
            f"state: expected {STATE_BYTES} bytes, got {state.numel()} of {state.dtype}"
        )
    if count < 0:
        raise RuntimeError(f"count: expected 0 or more, got {count}")
    if not 0 <= p <= 1:
        raise RuntimeError(f"p: expected 0 to 1, got {p}")


def _twist(words: Tensor) -> Tensor:
    """The next 624 words."""
    new = words.clone()
    # Words join those that are new already: parts, none longer than the distance between the two.
    for start in range(0, _LENGTH, _LENGTH - _FAR):
        at = torch.arange(start, min(start + _LENGTH - _FAR, _LENGTH))
        following = new[(at + 1) % _LENGTH]
        mixed = (words[at] & 0x80000000) | (following & 0x7FFFFFFF)
        new[at] = new[(at + _FAR) % _LENGTH] ^ (mixed >> 1) ^ ((following & 1) * 0x9908B0DF)
    return new


def _tempered(words: Tensor) -> Tensor:
    y = words ^ (words >> 11)
    y = y ^ ((y << 7) & 0x9D2C5680)
    y = y ^ ((y << 15) & 0xEFC60000)
    return y ^ (y >> 18)


def _reference(state: Tensor, count: int, p: float) -> tuple[Tensor, Tensor]:
    _check(state, count, p)
    after = state.contiguous().view(-1).clone()
    left, following = after[8:12].view(torch.int32), after[16:24].view(torch.int64)
    words = after[24 : 24 + 8 * _LENGTH].view(torch.int64)
    numbers, missing = [], 2 * count
    while missing:
        if left == 1:
            words.copy_(_twist(words))
            left.fill_(_LENGTH + 1)
            following.zero_()
        start = int(following)
        part = words[start : start + min(missing, int(left) - 1)]
        numbers.append(_tempered(part))
        left.sub_(len(part))
        following.add_(len(part))
        missing -= len(part)
    upper, lower = torch.cat([words[:0], *numbers]).view(count, 2).unbind(1)
    drawn = (((upper & 0x1FFFFF) << 32) | lower).double() * 2.0**-53
    return _reference_bits(drawn < p), after


def _fake(state: Tensor, count: int, p: float) -> tuple[Tensor, Tensor]:
    _check(state, count, p)
    return state.new_empty(-(-count // 8)), state.new_empty(STATE_BYTES)


_op = add(
    "bernoulli_bits(Tensor state, int count, float p) -> (Tensor, Tensor)",
    _reference,
    _fake,
    vmap_one_by_one("bernoulli_bits"),
)


def bernoulli_bits(state: Tensor, count: int, p: float) -> tuple[Tensor, Tensor]:
    """Draw what ``bernoulli_(p)`` draws from a generator of the CPU, one bit for each element.

    An element is 1 where 53 bits of two numbers of MT19937 (Matsumoto and Nishimura 1998) are
    below ``p``. So draws torch where it does not leave that to the library of the processor's
    maker; `torchbp.ops.dropout` asks which of the two it is.

    Args:
        state: Of a generator of the CPU, as ``torch.Generator.get_state`` gives it.
        count: How many elements.
        p: The probability of a 1.

    Returns:
        The bits, uint8, as `dropout_bits` packs them; and the state of the generator afterwards.

    Raises:
        RuntimeError: An argument is not as described.
    """
    results: tuple[Tensor, Tensor] = _op(state, count, p)
    return results
