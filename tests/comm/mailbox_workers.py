"""What worker processes run in test_mailbox.py."""

import gc
import os
import threading
import time
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from fused_dlam import ExchangeError, Mailbox
from fused_dlam.comm.inbox import Inbox
from fused_dlam.comm.letter import Letter
from fused_dlam.comm.pairs import Pairs
from fused_dlam.comm.post import Post
from fused_dlam.comm.store import default_store
from fused_dlam.topology import Topology


def total(x, p, like):
    """The sums over all ranks of x, and of p."""
    both = torch.cat([x.double().flatten(), torch.tensor([p], dtype=torch.float64)])
    dist.all_reduce(both)
    return both[:-1].view_as(like), float(both[-1])


def schedule(rank, topology, seed, rounds=3, pace=0.004):
    """Pushes of random weights to random ranks at random times: [(lost mass, lost x) in each drained()], counts."""
    n, random = dist.get_world_size(), np.random.default_rng([seed, rank])
    x = torch.randn(257, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    start, _ = total(x, 1.0, x)
    box, p, sent, full = Mailbox(x, topology, timeout=60.0), 1.0, 0, 0
    lost = []

    def collect():
        nonlocal x, p
        dx, dp = box.collect()
        x, p = x + dx, p + dp

    def look():
        collect()
        now, mass = total(x, p, x)
        lost.append((abs(mass - n), float((now - start).abs().max())))

    for _ in range(rounds):
        for step in range(int(random.integers(10, 60))):  # unequal numbers of steps, at unequal paces
            time.sleep(pace * random.random() * (1 + 4 * (rank == 0)))
            if random.random() < 0.7:
                collect()
            weight, to = float(random.random()), int(random.choice(box.destinations))
            if box.push(x, p, weight, step, to=None if random.random() < 0.5 else to):
                x, p = x * (1 - weight), p * (1 - weight)
                sent += 1
            else:
                full += 1
        with box.drained():
            look()
    box.close()
    look()
    return lost, sent, full


def schedules(rank, topologies, seeds):
    return [schedule(rank, topology, seed) for topology in topologies for seed in seeds]


def consensus(rank, steps=200):
    """Asynchronous push-sum, rank 0 five times slower: distance from the mean, relative, and what is lost of it."""
    x, n = torch.randn(10, dtype=torch.float64, generator=torch.Generator().manual_seed(rank)), dist.get_world_size()
    (start, _), p = total(x, 1.0, x), 1.0
    mean = start / n
    box, slower = Mailbox(x, "one-peer-exponential", timeout=60.0), 5 if rank == 0 else 1
    store, step = default_store("consensus"), 0
    while store.add("through", int(step == steps // slower)) < n:  # until all have taken their steps
        step += 1
        time.sleep(0.004 * slower)
        dx, dp = box.collect()
        x, p = x + dx, p + dp
        if box.push(x, p, step=step):
            x, p = x / 2, p / 2
    box.close()
    dx, dp = box.collect()
    x, p = x + dx, p + dp
    now, mass = total(x, p, x)
    return float((x / p - mean).norm() / mean.norm()), abs(mass - n), float((now - start).abs().max())


def full_slot(rank):
    """Rank 1 reads nothing for a while: what rank 0's pushes to it return, and what has come in the end."""
    x = torch.arange(5.0)
    box, told = Mailbox(x, "ring", timeout=60.0), []
    if rank == 1:
        box._inbox.lock.acquire()
    dist.barrier()
    if rank == 0:
        told.append(box.push(x, 1.0, 0.5, 7, to=1))
        end = time.monotonic() + 30
        while not box.push(x, 1.0, 0.25, 8, to=1) and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(0.2)  # its head is taken, and there is no place for its body
        told += [box.push(x, 1.0, 0.125, 9, to=1), box.push(x, 1.0, 0.125, 9, to=3)]
    dist.barrier()
    if rank == 1:
        box._inbox.lock.release()
    with box.drained():
        came = box.collect()
        again = box.collect()
    box.close()
    return told, came, again, box.steps


def puts(rank):
    """`latest`, `steps`, `age` and `wait`, with messages that are put and got."""
    n = dist.get_world_size()
    like = [torch.zeros(2, 3), torch.zeros(()), torch.zeros(0)]
    box, left = Mailbox(like, "one-way-ring", timeout=60.0), (rank - 1) % n
    assert box.latest(left) is None and box.steps == {left: -1}
    found = {"early": box.wait(1, 0, deadline=0.05)}
    dist.barrier()
    for step in range(3):
        while not box.push(
            [torch.full((2, 3), 10.0 * rank + step), torch.tensor(float(step)), like[2]], 1.0, 1.0, step
        ):
            time.sleep(0.001)
        found[step] = box.wait(1, step, deadline=60.0)
        message = box.latest(left)
        assert message.step >= step and message.mass == 1.0 and 0 <= message.age <= box.age[left] < 60
    found["never"] = box.wait(1, 99, deadline=0.05)
    box.close()
    message = box.latest(left)
    (matrix, number, nothing), mass = box.collect()
    assert nothing.shape == (0,)
    return found, message.tensor[:2], message.step, matrix, number, mass


def bits(rank, name):
    """16-bit messages are summed in float32: (the sum, what it must be). Each rank sends its own three times."""
    n, dtype = dist.get_world_size(), getattr(torch, name)
    values = [torch.randn(1001, generator=torch.Generator().manual_seed(j)).to(dtype) for j in range(n)]
    box = Mailbox(values[rank], "full", timeout=60.0)
    for _ in range(3):
        for j in box.destinations:
            while not box.push(values[rank], weight=1.0, to=j):
                time.sleep(0.001)
    box.close()
    came, mass = box.collect()
    exact = 3 * sum(values[j].double() for j in range(n) if j != rank)
    return came.dtype, float((came.double() - exact).abs().max()), mass


def wrong(rank):
    """(kind, text) of what wrong calls raise; that the mailbox works after each of them."""
    told = []

    def note(call):
        try:
            call()
            told.append(("nothing", ""))
        except Exception as error:
            told.append((type(error).__name__, str(error)))

    x = torch.zeros(3)
    note(lambda: Mailbox(torch.zeros(3, dtype=torch.int64), "ring"))
    note(lambda: Mailbox([torch.zeros(3), torch.zeros(3, dtype=torch.float64)], "ring"))
    note(lambda: Mailbox([], "ring"))
    note(lambda: Mailbox(x, "ring", on_loss="ignore"))
    note(lambda: Mailbox(x, "ring", timeout=0))
    note(lambda: Mailbox(torch.zeros(3 + (rank == 1)), "ring", timeout=60.0))
    note(lambda: Mailbox(x, "ring" if rank else "one-way-ring", timeout=60.0))
    box = Mailbox(x, "one-way-ring", timeout=60.0)
    right, left = (rank + 1) % 4, (rank - 1) % 4
    note(lambda: box.push(torch.zeros(4)))
    note(lambda: box.push(torch.zeros(3, dtype=torch.float64)))
    note(lambda: box.push([x]))
    note(lambda: box.push(x, to=left))
    note(lambda: box.push(x, weight=float("nan")))
    note(lambda: box.push(x, step=-1))
    note(lambda: box.latest(right))
    note(lambda: box.wait(2, 0, 1.0))
    with box.drained():
        note(lambda: box.push(x))
        note(lambda: box.drained().__enter__())
    end = time.monotonic() + 30  # it may take a moment until it is known that the neighbor is out of drained()
    while not (pushed := box.push(x + 1, weight=1.0, to=right)) and time.monotonic() < end:
        time.sleep(0.001)
    box.close()
    box.close()
    note(lambda: box.push(x))
    note(lambda: box.drained().__enter__())
    return told, pushed, box.collect()


def in_turn(rank):
    """Threads, and open files, after 2 and after 6 mailboxes: closed, or let go."""
    counts = []
    for k in range(6):
        box = Mailbox(torch.zeros(100), "one-peer-exponential", timeout=60.0)
        box.push(torch.ones(100))
        if k % 2:
            box.close()
        del box
        gc.collect()
        end = time.monotonic() + 30
        while any("mailbox" in t.name for t in threading.enumerate()) and time.monotonic() < end:
            time.sleep(0.01)
        dist.barrier()
        if k in (1, 5):
            counts.append((threading.active_count(), len(os.listdir("/proc/self/fd"))))
    return counts


def left_alone(rank):
    """Rank 1 lets go of its mailbox: what the others' next calls come to, with on_loss= "raise" and "continue"."""
    told = {}
    for on_loss in ("raise", "continue"):
        box = Mailbox(torch.ones(3), "ring", timeout=60.0, on_loss=on_loss)
        dist.barrier()
        if rank == 1:
            del box
            gc.collect()
            continue
        errors, end = [], time.monotonic() + 30
        sees = 1 in (*box.sources, *box.destinations)
        while not (errors if on_loss == "raise" else box.lost) and sees and time.monotonic() < end:
            time.sleep(0.002)
            try:
                box.collect()
            except ExchangeError as error:
                errors.append((error.peer, error.lost, error.call, str(error)))
        told[on_loss] = errors, box.lost, box.push(torch.ones(3), to=1) if sees else None
        with box.drained():  # of those that are left
            pass
        box.close()
    return told


def unequal(rank):
    """Rank 3 enters drained() late, and stays until the others are out again: when all entered, whom they find full."""
    x = torch.ones(3)
    box = Mailbox(x, "full", timeout=60.0)
    dist.barrier()
    if rank == 3:
        time.sleep(0.2)
    called = time.monotonic()
    with box.drained():
        entered = time.monotonic()
        if rank == 3:
            dist.barrier()
    pushed = None
    if rank != 3:
        pushed = box.push(x, to=3)
        dist.barrier()
    with box.drained():
        box.collect()
    if rank != 3:  # it may take a moment until it is known that 3 is out again
        end = time.monotonic() + 30
        while not box.push(x, weight=1.0, to=3) and time.monotonic() < end:
            time.sleep(0.001)
    box.close()
    return called, entered, pushed, box.collect()[1]


def who_does_not_come(rank):
    """Rank 2 does not enter drained() in time: what the others are told, and that all close it together later."""
    box, told = Mailbox(torch.ones(3), lambda n: Topology(np.full((n, n), 1 / n), "mine"), timeout=60.0), None
    box._post.timeout = 1.0
    if rank != 2:
        try:
            with box.drained():
                pass
        except ExchangeError as error:
            told = error.peer, error.lost, error.call, str(error)
    dist.barrier()
    box.close(deadline=60.0)
    return told, box.lost


def some_gave_up(rank):
    """0-1-2-3: rank 0 is within drained() when 1 and 3 give it up, for 2 does not come. What 1 may push to 0 then, that
    it may once 0 has left, that it cannot try drained() again, and that all close it together, rank 0 last:
    (pushed, told, masses at the end, lost)."""
    W = np.eye(4) / 2 + (np.eye(4, k=1) + np.eye(4, k=-1)) / 4 + np.diag([0.25, 0, 0, 0.25])
    box, store = Mailbox(torch.ones(3), lambda n: Topology(W, "path"), timeout=60.0), default_store("some gave up")
    p, pushed, told = 1.0, None, None
    if rank == 0:
        line = box._post.lines[1]
        hand_over = line._hand_over

        def slowly(head, body=None):  # that it is within drained() comes to rank 1 after rank 1 has given it up
            time.sleep(0.3)
            hand_over(head, body)

        with mock.patch.object(line, "_hand_over", slowly), box.drained():
            store.set("inside", "")
            dist.barrier()
            dist.barrier()
            p += box.collect()[1]
    else:
        if rank != 2:
            with mock.patch.object(box._post, "wait", lambda *args: store.get("inside") is None):
                try:
                    with box.drained():
                        pass
                except ExchangeError:
                    pass
        dist.barrier()
        if rank == 1:
            pushed = box.push(torch.ones(3), p, to=0)
        dist.barrier()
        if rank != 2:
            try:
                with box.drained():
                    pass
            except RuntimeError as error:
                told = str(error)
        if rank == 1:
            end = time.monotonic() + 30
            while not box.push(torch.ones(3), p, to=0) and time.monotonic() < end:
                time.sleep(0.001)
            p /= 2
    dist.barrier()
    if rank == 0:  # the others close it meanwhile
        time.sleep(0.2)
        if box.push(torch.ones(3), p, to=1):
            p /= 2
    box.close()
    return pushed, told, total(torch.ones(3), p + box.collect()[1], torch.ones(3))[1], box.lost


def nobody_there(rank):
    """Ranks without neighbors, as in some steps of random graphs: how many groups are there more, and at the end."""
    before, letter = len(dist.distributed_c10d._world.pg_map), Letter(torch.ones(3))
    post = Post(None, 60.0, "mailbox", {}, (), (), Inbox(letter), letter)
    built = len(dist.distributed_c10d._world.pg_map) - before
    post.leave()
    post.finish()
    return built, len(dist.distributed_c10d._world.pg_map) - before


def crossed(rank):
    """Ranks 0 and 1 ask each other before either reads: what both have then."""
    x = torch.full((3,), float(rank), dtype=torch.float64)
    pairs, both = Pairs(x, "full", timeout=60.0), threading.Event()
    read = pairs._shared.read
    with mock.patch.object(pairs._shared, "read", lambda *args: (both.wait(60.0), read(*args))):
        dist.barrier()
        asked = rank > 1 or pairs.ask(1 - rank)
        dist.barrier()
        both.set()
        with pairs.drained():
            out = pairs.read()
    pairs.close()
    return asked, out


def page(rank, text):
    """Runs a page's example: (mean, the number of ranks, what its checkpoint has of x and of p)."""
    names = {"rank": rank, "time": time}
    exec(text, names)
    checkpoint = names["checkpoint"]
    return names["mean"], dist.get_world_size(), total(checkpoint["x"], checkpoint["p"], checkpoint["x"])


def trained_by_the_page(rank, text, folder):
    """Runs the page's second example, with unequal numbers of batches: whether what it saved is what a worker has."""
    import fused_dlam

    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    x = torch.randn(10 + 10 * rank, 8, 4, generator=torch.Generator().manual_seed(rank))
    names = {
        "torch": torch, "PushSum": fused_dlam.PushSum, "model": model, "rank": rank, "folder": folder,
        "batches": [(batch, batch.sum(1, keepdim=True)) for batch in x], "loss": torch.nn.functional.mse_loss,
        "evaluate": lambda m: means.append(m.weight.detach().clone()),
    }  # fmt: skip
    means = []
    exec(text, names)
    weights, state = torch.load(f"{folder}/rank{rank}.pt")
    return means[0], torch.equal(weights["weight"], model.weight), state["push_sum"]["step"], state["push_sum"]["mass"]
