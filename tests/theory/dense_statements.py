"""Every linear method as its paper states it, on quadratics, as one dense matrix over a period of the topology.

Nothing here is shared with the package: averages are W @ y, lr is 1, the gradients are h * x. `combine(d)` is
W (x - d) under adapt then combine, W (x - d/2) - d/2 at the midpoint, W x - d under adapt while communicating.
"""

import numpy as np
import oracle

SHARE = {"atc": 1.0, "midpoint": 0.5, "awc": 0.0}
ALL_SCHEDULES = ("atc", "midpoint", "awc")
#: The schedules of every linear gossip method.
SCHEDULES = {
    "dsgd": ALL_SCHEDULES,
    "dmsgd": ALL_SCHEDULES,
    "da-dmsgd": ("atc",),
    "awc-dmsgd": ("awc",),
    "qg-dmsgd": ALL_SCHEDULES,
    "decentlam": ALL_SCHEDULES,
    "pc-dmsgd": ALL_SCHEDULES,
    "mi-dmsgd": ALL_SCHEDULES,
    "d2-dmsgd": ("atc",),
    "exact-diffusion": ("atc",),
    "gradient-tracking": ("atc",),
    "momentum-tracking": ("atc",),
    "nesterov-dmsgd": ALL_SCHEDULES,
    "nesterov-awc-dmsgd": ("awc",),
    "nesterov-qg-dmsgd": ALL_SCHEDULES,
    "nesterov-pc-dmsgd": ALL_SCHEDULES,
    "nesterov-mi-dmsgd": ALL_SCHEDULES,
}
#: How many buffers, and whether the second sums to zero over the workers.
BUFFERS = {method: 1 for method in SCHEDULES} | {"dsgd": 0}
CENTERED = ("pc-dmsgd", "mi-dmsgd", "d2-dmsgd", "exact-diffusion", "gradient-tracking", "momentum-tracking",
            "nesterov-pc-dmsgd", "nesterov-mi-dmsgd")  # fmt: skip
BUFFERS |= {method: 2 for method in CENTERED}


def step(method, schedule, W, h, values, beta, e=0.0, gain=np.inf):
    """(x, buffers) after a step, from the tuple before; arrays [..., n, columns], h of [..., n, 1]."""
    nesterov, method = method.startswith("nesterov-"), method.removeprefix("nesterov-")
    x, m, s = (*values, 0.0, 0.0)[:3]
    g, share = h * x, SHARE[schedule]

    def combine(d):
        return W @ (x - share * d) - (1 - share) * d

    u = beta * m + g
    d = g + beta * u if nesterov else u
    if method == "dsgd":
        return (combine(g),)
    if method in ("dmsgd", "awc-dmsgd"):
        return combine(d), u
    if method == "da-dmsgd":
        return W @ (x - u), W @ u
    if method == "qg-dmsgd":
        moved = combine(d)
        return moved, beta * m + (1 - beta) * (x - moved)
    if method == "decentlam":
        m = beta * m + (x - combine(g))
        return x - m, m
    if method == "pc-dmsgd":
        moved = combine(d)
        p = (1 - e / gain) * s + e * (moved - (x - d))
        return moved, u - p, p
    if method == "mi-dmsgd":
        moved = combine(d - s)
        return moved, u, (1 - e / gain) * s + e * (moved - (x - (d - s)))
    if method in ("d2-dmsgd", "exact-diffusion"):
        W = W if method == "d2-dmsgd" else (W + np.eye(W.shape[-1])) / 2
        moved = W @ (x - (u + s))  # s = x_prev - x - m_prev
        return moved, u, x - moved - u
    if method == "gradient-tracking":
        y = s + g  # s = W y_prev - g_prev
        m = beta * m + y
        return W @ (x - m), m, W @ y - g
    if method == "momentum-tracking":
        return W @ x - (u - s), u, W @ (s - u) + u
    raise ValueError(method)


def maps(method, schedule, Ws, h, beta, **hyper):
    """[cases, rows, rows]: a period from the values that can be reached, of each case's curvatures times lr in h.

    Ws: [period, n, n], or [period, cases, n, n] with matrices of each case's own. h: [cases, n]. e and gain are numbers
    or have the shape [cases, 1, 1].
    """
    cases, n = h.shape
    doubly = np.allclose(Ws.sum(axis=-2), 1)  # else no buffer sums to zero, and its conserved mean is a growth of one
    zero_sum = np.linalg.svd(np.ones((1, n)))[2][1:].T if doubly else np.eye(n)
    bases = [np.eye(n)] * (1 + min(BUFFERS[method], 1)) + [zero_sum] * (BUFFERS[method] - 1)
    rows = sum(basis.shape[1] for basis in bases)
    values, column = [np.zeros((cases, n, rows)) for _ in bases], 0
    for value, basis in zip(values, bases, strict=True):
        value[:, :, column : column + basis.shape[1]] = basis
        column += basis.shape[1]
    for W in Ws:
        values = step(method, schedule, W, h[..., None], values, beta, **hyper)
    return np.concatenate([basis.T @ value for basis, value in zip(bases, values, strict=True)], axis=1)


def growth(method, schedule, Ws, h, beta, **hyper):
    """The growth per step of each case."""
    return abs(np.linalg.eigvals(maps(method, schedule, Ws, h, beta, **hyper))).max(axis=1) ** (1 / len(Ws))


def correction(method, beta, rho, static):
    """{e, gain} that a method's documentation promises by default; rho is the topology's `slowest_rho`."""
    if method.endswith("pc-dmsgd"):
        return {"e": oracle.pull_rate(beta, rho), "gain": 10.0}
    if method.endswith("mi-dmsgd"):
        return {"e": oracle.displacement_rate(beta, rho, static), "gain": 300.0}
    return {}
