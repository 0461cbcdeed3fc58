"""The data flow of one step: gradients -> messages -> neighbors -> combined parameters, bucket by bucket.

    for each bucket:  pack -> post receives and sends
    for each bucket:  wait for its messages -> combine -> parameters (views of the flat buffer)

What is sent, to whom and in which order depends on the layout and the step alone, never on what one rank happens to
have (a missing gradient, an overflow): otherwise its neighbors would hang.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from . import buckets as flat
from .buckets import Bucket
from .exchange import Exchange, Transfer
from .kernels import backend
from .kernels.backend import Scalars
from .kernels.rule import Rule, send_parameter
from .topology import Peers, Topology

NOBODY = Peers((), (), ())
EVERYBODY = Peers((-1,), (1.0,), ())  # one "neighbor", the workers' mean, by all-reduce


class Flight(NamedTuple):
    """One bucket's exchange of this step: what was sent, where the neighbors' messages land."""

    transfer: Transfer | None
    message: torch.Tensor  # [messages, N]
    received: torch.Tensor  # [d, messages, N]
    active: list[bool]  # which parameters take a local step


class Engine:
    """Flat buffers, passes and transfers of all parameter groups. `exchange=None`: one worker, nothing is sent."""

    def __init__(
        self,
        rule: Rule,
        topology: Topology,
        exchange: Exchange | None,
        fused: bool | None = None,
        message_dtype: torch.dtype | None = None,
        bucket_bytes: int | None = None,
    ):
        self.rule, self.topology, self.exchange = rule, topology, exchange
        self.fused, self.message_dtype, self.bucket_bytes = fused, message_dtype, bucket_bytes
        self.averages_gradient = rule.average == "gradient"
        self.groups: list[list[Bucket]] = []
        self.passes: list[dict[torch.device, backend.Blocked]] = []  # per group: it has scalars of its own

    def add_group(self, params: Iterable[torch.Tensor]) -> list[Bucket]:
        """Moves the parameters into flat buffers. Same parameters in the same order on every rank."""
        new = flat.build(params, self.bucket_bytes, start=sum(map(len, self.groups)))
        lonely = self.exchange is None or self.averages_gradient
        for b in new:
            degree = 0 if lonely else max(self._rows(t) for t in range(self.topology.period))
            sends = 0 if lonely or self._sends_x(b) else self.rule.messages
            b.allocate(len(self.rule.state), sends, degree, self.message_dtype)
            if degree and not sends:  # x itself is sent
                b.received = b.received.new_zeros(degree, 1, b.N)
        self.groups.append(new)
        devices = {b.x.device for b in new}
        self.passes.append({d: backend.choose(self.rule, d, self.fused) for d in devices})
        return new

    @property
    def buckets(self) -> list[Bucket]:
        """All buckets in the one order in which every rank exchanges them."""
        return [b for group in self.groups for b in group]

    def step(self, step: int, scalars: Sequence[Scalars]) -> None:
        """One update of everything; `scalars` has one entry per group, without the weights."""
        for b in self.buckets:
            b.refresh()
        peers = NOBODY if self.exchange is None or self.averages_gradient else self._peers(step)
        flights: list[tuple[int, Bucket, Flight]] = []
        for i, (group, s) in enumerate(zip(self.groups, scalars, strict=True)):
            for passes in self.passes[i].values():
                passes.set(s._replace(weights=peers.weights))
            for b in group:
                flights.append((i, b, self._send(i, b, peers, step)))
        for i, b, flight in flights:
            self._finish(i, b, flight, peers)
        for _, _, flight in flights:
            if flight.transfer is not None:
                flight.transfer.wait_sent()

    def _peers(self, step: int) -> Peers:
        assert self.exchange is not None
        if self._averages(step):
            return EVERYBODY
        return self.topology.peers(self.exchange.rank, step)

    def _averages(self, step: int) -> bool:
        return self.topology.n > 2 and self.topology.averages_exactly(step)

    def _rows(self, step: int) -> int:
        return 1 if self._averages(step) else self.topology.degree(step)

    def _sends_x(self, b: Bucket) -> bool:
        return self.rule.send is send_parameter and self.message_dtype in (None, b.x.dtype)

    def _send(self, i: int, b: Bucket, peers: Peers, step: int) -> Flight:
        active = b.active()
        if self.exchange is None:
            return Flight(None, b.messages, b.received, active)
        if self.averages_gradient:
            b.raise_flags(active)
            self.exchange.average(b.g, step)
            return Flight(None, b.messages, b.received, b.lower_flags(active))
        message = b.x.view(1, -1) if self._sends_x(b) else b.messages
        if peers is EVERYBODY and message.dtype != b.x.dtype:
            message = b.x.new_empty(message.shape)  # a mean of rounded messages would move the workers' mean
        if (peers.sources or peers.destinations) and not self._sends_x(b):
            for span, now in b.runs(active):
                self._pack(i, b, span, now, message)
        if peers is EVERYBODY:
            received = message[None].clone()
            self.exchange.average(received, step)
            return Flight(None, message, received, active)
        return Flight(self.exchange.post(message, b.received, peers, step), message, b.received, active)

    def _pack(self, i: int, b: Bucket, span: slice, active: bool, message: torch.Tensor) -> None:
        if not active:
            b.g[span].zero_()
        state = tuple(t[span] for t in b.state)
        self.passes[i][b.x.device].pack(b.x[span], b.g[span], state, message[:, span])
        if not active:  # no local step: what it sends in the place of the parameters is the parameters
            message[0, span].copy_(b.x[span])

    def _finish(self, i: int, b: Bucket, flight: Flight, peers: Peers) -> None:
        if flight.transfer is not None:
            flight.transfer.wait_received()
            if self._sends_x(b):
                flight.transfer.wait_sent()  # x is read by the transport until then
        for span, now in b.runs(flight.active):
            if now:
                state = tuple(t[span] for t in b.state)
                received = flight.received[: len(peers.sources), :, span]
                self.passes[i][b.x.device].combine(b.x[span], b.g[span], state, received)
            elif peers.sources:
                self._mix_only(b, span, flight, peers)
        b.publish()

    def _mix_only(self, b: Bucket, span: slice, flight: Flight, peers: Peers) -> None:
        """A parameter without a gradient: averaged, and nothing else."""
        x, q = b.x[span], flight.message[0, span].to(b.x.dtype, copy=True)
        for k, w in enumerate(peers.weights):
            x.add_(flight.received[k, 0, span].to(x.dtype) - q, alpha=w)
