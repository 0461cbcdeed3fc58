"""What test_outer_edges.py runs on its workers: small scripts over one parameter with gradients that are told."""

import contextlib
import types
from unittest import mock

import torch
import workers

import fused_dlam
from fused_dlam import Gossip
from fused_dlam.comm.transfer import Transfer


def made(options, values=0.0, size=4, lr=1.0, dtype=torch.float64, inner=None):
    x = torch.nn.Parameter(torch.full((size,), values, dtype=dtype))
    inner = torch.optim.SGD([x], lr=lr) if inner is None else inner([x])
    return x, Gossip(inner, **options)


def step(x, optimizer, gradient=0.0):
    x.grad = None if gradient is None else torch.full_like(x, gradient)
    optimizer.step()


def rolled_back(rank, options):
    """Averages alone; then the same steps once more, from a checkpoint of earlier ones."""
    x, optimizer = made(options, lr=0.0)
    optimizer.synchronize()
    x.data.fill_(2.0**rank)
    for _ in range(2):
        step(x, optimizer)
    saved, value = optimizer.state_dict(), x.detach().clone()
    for _ in range(4):
        step(x, optimizer)
    right = x.detach().clone()
    for _ in range(2):
        step(x, optimizer)
    optimizer.synchronize()
    x.data.copy_(value)
    optimizer.load_state_dict(saved)
    for _ in range(4):
        step(x, optimizer)
    optimizer.close()
    return right.tolist(), x.tolist()


def interrupted(rank, kind, number):
    """What the steps of two workers say after rank 1 was interrupted while it sent ahead, for the `number`th time."""
    params = [torch.nn.Parameter(torch.zeros(2000, dtype=torch.float64)) for _ in range(3)]
    options = dict(schedule="awc", bucket_mb=1e-3, timeout=2.0)
    if kind == "GossipSGD":
        optimizer = fused_dlam.GossipSGD(params, lr=0.1, method="dmsgd", **options)
    else:
        inner = torch.optim.SGD(params, lr=0.1)
        optimizer = Gossip(inner, **options, **({"outer": "dsgd", "every": 3} if kind == "rounds" else {}))
    send, sent, said = Transfer.send, 0, []

    def stopping(self, message):
        nonlocal sent
        sent += optimizer._engine.ahead.goes
        if sent == number:
            sent += 1
            raise KeyboardInterrupt
        send(self, message)

    with mock.patch.object(Transfer, "send", stopping if rank == 1 else send):
        for _ in range(9):
            for p in params:
                p.grad = torch.ones_like(p)
            try:
                optimizer.step()
            except KeyboardInterrupt:
                said.append("interrupted")
            except (RuntimeError, fused_dlam.ExchangeError) as error:
                said.append(str(error))
                break
    optimizer.close()
    return said


def written_late(rank, synchronizes):
    """A parameter whose narrow message was written by the last step, and has not left, is set by the script."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.zeros(2000, dtype=torch.float64)) for _ in range(3)]
    options = dict(schedule="awc", outer="dsgd", lr=1.0, every=3, comm_dtype=torch.float32, bucket_mb=1e-3)
    optimizer = Gossip(torch.optim.SGD(params, lr=0.0), **options)

    def go(n):
        for _ in range(n):
            for p in params:
                p.grad = torch.zeros_like(p)
            optimizer.step()

    go(6)
    if synchronizes:
        optimizer.synchronize()
    with torch.no_grad():
        params[0].fill_(rank + 1.0)  # in the last bucket
    go(3)
    optimizer.close()
    return float(params[0][0])


def of_another_kind(rank):
    """Checkpoints of the inner optimizer alone, of a `Gossip` without rounds, and the other way round."""
    out = []
    for make in (
        lambda p: torch.optim.AdamW(p, lr=0.1),
        lambda p: Gossip(torch.optim.AdamW(p, lr=0.1), schedule="midpoint"),
    ):
        p = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))
        other = make([p])
        p.grad = torch.ones_like(p)
        other.step()
        saved = other.state_dict()
        x, optimizer = made({"outer": "mi-dmsgd", "every": 3}, 1.0, inner=lambda p: torch.optim.AdamW(p, lr=0.2))
        step(x, optimizer, 1.0)
        optimizer.load_state_dict(saved)
        group = optimizer.param_groups[0]
        out.append((group["lr"], group["gossip_taken"], group["outer_memory"], optimizer.steps_done))
        for _ in range(3):
            step(x, optimizer, 1.0)
        out.append(group["gossip_step"])
        rounds, done = optimizer.state_dict(), optimizer.steps_done
        optimizer.close()
        y, plain = made({"schedule": "midpoint"}, 1.0, inner=lambda p: torch.optim.AdamW(p, lr=0.2))
        plain.load_state_dict(rounds)
        assert plain.steps_done == done
        out.append(sorted(name for name in plain.param_groups[0] if "outer" in name or "taken" in name))
        plain.close()
    return out


class Apart:
    """Two workers of an outer method by all-reduce, of which the second is made unlike the first."""

    @staticmethod
    def every(x, optimizer):
        optimizer.every = 3

    @staticmethod
    def rate(x, optimizer):
        optimizer.param_groups[0]["outer_lr"] = 0.5

    @staticmethod
    def loaded(x, optimizer):
        x.data.fill_(1.01)


def apart(rank, how):
    """What the next rounds say, and the parameters after `synchronize` and a round, on both."""
    x, optimizer = made({"outer": "nesterov-pmsgd", "every": 2, "timeout": 5.0}, 1.0, lr=0.1)
    for _ in range(2):
        step(x, optimizer, 1.0)
    if rank == 1:
        getattr(Apart, how)(x, optimizer)
    said = []
    for _ in range(3 if rank == 1 and how == "every" else 2):
        try:
            step(x, optimizer, 1.0)
        except ValueError as error:
            said.append(str(error))
    optimizer.every, optimizer.param_groups[0]["outer_lr"] = 2, 0.7
    optimizer.synchronize()
    for _ in range(2):
        step(x, optimizer, 1.0)
    optimizer.close()
    return said, x.tolist()


def resumed(rank, options, at, every):
    """The steps after a checkpoint that another optimizer has loaded, which was built with every=2; and its `every`."""
    x, optimizer = made({"every": 3, **options}, 0.1 * (rank + 1), lr=0.1)
    optimizer.every = every

    def path(optimizer, x):
        out = []
        for k in range(at, at + 6):
            step(x, optimizer, torch.sin(torch.tensor(1.0 + rank + k)).item())
            out.append(x.tolist())
        return out

    for k in range(at):
        step(x, optimizer, torch.cos(torch.tensor(1.0 + rank * k)).item())
    saved, values = optimizer.state_dict(), x.detach().clone()
    right = path(optimizer, x)
    optimizer.close()
    x, again = made({"every": 2, **options}, lr=0.1)
    again.synchronize()
    x.data.copy_(values)
    again.load_state_dict(saved)
    found = again.every, path(again, x) == right
    again.close()
    return found


def saved_apart(rank, folder):
    """What saving says where rank 1 has taken an inner step more."""
    x, optimizer = made({"outer": "mi-dmsgd", "every": 4, "timeout": 20.0})
    for _ in range(5 + rank):
        step(x, optimizer, 1.0)
    try:
        fused_dlam.save_checkpoint(folder, torch.nn.ParameterList([x]), optimizer)
    except ValueError as error:
        return str(error)
    finally:
        optimizer.close()


def tried_again(rank):
    """The round's last step raises after the inner step; a checkpoint of the round's start is loaded in its place."""
    x, optimizer = made({"outer": "dmsgd", "every": 2}, lr=0.5)
    saved = optimizer.state_dict()
    step(x, optimizer, 1.0)
    optimizer.param_groups[0]["outer_momentum"] = 1.5
    try:
        step(x, optimizer, 1.0)
    except ValueError:
        pass
    optimizer.synchronize()
    x.data.zero_()
    optimizer.load_state_dict(saved)
    for _ in range(2):
        step(x, optimizer, 1.0)
    done = optimizer.steps_done
    optimizer.close()
    return done, x[0].item()


def rebuilt(rank):
    """Another optimizer around the same inner one has its own settings, and remembers nothing."""
    x = torch.nn.Parameter(torch.zeros(3))
    inner = torch.optim.SGD([x], lr=1.0)
    found = []
    for lr in (0.7, 0.1):
        optimizer = Gossip(inner, outer="mi-dmsgd", lr=lr, momentum=lr, every=2)
        group = optimizer.param_groups[0]
        found.append((group["outer_lr"], group["outer_momentum"], dict(group["outer_memory"]), group["gossip_taken"]))
        for _ in range(3):
            step(x, optimizer, 1.0)
        optimizer.close()
    return found


def joined(rank, options, batches, rate=1.0):
    """How far this rank went in each of its steps with data; what rounds counted; where it ends."""
    x, optimizer = made(options, lr=rate)
    moved, seen = [], []
    with optimizer.join():
        for _ in range(batches[rank]):
            before = x[0].item()
            step(x, optimizer, 1.0)
            moved.append(before - x[0].item())
            seen.append(optimizer.param_groups[0].get("gossip_went"))
    end = x[0].item()
    optimizer.close()
    return moved, seen, end


def joined_machines(rank, options, batches):
    with workers.machines_of(2):
        return joined(rank, {**options, "hierarchical": True}, batches)


def weighed(rank):
    """The weights of two ranks, one of which leaves a step out for an overflow."""
    x, optimizer = made({"every": 2, "local_steps": True}, dtype=torch.float32, lr=0.125)
    scaler = fused_dlam.GradScaler("cpu", init_scale=4.0)
    weights, agree = [], optimizer._rounds.agree
    optimizer._rounds.agree = lambda *a: (agree(*a), weights.append(optimizer._rounds.weight))
    for k in range(2):
        x.grad = torch.full_like(x, float("inf") if rank == 0 and k == 0 else 4.0)
        scaler.scale(torch.zeros(()))
        scaler.step(optimizer)
        scaler.update()
    optimizer.close()
    return weights


def thawed_late(rank):
    """The first step of a parameter that was frozen for 40 rounds, around one that was not, by an outer AdamW."""
    early, late = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    late.requires_grad_(False)
    inner = torch.optim.SGD([early, late], lr=1.0)
    optimizer = Gossip(inner, outer="adamw", lr=0.01, every=1, local_steps=True)

    def go():
        for p in (early, late):
            p.grad = torch.ones_like(p) if p.requires_grad else None
        optimizer.step()

    for _ in range(40):
        go()
    late.requires_grad_(True)
    go()
    saved = optimizer.state_dict()["param_groups"][0]["outer_memory"]
    optimizer.close()
    return -late[0].item(), dict(map(tuple, saved))


def every_call(rank, calls):
    return {name: globals()[fn](rank, *args) for name, (fn, *args) in calls.items()}


def loaded_within(rank, options):
    """A model is loaded in the midst of a round, after synchronize(): how far from it the next rounds end."""
    x, optimizer = made(options)
    for _ in range(4):
        step(x, optimizer, 1.0 + rank)
    optimizer.synchronize()
    x.data.fill_(100.0)
    for _ in range(4):
        step(x, optimizer)
    end = x.detach().clone()
    optimizer.synchronize()  # whose ways differ, without a load
    step(x, optimizer, float(rank))
    optimizer.synchronize()
    for _ in range(3):
        step(x, optimizer)
    again = x.tolist()
    optimizer.close()
    return end[0].item(), again


def thaws(rank, method, every, at, folder):
    """Where parameters end, of which one thaws before step 5; and with a reload before step `at`, of what was
    saved then or, at=5, of before the thaw into an optimizer over what is trainable by now. every=None: `GossipSGD`."""

    def fresh(thawed):
        early, late = (torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
        late.requires_grad_(thawed)
        params = [early, late]
        if every is None:
            return params, fused_dlam.GossipSGD(params, method=method, lr=0.01)
        return params, Gossip(torch.optim.SGD(params, lr=0.1), outer=method, lr=0.01, every=every)

    def go(params, optimizer, steps):
        for k in steps:
            if k == 5:
                params[1].requires_grad_(True)
            for p in params:
                p.grad = p.detach() * (1.0 + 0.1 * rank) - 0.2 * k if p.requires_grad else None
            optimizer.step()
        return torch.cat([p.detach() for p in params])

    params, optimizer = fresh(False)
    whole = go(params, optimizer, range(14))
    optimizer.close()
    params, optimizer = fresh(False)
    model = torch.nn.ParameterList(params)
    go(params, optimizer, range(at))
    fused_dlam.save_checkpoint(folder, model, optimizer)
    optimizer.close()
    params, optimizer = fresh(True)
    fused_dlam.load_checkpoint(folder, torch.nn.ParameterList(params), optimizer)
    again = go(params, optimizer, range(at, 14))
    optimizer.close()
    return whole.tolist(), again.tolist()


def machines_scaled(rank, kind):
    """Two machines of unlike `every`, a loss scaler each rank of its own scale, an overflow on rank 3 in its second
    step: where it ends, and its scale."""
    with workers.machines_of(2):
        every = (2, 4)[rank // 2]
        options = {"outer": "dsgd", "lr": 1.0, "every": every, "local_steps": True, "hierarchical": True}
        x, optimizer = made(options, dtype=torch.float32, lr=0.125)
    scaler = (fused_dlam.GradScaler if kind == "ours" else torch.amp.GradScaler)("cpu", init_scale=2.0 ** (4 + rank))
    for k in range(2 * every):
        scale = float(scaler.scale(torch.ones(())))
        x.grad = torch.full_like(x, float("inf") if rank == 3 and k == 1 else (rank + 1) * scale)
        if kind == "by hand":
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    optimizer.close()
    return x[0].item(), scaler.get_scale()


def quadratic(rank, x):
    """A gradient at x, of rank's own."""
    return (x - (rank + 1.0)) * (1.0 + 0.5 * rank)


def joined_unlike(rank, options, every, batches, scales=False):
    """Epochs in which ranks have unlike numbers of batches and of inner steps: where each ends, and its exchanges."""
    size = 2 if options.get("hierarchical") else 1
    with workers.machines_of(size) if size > 1 else contextlib.nullcontext():
        dtype = torch.float32 if scales else torch.float64
        x, optimizer = made({**options, "every": every[rank // size], "local_steps": True}, dtype=dtype, lr=0.1, size=3)
    scaler, ends = fused_dlam.GradScaler("cpu", init_scale=16.0, enabled=scales), []
    for counts in batches:
        with optimizer.join():
            for _ in range(counts[rank]):
                scale = float(scaler.scale(torch.ones(())))
                x.grad = quadratic(rank, x.detach()) * scale
                scaler.step(optimizer)
                scaler.update()
        ends.append((x.double().tolist(), optimizer.param_groups[0]["gossip_step"]))
    optimizer.close()
    return ends


def newcomer(rank):
    """What a worker that comes within a round takes of one that is there, of counts and of the inner optimizer's state,
    and what one has after a loss that was there too."""
    found = []
    for new in (False, True):
        options = {"outer": "nesterov-pmsgd", "topology": "full", "local_steps": True}
        adamw = lambda params: torch.optim.AdamW(params, lr=0.1)  # noqa: E731
        x, optimizer = made({**options, "every": 4}, inner=adamw)
        y, other = made({**options, "every": 5}, inner=adamw)
        for _ in range(3):
            step(x, optimizer, 1.0)
        step(y, other, 7.0)
        other._recovery = types.SimpleNamespace(empty=new)
        if new:
            other._take_rest(optimizer._rest())
        else:
            other._share_rest()
        group, kept = other.param_groups[0], other.inner.state[y]
        found.append(
            (other._rounds.counts, other.every, group["gossip_taken"], group["gossip_went"], int(kept["step"]))
        )
        other._recovery = None
        optimizer.close()
        other.close()
    return found
