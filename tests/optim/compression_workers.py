"""What test_compression.py runs on its workers: quadratics over one parameter of whole blocks, or over several."""

import io
import time

import torch
from workers import machines_of

import fused_dlam
from fused_dlam.layers import TopK


def averaging(n):
    return fused_dlam.topology.ring(n).with_global_average(4)


LR, D = 0.05, 2048  # whole blocks of every codec: so a bucket's blocks are those of a row in the simulator


class Quadratic:
    """f_i(x) = sum c_i (x - t_i)^2 / 2, of which every worker has another."""

    def __init__(self, rank, dtype, shapes=((D,),)):
        common, own = (torch.Generator().manual_seed(seed) for seed in (5, 50 + rank))

        def draw(generator, make=torch.randn):
            return [make(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]

        self.params = [torch.nn.Parameter(start) for start in draw(common)]
        self.t, self.c = draw(own), [0.5 + value for value in draw(own, torch.rand)]

    def loss(self):
        return sum((c * (p - t) ** 2).sum() / 2 for p, t, c in zip(self.params, self.t, self.c, strict=True))

    @property
    def x(self):
        return torch.cat([p.detach().double().reshape(-1) for p in self.params])


SEVERAL = ((33, 40), (7,), (3, 500), (1,), (2000,))


def build(problem, kind, options, lr=LR):
    if kind == "gossip":
        return fused_dlam.Gossip(torch.optim.SGD(problem.params, lr=lr, momentum=0.9), **options)
    return fused_dlam.GossipSGD(problem.params, lr=lr, **options)


def run(problem, optimizer, steps, silent=(), path=None):
    """silent: (step, number of a parameter that gets no gradient in it)."""
    for step in range(steps):
        optimizer.zero_grad()
        problem.loss().backward()
        for k, i in silent:
            if k == step:
                problem.params[i].grad = None
        optimizer.step()
        if path is not None:
            path.append(problem.x)
    return problem.x


def trained(rank, cases):
    """For each (kind, options, type, shapes): every step's parameters, bytes sent, and what was remembered."""
    out = []
    for kind, options, dtype, shapes in cases:
        problem, path = Quadratic(rank, dtype, shapes), []
        optimizer = build(problem, kind, options)
        run(problem, optimizer, 25, silent=((3, 0), (4, 0)) if rank == 1 and len(shapes) > 1 else (), path=path)
        kept = [b.compressed.kept for b in optimizer._engine.buckets if b.compressed is not None]
        out.append((torch.stack(path), optimizer.bytes_sent, kept))
        optimizer.close()
    return out


def means(rank, compress, steps):
    """float32: this worker's parameters and momentum after many steps whose gradients do not depend on them."""
    x = torch.nn.Parameter(torch.linspace(-1, 1, D))
    optimizer = fused_dlam.GossipSGD([x], lr=0.01, compress=compress)
    gradients = torch.randn(20, D, generator=torch.Generator().manual_seed(rank)) * 0.1
    sizes = []
    for k in range(steps):
        x.grad = gradients[k % 20].clone()
        optimizer.step()
        sizes.append(float(x.detach().abs().max()))
    return x.detach().double(), gradients.double(), max(sizes)


def resumed(rank, cases):
    """For each (kind, options, type): an uninterrupted run, one through a file, one from the mean, and what it has."""
    out = []
    for kind, options, dtype in cases:
        problem = Quadratic(rank, dtype, SEVERAL)
        optimizer = build(problem, kind, options)
        run(problem, optimizer, 7)
        file = io.BytesIO()
        values = [p.detach().clone() for p in problem.params]
        torch.save(optimizer.state_dict(), file)
        with optimizer.averaged():
            mean, center = optimizer.consensus_state_dict(), [p.detach().clone() for p in problem.params]
        whole = run(problem, optimizer, 7)

        def again(state, at, kind=kind, options=options, dtype=dtype):
            other = Quadratic(rank, dtype, SEVERAL)
            optimizer = build(other, kind, options)
            run(other, optimizer, 2)  # it remembers something else
            optimizer.synchronize()
            with torch.no_grad():
                for p, value in zip(other.params, at, strict=True):
                    p.copy_(value)
            optimizer.load_state_dict(state)
            return other, optimizer

        state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        back = run(*again(state, values), 7)
        other, optimizer = again(mean, center)
        kept = [t[: b.flags.start].clone() for b in optimizer._engine.buckets for t in b.compressed.kept.values()]
        x = [b.x[: b.flags.start].clone() for b in optimizer._engine.buckets]
        names = sorted({name for s in mean["state"].values() for name in s})
        run(other, optimizer, 3)
        out.append((whole, back, kept, x, names, other.x))
    return out


def not_finite(rank, compress):
    """A NaN in one element of rank 0's parameter, after two steps."""
    problem = Quadratic(rank, torch.float32)
    optimizer = build(problem, "sgd", {"compress": compress})
    run(problem, optimizer, 2)
    if rank == 0:
        with torch.no_grad():
            problem.params[0][5] = torch.nan
    run(problem, optimizer, 6)
    return problem.x, [t.isfinite().all().item() for b in optimizer._engine.buckets for t in b.compressed.kept.values()]


def machines(rank, cases, size=2):
    """For each of `cases`, options: the parameters, and what is remembered, where `size` ranks are a worker."""
    out = []
    for options in cases:
        problem = Quadratic(rank, torch.float32, SEVERAL)
        with machines_of(size):
            optimizer = build(problem, "sgd", {"hierarchical": True, **options})
        run(problem, optimizer, 9)
        kept = [t.clone() for b in optimizer._engine.buckets for t in b.compressed.kept.values()]
        out.append((problem.x, kept, optimizer.bytes_sent))
    return out


def everything_else(rank, compress):
    """Options that meet compressed messages; each ends with finite parameters, the distance and what is remembered."""
    out = {}

    def done(name, problem, optimizer):
        kept = [dict(b.compressed.kept) for b in optimizer._engine.buckets]
        out[name] = (float(problem.x.isfinite().all()), optimizer.consensus_distance(), kept)
        optimizer.close()

    problem = Quadratic(rank, torch.float32, SEVERAL)
    problem.params[2].requires_grad_(False)
    optimizer = build(problem, "sgd", {"compress": compress, "bucket_mb": 1e-4})
    run(problem, optimizer, 4)
    problem.params[2].requires_grad_(True)
    run(problem, optimizer, 4)
    done("frozen, then not", problem, optimizer)

    problem = Quadratic(rank, torch.float32, SEVERAL)
    optimizer = build(problem, "sgd", {"compress": compress, "local_steps": True})
    for _ in range(4):
        for _ in range(rank % 2):
            optimizer.zero_grad()
            problem.loss().backward()
            optimizer.local_step()
        run(problem, optimizer, 1)
    done("local steps", problem, optimizer)

    problem = Quadratic(rank, torch.float32, SEVERAL)
    optimizer = build(problem, "sgd", {"compress": compress})
    with optimizer.join():
        run(problem, optimizer, 3 + rank % 2)
    done("join", problem, optimizer)

    problem = Quadratic(rank, torch.float32, SEVERAL)
    optimizer, scaler = build(problem, "sgd", {"compress": compress}), fused_dlam.GradScaler("cpu", init_scale=2.0**8)
    for step in range(5):
        optimizer.zero_grad()
        loss = problem.loss() * (1e36 if rank == 1 and step == 2 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    done("loss scale", problem, optimizer)

    problem = Quadratic(rank, torch.float32, SEVERAL)
    optimizer = build(problem, "sgd", {"compress": compress, "topology": "one-peer-hypercube", "skip_late": 20.0})
    run(problem, optimizer, 5)
    done("skip_late", problem, optimizer)
    return out


def disagreeing(rank):
    """The error where ranks have other codecs, or other values of one."""
    errors = []
    for mine, others in (("int8", None), (TopK(0.25), "topk")):
        problem = Quadratic(rank, torch.float32)
        try:
            build(problem, "sgd", {"compress": mine if rank == 1 else others})
            errors.append("no error")
        except ValueError as error:
            errors.append(str(error))
    return errors


def left_out(rank, compress):
    """Pairs, of which one is late in step 2 for sure: the parameters, and what was left out."""
    problem = Quadratic(rank, torch.float64)
    options = {"compress": compress, "topology": "one-peer-hypercube", "skip_late": 0.3, "method": "dmsgd"}
    optimizer = build(problem, "sgd", options)
    for step in range(6):
        optimizer.zero_grad()
        problem.loss().backward()
        if step == 2 and rank == 0:
            time.sleep(2.0)
        optimizer.step()
    skipped = optimizer.skipped
    kept = {name: t.clone() for b in optimizer._engine.buckets for name, t in b.compressed.kept.items()}
    return problem.x, skipped, kept, torch.cat([t.reshape(-1) for t in problem.c]), torch.cat(problem.t)


def thawed(rank, compress):
    """At rate 0, where pulls alone act: the largest change of a layer that thaws, that of any when one rank has cleared
    the optimizer's state, and how far the workers are apart some steps later."""
    problem = Quadratic(rank, torch.float32, SEVERAL)
    frozen = problem.params[4]
    frozen.requires_grad_(False)
    optimizer = build(problem, "sgd", {"compress": compress}, lr=0.0)
    run(problem, optimizer, 2)
    with torch.no_grad():
        frozen.add_(torch.rand(frozen.shape, generator=torch.Generator().manual_seed(rank)), alpha=0.005)
    frozen.requires_grad_(True)
    moved = []
    for step in range(2):
        before = problem.x
        if step == 1 and rank == 1:
            optimizer.state.clear()
        run(problem, optimizer, 1 + 2 * step)
        moved.append(float((problem.x - before).abs().max()))
    run(problem, optimizer, 20)
    return (*moved, optimizer.consensus_distance())
