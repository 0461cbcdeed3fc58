"""MI-DmSGD under learning rates that come and go, under noise, and with the spike clip: what was left to decide.

python bench/midpoint_schedules.py                 # all tables, 6 minutes on one core
python bench/midpoint_schedules.py leak clip       # some of: leak resonance theta noise clip

leak       the leak of the integral, times lr / (the largest so far) or fixed: 35 schedules, 10 graphs
resonance  the largest correction rate that no schedule can pump, certified, beside the default
theta      the range of learning rates where curvatures differ, for four messages x + theta d
noise      whether the integral grows under gradient noise: 20,000 steps, and what theory says
clip       the bias of `clip="spikes"` under heavy-tailed noise, and its delay where training starts again
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable

import numpy as np
from midpoint_clip import clip
from midpoint_resonance import graphs, resonance

from fused_dlam import Rule, Topology, jit, rules
from fused_dlam.theory.limits import rate_limit
from fused_dlam.theory.regression import Regression
from fused_dlam.tools.plain import table

MI, PC = rules.get("mi-dmsgd"), rules.get("pc-dmsgd")
LR = 0.02


def derive_fixed_leak(h: dict, memory: dict) -> dict:
    return {**MI.derive(h, memory), "leak": 1 - h["correction_rate"] / h["correction_gain"]}


FIXED = Rule(
    "mi-dmsgd, fixed leak",
    MI.whole,
    MI.update,
    MI.state,
    hyper=MI.hyper,
    derive=derive_fixed_leak,
    centered=MI.centered,
    schedule="midpoint",
)


@jit
def send_three_quarters(x, g, s, h):
    u = h.momentum * s.momentum_buffer + (g + h.weight_decay * x)
    return (x + h.fraction * (h.share * s.correction_buffer - h.lr * u),)


THREE_QUARTERS = Rule(
    "mi-dmsgd, theta 3/4",
    send_three_quarters,
    MI.update,
    MI.state,
    hyper={**MI.hyper, "fraction": 0.75},
    derive=MI.derive,
    centered=MI.centered,
)


# -- the leak ----------------------------------------------------------------------------------------------------------


def schedules(steps: int) -> dict[str, np.ndarray]:
    """Learning rates relative to the largest, by name."""
    k, random = np.arange(steps), np.random.default_rng(0)
    cosine, warm = (1 + np.cos(np.pi * k / steps)) / 2, np.minimum(1, k / 100)

    def toggle(on, off, low):
        return np.where(k % (on + off) < on, 1.0, low)

    def restarts(T):
        return (1 + np.cos(np.pi * (k % T) / T)) / 2

    toggles = [
        (1, 1, 0),
        (1, 1, 1e-3),
        (2, 6, 0),
        (3, 1, 0.3),
        (5, 5, 1e-3),
        (10, 28, 0),
        (20, 20, 0),
        (20, 20, 0.1),
        (50, 200, 0),
        (100, 100, 1e-3),
        (65, 130, 0),
        (30, 10, 0.03),
    ]
    return {
        "constant": np.ones(steps),
        "cosine": cosine,
        "linear": 1 - k / steps,
        "warm-up": warm,
        "warm-up, cosine": warm * cosine,
        "warm-up from 1e-6, exponential": np.minimum(1, 10 ** (-6 + k / 100)),
        "one-cycle": np.where(k < 0.3 * steps, 0.04 + 0.96 * k / (0.3 * steps), (steps - k) / (0.7 * steps)),
        "warm-up, stable, decay": warm * np.minimum(1, (steps - k) / (0.2 * steps)),
        "1/sqrt": np.minimum(1, k / 50) / np.sqrt(np.maximum(1, k / 50)),
        "exponential decay": 10 ** (-3 * k / steps),
        "/10 each 500": 10.0 ** -(k // 500),
        "/2 each 200": 2.0 ** -(k // 200),
        "/100 at 500": np.where(k < 500, 1, 0.01),
        "/100, back at 1000": np.where((k >= 500) & (k < 1000), 0.01, 1),
        "restart from 1e-6": np.where((k >= 500) & (k < 1000), 1e-6, 1),
        "0 for 100 steps": np.where((k >= 700) & (k < 800), 0.0, 1),
        "0 at first": np.where(k < 100, 0.0, 1),
        "cosine restarts 50": restarts(50),
        "cosine restarts 200": restarts(200),
        "triangles 100": abs(k % 100 - 50) / 50,
        **{f"{on} on {off} off ({low:g})": toggle(on, off, low) for on, off, low in toggles},
        "random 1e-6 to 1": 10 ** random.uniform(-6, 0, steps),
        "random, 0 or 1": random.integers(2, size=steps) * 1.0,
        "random each 30 steps": np.repeat(random.choice([0, 1e-3, 0.1, 1], steps // 30 + 1), 30)[:steps],
    }


def scalars_of(rule: Rule, top: Topology, lrs: np.ndarray, momentum: float, gains: list[float | None]):
    """The step's scalars of many runs at once, field -> [steps, runs, 1]. A gain None is the method's own."""
    runs = []
    for column, gain in zip(lrs.T, gains, strict=True):
        hyper, memory = ({} if gain is None else {"correction_gain": gain}), {}
        runs.append([rule.scalars(lr, momentum, 0.0, top.slowest_rho, hyper, memory, top.is_static) for lr in column])
    values = np.array(runs, dtype=float).transpose(2, 1, 0)[..., None]
    return dict(zip(rule.H._fields, values, strict=True))


def train(rule, top, problem, lrs, noise, each: Callable, momentum=0.9, gains=None, seed=0):
    """Runs for each column of lrs and each size of noise, all at once; each(k, x, state) after every step."""
    random, runs = np.random.default_rng(seed), lrs.shape[1]
    h = scalars_of(rule, top, lrs, momentum, gains or [None] * runs)
    h = {name: np.repeat(values, len(noise), axis=1) for name, values in h.items()}
    noise = np.tile(noise, runs)[:, None]
    x = np.zeros((problem.n, len(noise), problem.d))
    state = rule.State(*(0 * x for _ in rule.state))
    for k in range(len(lrs)):
        g = problem.grad(x) + noise * random.standard_normal((problem.n, 1, problem.d))
        now = rule.H(**{name: values[k] for name, values in h.items()})
        (y,) = rule.send.fn(x, g, state, now)
        pull = top.phase(k).pull(y.reshape(problem.n, -1)).reshape(y.shape)
        x, state = rule.update.fn(x, g, state, (pull,), now)
        state = rule.State(*state)
        each(k, x, state)


def peak_and_end(rule, top, problem, lrs, noise):
    """[noise, peak or end, column of lrs]: squared disagreement at its peak, and error over the last 50 steps."""
    peak, errors, unit = np.zeros(lrs.shape[1] * len(noise)), [], (problem.optimum**2).sum()

    def each(k, x, state):
        apart = ((x - x.mean(0)) ** 2).sum(-1).mean(0) / unit
        np.fmax(peak, np.where(np.isfinite(apart), apart, np.inf), out=peak)
        if k >= len(lrs) - 50:
            errors.append(((x - problem.optimum) ** 2).sum(-1).mean(0) / unit)

    with np.errstate(all="ignore"):
        train(rule, top, problem, lrs, noise, each)
        both = np.stack([peak, np.nan_to_num(np.mean(errors, 0), nan=np.inf)])
    return both.reshape(2, -1, len(noise)).transpose(2, 0, 1)


def leak(steps: int = 1500) -> None:
    named, tops = schedules(steps), graphs()
    lrs = LR * np.stack(list(named.values()), axis=1)
    values = np.array(
        [[peak_and_end(rule, top, Regression(top.n), lrs, (0, 1)) for rule in (MI, FIXED, PC)] for top in tops.values()]
    ).swapaxes(1, 2)
    # [graph, noise 0 or 1, rule, peak or end, schedule]
    ratio, fixed, pc = (values[:, :, :, 0] < 10).sum(axis=(0, 1, 3))
    print(
        f"Leak: {len(named)} schedules x {len(tops)} graphs x noise 0 and 1, lr {LR}, {steps} steps. Disagreement's"
        f"\npeak is below 10 in {ratio} with the leak times the ratio, {fixed} fixed, {pc} PC-DmSGD, of"
        f" {2 * len(named) * len(tops)} runs. Heads: squared disagreement at its peak or error at the end, noise."
    )
    logs = np.log(np.minimum(values, 1e6))
    head = [f"{what}\n{rule}" for what in ("peak, 1", "end, 0", "end, 1") for rule in ("ratio", "fixed", "PC")]

    def cells(part):  # [noise, rule, peak or end]
        return [f"{v:.1e}" for v in np.exp([*part[1, :, 0], *part[0, :, 1], *part[1, :, 1]])]

    print(table(["mean of the graphs", *head], [[s, *cells(logs[..., k].mean(0))] for k, s in enumerate(named)]))
    print(table(["worst schedule", *head], [[g, *cells(logs[i].max(-1))] for i, g in enumerate(tops)]))


# -- the message -------------------------------------------------------------------------------------------------------


def theta(draws: int = 5) -> None:
    print("\nLargest lr x largest curvature, beta .9: equal / log-normal (geometric mean of 5) / one worker's")
    random, rows = np.random.default_rng(0), []
    for name, top in graphs().items():
        if top.n > 16 or top.period is None:
            continue
        draw = [h / h.max() for h in np.exp(random.standard_normal((draws, top.n)))]
        row, auto = [name], rules.auto_displacement_rate(0.9, top.slowest_rho, top.is_static)
        # Beyond theta = 1/2 symmetric graphs limit e, at zero gradient, to 2 (2 - mu) / (mu (2 theta - 1)).
        mu = max(1 - v.real for v in top.modes.ravel()) if top.is_static else 1.0
        whole = {"correction_rate": min(auto, (2 - mu) / mu)}
        messages = ((MI.under("atc"), whole), (THREE_QUARTERS, {}), (MI, {}), (MI.under("awc"), {}), (PC, {}))
        for rule, hyper in messages:
            limits = [rate_limit(rule, top, 0.9, c, **hyper) for c in (None, *draw, np.eye(top.n)[0])]
            row.append(f"{limits[0]:.2f} {np.exp(np.mean(np.log(limits[1:-1]))):.2f} {limits[-1]:.2f}")
        rows.append(row)
    print(table(["", "theta 1", "theta 3/4", "theta 1/2", "theta 0", "PC-DmSGD"], rows))


# -- noise -------------------------------------------------------------------------------------------------------------


def expected(top: Topology, gain: float, lr: float, momentum: float = 0.9, curvature: float = 1.0) -> list[float]:
    """The stationary rms of p and of x's disagreement, per unknown, under white noise of variance 1 at each worker."""
    n = top.n
    h = MI.scalars(lr, momentum, 0.0, top.slowest_rho, {"correction_gain": gain}, {}, top.is_static)
    x, m, p, noise = np.eye(4 * n).reshape(4, n, -1)
    covariance, sizes = np.zeros((3 * n, 3 * n)), []
    C = np.kron(np.eye(3), np.eye(n) - 1 / n)
    for k in range(4000):
        (y,) = MI.send.fn(x, curvature * x + noise, MI.State(m, p), h)
        new, buffers = MI.update.fn(x, curvature * x + noise, MI.State(m, p), (top.phase(k).pull(y),), h)
        step = C @ np.concatenate([new, *buffers])
        covariance = step[:, : 3 * n] @ covariance @ step[:, : 3 * n].T + step[:, 3 * n :] @ step[:, 3 * n :].T
        sizes.append(np.sqrt(np.diag(covariance).reshape(3, n).mean(1)))
    return [float(v) for v in np.mean(sizes[-100:], 0)[[2, 0]]]


def noise(steps: int = 20_000) -> None:
    print(
        f"\nThe integral under noise 1, lr {LR}, {steps} steps: rms of p, then of the disagreement of x, per unknown,"
        "\nin steps 1,000 to 2,000, 9,000 to 10,000, and the last 1,000; expected: theory, like data"
    )
    constant, cosine = np.ones(steps), (1 + np.cos(np.pi * np.arange(steps) / steps)) / 2
    lrs, rows = LR * np.stack([constant, constant, cosine, cosine], axis=1), []
    for name in ("one-peer 16", "matchings 16", "exponential 16", "ring 16"):
        top = graphs()[name]
        for data, spread in (("like", 0.0), ("unlike", 1.0)):
            windows = np.zeros((3, 2, 4))

            def each(k, x, state, windows=windows):
                for i, start in enumerate((1000, steps // 2 - 1000, steps - 1000)):
                    if start <= k < start + 1000:
                        both = np.stack([state.correction_buffer, x - x.mean(0)])
                        windows[i] += (both**2).mean(axis=(1, 3)) / 1000

            problem = Regression(top.n, spread=spread, label_noise=0.0)
            train(MI, top, problem, lrs, (1.0,), each, gains=[300.0, math.inf] * 2)
            for run, what in enumerate(("constant, gain 300", "constant, inf", "cosine, 300", "cosine, inf")):
                theory = expected(top, (300.0, math.inf)[run % 2], LR) if run < 2 and not spread else ["", ""]
                cells = [[f"{v:.1e}" for v in np.sqrt(windows[:, j, run])] for j in (0, 1)]
                theory = [f"{v:.1e}" if v else "" for v in theory]
                rows.append([f"{name}, {data}: {what}", *cells[0], *cells[1], *theory])
    print(table(["", "p early", "middle", "late", "x early", "middle", "late", "expected p", "x"], rows))


PARTS = {"leak": leak, "resonance": resonance, "theta": theta, "noise": noise, "clip": clip}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)}; all")
    parts = parser.parse_args(argv).parts
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no part {', '.join(unknown)}")
    for part in parts or PARTS:
        start = time.perf_counter()
        PARTS[part]()
        print(f"({part}: {time.perf_counter() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
