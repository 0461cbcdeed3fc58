"""The caching allocators of a fake machine: where every tensor lies, and what its memory was before.

Device memory that is freed may be given out at once to what is allocated on the same stream, so whoever gets it must
come after all its readers and writers (`record_stream` apart). Pinned memory is given out again only when the copies
that read or write it have run, whatever the streams do.
"""

from __future__ import annotations

import bisect

import torch
from fake_clocks import Agent, Memory
from fake_streams import Streams
from fake_where import where
from torch.multiprocessing.reductions import StorageWeakRef


class Allocators:
    """`careless`: pinned memory is given out again as soon as it is freed."""

    def __init__(self, streams: Streams, careless: bool):
        self.streams, self.careless = streams, careless
        self.memories: list[Memory] = []  # all there ever were
        self._memories: dict[int, tuple[StorageWeakRef, Memory, int]] = {}  # by storage, with its address
        self._freed: dict[object, dict] = {}  # by pool, what memory given out from it must come after
        self._address = 1 << 20
        self._starts: list[tuple[int, int]] = []  # every address given out, in order, and its storage

    def memory(self, t: torch.Tensor) -> Memory:
        storage = t.untyped_storage()
        known = self._memories.get(storage._cdata)
        if known is None:
            self._collect()
            pool: object = self.streams.current(t.device).agent if t.is_cuda else "host"
            known = StorageWeakRef(storage), Memory(where(), t.device, pool, self._inherited(pool)), self._address
            self._address += -(-storage.nbytes() // 512) * 512 + 512
            self._memories[storage._cdata] = known
            self.memories.append(known[1])
            self._starts.append((known[2], storage._cdata))
        return known[1]

    def address(self, t: torch.Tensor) -> int:
        self.memory(t)
        return self._memories[t.untyped_storage()._cdata][2] + t.storage_offset() * t.element_size()

    def span_at(self, address: int, size: int):
        """The bytes from an address on, as in `touch`."""
        start, key = self._starts[bisect.bisect_right(self._starts, (address, float("inf"))) - 1]
        memory, offset = self._memories[key][1], address - start
        return memory, offset, offset + size

    def _inherited(self, pool: object) -> list:
        freed = self._freed.get(pool, {})
        if isinstance(pool, Agent):
            for key in [key for key, a in freed.items() if a.known_to(pool)]:
                del freed[key]
        return list(freed.values())

    def _collect(self) -> None:
        """Notes what was freed since."""
        for key in [key for key, (ref, _, _) in self._memories.items() if ref.expired()]:
            memory = self._memories.pop(key)[1]
            if isinstance(memory.pool, Agent) or (memory.pinned and self.careless):
                pool = self._freed.setdefault(memory.pool, {})
                for a in memory.left_behind():
                    # The last is enough. And what the pool's own stream knows to be over need not be kept: whoever
                    # uses the memory afterwards has to come after that stream anyway.
                    if not (isinstance(memory.pool, Agent) and a.known_to(memory.pool)):
                        pool[a.agent, a.write] = max(a, pool.get((a.agent, a.write), a), key=lambda one: one.time)
