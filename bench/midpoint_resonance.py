"""The largest correction rate of MI-DmSGD that no schedule of learning rates can pump, certified, beside the default.

Run by bench/midpoint_schedules.py. theory/README.md has the theorems.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np

from fused_dlam import Topology, rules, topology
from fused_dlam.theory.stability import consensus_growth
from fused_dlam.tools.plain import table

MI = rules.get("mi-dmsgd")


def graphs() -> dict[str, Topology]:
    one_peer = topology.one_peer_exponential
    return {
        **{f"one-peer {n}": one_peer(n) for n in (8, 16, 32)},
        "one-peer 16, every 4": one_peer(16).every(4),
        "matchings 16": topology.get("random-match", 16),
        "exponential 16": topology.exponential(16),
        "one-way ring 8": Topology(topology.circulant(8, [1]), "one-way ring"),
        "grid 16": topology.get("grid", 16),
        "ring 16": topology.ring(16),
        "ring 64": topology.ring(64),
    }


def quadratic(Ws: list[np.ndarray], e: float, gain: float = math.inf, periods: int = 400) -> bool:
    """Whether some quadratic V_t = <x, A_t x> + |p/e - x|^2 never grows without gradients, under any schedule.

    Every quadratic one has this form, for a pause keeps p/e - x and makes x vanish. The step at full rate asks most of
    A_t, namely at least a Riccati step back from A_{t+1}. That is monotone: from 0 it converges, or there is no V.
    """
    one, A, leaky = np.eye(len(Ws[0])), np.zeros_like(Ws[0]), e * (1 + 1 / gain)
    for _ in range(periods):
        before = A
        for W in reversed(Ws):
            B = (W + one) / 2
            left = leaky * (2 - leaky) * one - e * e * B.T @ A @ B
            if np.linalg.eigvalsh(left).min() <= 1e-12:
                return False
            C = e * W.T @ A @ B + leaky * one
            A = W.T @ A @ W + C @ np.linalg.solve(left, C.T)
        if abs(A - before).max() <= 1e-8 * abs(A).max():
            return True
    return False


def on_differences(top: Topology) -> list[np.ndarray]:
    Q = np.linalg.qr(np.column_stack([np.ones(top.n), np.eye(top.n)[:, 1:]]))[0][:, 1:]
    return [Q.T @ phase.dense() @ Q for phase in top.phases]


def largest(holds: Callable[[float], bool], high: float = 2.0, halvings: int = 14) -> float:
    low = 0.0
    for _ in range(halvings):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def full_step(mu: float, e: float, gain: float) -> np.ndarray:
    """A step at full rate of (x, w = p/e - x) where W is 1 - mu. At rate 0: x by 1 - mu, and w stays."""
    return np.diag([1 - mu, 1.0]) + e * np.outer([1 - mu / 2, -(1 + 1 / gain)], [1, 1])


def polygon(mus: list[float], e: float, gain: float, limit: int = 1500) -> bool:
    """Whether a polygon of (x, w), found from the images of its corners, is mapped into itself under every schedule.

    Steps are linear in the rate, in mu and in their product. So the corners suffice for all rates and for all mu
    between those given, and since steps only depend on e times the rate, for all smaller e.
    """
    from scipy.spatial import ConvexHull

    on = np.concatenate([full_step(mu, e, gain) for mu in mus])
    off = [0.0, *(1 - mu for mu in mus if mu > 1)]  # x in a pause, in the end or for once
    corners = np.array([[0, 1.0], [0, -1], [0.3, 0], [-0.3, 0]])
    for _ in range(limit):
        images = (1 + 1e-9) * (corners @ on.T).reshape(-1, 2)
        images = np.concatenate([images, *(v * [f, 1] for f in off for v in (images, corners))])
        faces = ConvexHull(corners).equations
        outside = (images @ faces[:, :2].T + faces[:, 2]).max(axis=1) > 1e-12
        if not outside.any() or abs(images).max() > 20:
            return not outside.any()
        corners = np.concatenate([corners, images[outside], -images[outside]])
        corners = corners[ConvexHull(corners).vertices]
    return False


def pumped(mu: float, e: float, gain: float) -> bool:
    """Whether long pauses and bursts of some length make w grow: a pause leaves x = 0, and w."""
    v, step = np.array([0.0, 1.0]), full_step(mu, e, gain)
    for _ in range(int(8 / math.sqrt(e * mu)) + 10):
        v = step @ v
        if abs(v[1]) > 1:
            return True
    return False


def resonance() -> None:
    print(
        "\nResonance where W is symmetric and static, on its eigenvalue 1 - mu: e / mu up to which no pauses pump."
        "\nA quadratic V exists up to 1, the V of theory/README.md up to 2, a polygon to 98 % of the first column?"
    )
    rows = []
    for mu in (0.001, 0.01, 0.03, 0.1, 0.25, 0.5):
        limits = [largest(lambda e, at=(mu, g): not pumped(at[0], e, at[1]), halvings=25) for g in (math.inf, 300, 10)]
        certified = str(polygon([mu], 0.98 * limits[0], math.inf)) if mu >= 0.01 else ""
        rows.append([f"{mu:g}", *(f"{e / mu:.2f}" for e in limits), certified])
    print(table(["mu", "gain inf", "300", "10", "polygon"], rows))
    for gain in (math.inf, 300):
        mus = [*np.geomspace(5e-3, 1, 40), *np.linspace(1, 1.995, 11)[1:]]
        pairs = list(zip(mus, mus[1:], strict=False))
        held = sum(polygon([low, high], min(0.5, 2 * min(high, 2 - low)), gain) for low, high in pairs)
        print(
            f"e = min(1/2, 2 mu, 2 (2 - mu)), gain {gain:g}: polygons for {held} of {len(pairs)} ranges of mu, which"
            " cover .005 to 1.995"
        )
    print(
        "\nOther graphs: the largest e with a quadratic V under any schedule, and the largest stable at a constant rate"
    )
    rows = []
    more = {
        "exponential 8": topology.exponential(8),
        "hypercube 16": topology.get("one-peer-hypercube", 16),
        "base-k 12": topology.get("base-k", 12),
        "average every 8": topology.full(8).every(8),
    }
    for name, top in (graphs() | more).items():
        if top.is_static:
            continue
        if top.period is None:
            top = Topology([top.weights(k) for k in range(256)], name)  # its first steps, over and over
        auto = rules.auto_displacement_rate(0.9, top.slowest_rho, top.is_static)
        V = largest(partial(quadratic, on_differences(top), gain=300), halvings=10)
        steady = largest(lambda e, top=top: consensus_growth(MI, top, 0.9, correction_rate=e) < 1, 1.0, 10)
        rows.append([name, f"{auto:.4f}", f"{V:.4f}", f"{steady:.3f}", f"{V / auto:.2f}"])
    print(table(["", "default e", "quadratic V", "constant rate (<= 1)", "V / default"], rows))
