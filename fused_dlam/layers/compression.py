"""Codecs: how a worker's message becomes fewer bytes, and what is remembered so that nothing of it is lost.

    feedback     v = y + e;  data = C(v);  e' = v - D(data);  pull = sum_k w_k (D(data_k) - D(data))
    references   v = y - h;  data = C(v);  h' = h + D(data);  pull = gamma sum_k w_k (h'_k - h')

y is what the method sends, C a codec's `encode` and D its `decode`. Both pulls sum to zero over the workers where the
mixing matrix is doubly stochastic, whatever the codec does: **the workers' mean is kept**. What a message leaves out is
not lost either: it is in e, or in the next difference to h.

*Feedback* is DeepSqueeze's (Tang et al., "DeepSqueeze: decentralization meets error-compensated compression", 2019). It
takes one buffer e, on any graph, and leaves the workers apart by some units of the codec: for codecs that are fine next
to the values themselves, as 8 bits are.

*References* are CHOCO's (Koloskova, Stich and Jaggi, "Decentralized stochastic optimization and gossip algorithms with
compressed communication", ICML 2019), with a consensus step size gamma that follows from the codec. Both ends of an
edge remember in h what has been sent over it, and the message is what has changed since. That becomes small, so that
the coarsest codec is exact in the end. CHOCO has one h for a worker, of which all its neighbors hear every message. On
a graph that changes they do not, so here every matrix of the graph's period has its own. Without references workers
that send 4 bits stay as far apart as their weights are large, and the largest values alone do not train.

Not taken: Moniqua (Lu and De Sa, "Moniqua: modulo quantized communication in decentralized SGD", ICML 2020), which
sends remainders and needs no buffer, but a bound on what workers differ by: too large it is as coarse as 8 bits of the
values, too small it fails in silence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..rules.scalars import number

LARGEST = 3.4028234663852886e38  # of float32, the type of the scales
HIGHEST = 3.3895313892515355e38  # of bfloat16
SMALLEST = 1.1754943508222875e-38  # a scale below would lose digits: such a block is sent as zeros, and remembered


class Codec:
    """How N numbers become bytes. Subclass it, and pass an instance as `compress=`.

    Sender and receivers must have one codec, with the same values: ranks compare its `repr`.
    `decode` must give the same numbers wherever it runs.
    """

    #: Shown to users, and in checkpoints.
    name: str = ""
    #: Whether differences to what was sent before are encoded, see above. Then v is always finite. Without, v may have
    #: elements that are not, and `decode` must give NaN in their places: they then pull nobody.
    references: bool = False
    #: How many messages it takes until the last of a change has been said. Only with references may it be above 1.
    visits: float = 1.0

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({values})"

    def bytes(self, n: int) -> int:
        """How many bytes n numbers become, whatever they are."""
        raise NotImplementedError

    def encode(self, v: Tensor, data: Tensor) -> None:
        """Writes v, floating [n], into data, uint8 [bytes(n)], on the same device."""
        raise NotImplementedError

    def decode(self, data: Tensor, out: Tensor) -> None:
        """Writes what was encoded into out, floating [n]."""
        raise NotImplementedError


class Int8(Codec):
    """Whole numbers from -127 to 127 times a float32 scale for each block: the block's largest value over 127.

    Rounded to nearest, ties to even. 1 + 4/block bytes a number: at 256 3.94 times fewer than float32. -128 is a value
    that is not finite, which leaves the rest of its block as it is.

    Args:
        block: numbers that have one scale. Smaller ones are finer where small values lie beside large ones.
    """

    name = "int8"
    most = 127

    def __init__(self, block: int = 256):
        self.block = _whole("block", block, 4)

    def bytes(self, n: int) -> int:
        return _aligned(n) + 4 * -(-n // self.block)

    def encode(self, v: Tensor, data: Tensor) -> None:
        codes, scales = self.parts(v.numel(), data)
        rounded(v, self.block, self.most, codes, scales)

    def decode(self, data: Tensor, out: Tensor) -> None:
        codes, scales = self.parts(out.numel(), data)
        out.copy_(codes)
        scale_blocks(out, self.block, scales)
        out.masked_fill_(codes == -128, torch.nan)

    def parts(self, n: int, data: Tensor) -> tuple[Tensor, Tensor]:
        """The codes, int8 [n], and behind them the scales, float32 [blocks]."""
        return data[:n].view(torch.int8), data[_aligned(n) :].view(torch.float32)


class Int4(Codec):
    """The same with whole numbers from -7 to 7, two in a byte: 7.76 times fewer bytes than float32 with blocks of 256.

    Too coarse for values, so it encodes differences to what was sent before: with `references`.
    """

    name = "int4"
    references = True
    most = 7

    def __init__(self, block: int = 256):
        self.block = _whole("block", block, 4)

    def bytes(self, n: int) -> int:
        return _aligned(-(-n // 2)) + 4 * -(-n // self.block)

    def encode(self, v: Tensor, data: Tensor) -> None:
        n, half = v.numel(), -(-v.numel() // 2)
        codes = torch.zeros(2 * half, dtype=torch.int8, device=v.device)
        rounded(v, self.block, self.most, codes[:n], data[_aligned(half) :].view(torch.float32))
        codes.masked_fill_(codes == -128, 0)  # beyond float32: what cannot be said is left for the next time
        low, high = codes.add_(8).view(torch.uint8).view(half, 2).unbind(1)
        data[:half] = low | (high << 4)

    def decode(self, data: Tensor, out: Tensor) -> None:
        n, half = out.numel(), -(-out.numel() // 2)
        codes = torch.stack((data[:half] & 15, data[:half] >> 4), 1).view(-1)[:n].view(torch.int8) - 8
        out.copy_(codes)
        scale_blocks(out, self.block, data[_aligned(half) :].view(torch.float32))


class TopK(Codec):
    """The largest values of every 1,024, each in bfloat16 with 16 bits that say where it lies: 4 bytes.

    With `references`, so a change that is left out grows until it is among the largest. A share of 1/8 is 8 times fewer
    bytes than float32. What was left out for many messages is old when it comes, so pulls are damped, see `damping`,
    and workers disagree more: `Int4`, of as many bytes, trains better.

    Args:
        share: of the values, above 0 and at most 1.
    """

    name = "topk"
    references = True
    block = 1024

    def __init__(self, share: float = 0.125):
        self.share = number("share", share)
        if not 0 < self.share <= 1:
            raise ValueError(f"Invalid share: {share!r}, must be above 0 and at most 1")

    @property
    def visits(self) -> float:  # type: ignore[override]
        return 1 / self.share

    def kept(self, n: int) -> int:
        """Values that are sent of a block of n."""
        return max(1, round(n * self.share)) if n else 0

    def bytes(self, n: int) -> int:
        return 4 * (n // self.block * self.kept(self.block) + self.kept(n % self.block))

    def encode(self, v: Tensor, data: Tensor) -> None:
        for part, places, values in self._parts(v, data):
            found = part.abs().topk(places.shape[1], dim=1, sorted=False).indices
            places.copy_(found)
            values.copy_(part.gather(1, found).clamp_(-HIGHEST, HIGHEST))

    def decode(self, data: Tensor, out: Tensor) -> None:
        out.zero_()
        for part, places, values in self._parts(out, data):
            part.scatter_(1, places.long(), values.to(out.dtype))

    def _parts(self, v: Tensor, data: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The whole blocks as rows, and the short one: (values, places of those that are sent, what they are)."""
        middle = v.numel() // self.block * self.block
        places, values = data[: data.numel() // 2].view(torch.int16), data[data.numel() // 2 :].view(torch.bfloat16)
        at = middle // self.block * self.kept(self.block)
        parts = []
        for part, sent in ((v[:middle].view(-1, self.block), slice(0, at)), (v[None, middle:], slice(at, None))):
            if part.numel():
                parts.append((part, places[sent].view(len(part), -1), values[sent].view(len(part), -1)))
        return parts


CODECS = {codec.name: codec for codec in (Int8, Int4, TopK)}


def get(compress: Any) -> Codec | None:
    """A codec by its name, or one that is given. Raises ValueError or TypeError for what is none."""
    if compress is None or isinstance(compress, Codec):
        return compress
    if not isinstance(compress, str):
        raise TypeError(f"compress must be {', '.join(map(repr, CODECS))}, a Codec or None, not {compress!r}")
    if compress not in CODECS:
        raise ValueError(f"Invalid compress: {compress!r}, must be {', '.join(map(repr, CODECS))}, a Codec or None")
    return CODECS[compress]()


# -- pulls that rest on what was said long ago ------------------------------------------------------------------------

REPEATED = 3.0  # how often a pull may act until it is renewed
LARGEST_DENSE = 1024  # workers whose matrices are looked at as a whole


def damping(codec: Codec, phases: Iterable[Any]) -> float:
    """What pulls are multiplied by. phases: the matrices of a graph's period.

    With a codec of v visits h' of a number is renewed in every v-th message, and its pull acts in each of them: where
    the neighbors weigh w together that is v w in place of w. So the pull is multiplied by gamma such that gamma v w is
    at most 3. On the exponential graph of 8 workers an eighth of the values, v w = 6, is unstable without
    (tests/theory/test_compression.py). CHOCO's theorem asks for far less, and practice does not.
    """
    if codec.visits <= 1:
        return 1.0
    weight = max((_heard(phase) for phase in phases), default=0.0)
    return 1.0 if weight == 0 else min(1.0, REPEATED / (codec.visits * weight))


def progress(codec: Codec | None, phases: Iterable[Any]) -> float:
    """How much of a disagreement one message carries, in (0, 1]: what rates that are "auto" count with.

    Half of `damping`, because what is old is repeated. The rate of a full message made MI-DmSGD diverge.
    """
    return 1.0 if codec is None or codec.visits <= 1 else damping(codec, phases) / 2


def _heard(phase: Any) -> float:
    """What neighbors weigh together at the worker that hears the most of them."""
    if phase.averages() and phase.n > 2:
        return 0.0  # exact: not compressed
    return 1.0 - float(phase.dense().diagonal().min()) if phase.n <= LARGEST_DENSE else 1.0


# -- blocks with a scale -----------------------------------------------------------------------------------------------


def rounded(v: Tensor, block: int, most: int, codes: Tensor, scales: Tensor) -> None:
    """codes, int8 [n], from -most to most, and scales, float32 [blocks], such that v is about codes times scales.

    -128 where v is not finite, or no float32. Kernels repeat this bit for bit (kernels/triton_compression.py).
    """
    for part, code, scale in _blocks(v, block, codes, scales):
        size = part.abs()
        good = size <= LARGEST  # NaN compares false
        largest = size.masked_fill_(~good, 0.0).amax(1)
        scale.copy_(largest.to(torch.float32) * (1.0 / most))
        scale.masked_fill_(scale < SMALLEST, 0.0)
        inverse = torch.where(scale > 0, 1.0 / scale, 0.0).to(v.dtype)
        code.copy_(torch.mul(part, inverse[:, None], out=size).round_().clamp_(-most, most).masked_fill_(~good, -128.0))


def scale_blocks(out: Tensor, block: int, scales: Tensor) -> None:
    """Multiplies every block of out, [n], by its scale."""
    for part, _, scale in _blocks(out, block, out, scales):
        part.mul_(scale[:, None].to(out.dtype))


def _blocks(v: Tensor, block: int, codes: Tensor, scales: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The whole blocks as rows, and the short one."""
    whole = v.numel() // block
    middle = whole * block
    if whole:
        yield v[:middle].view(-1, block), codes[:middle].view(-1, block), scales[:whole]
    if middle < v.numel():
        yield v[None, middle:], codes[None, middle:], scales[whole:]


def _aligned(n: int) -> int:
    """Where what follows n bytes begins."""
    return -(-n // 16) * 16


def _whole(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"Invalid {name}: {value!r}, must be a whole number of at least {least}")
    return value
