"""The methods as their papers state them: dense averages `W @ X`, float64, all workers at once.

Nothing here is shared with the package. Its kernels, CPU passes and simulator run one text, the rule's two equations
written with pulls, so they cannot check each other; this file can check all of them.

    J g                        the exact mean of the workers' gradients (all-reduce)
    combine(d) = W (x - d)     adapt then combine (atc)
               = W x - d       adapt while communicating (awc)

    psgd        x  = x - lr J g
    pmsgd       m  = beta m + J g;  x = x - lr m
    dsgd        x  = combine(lr g)
    dmsgd       m  = beta m + g;  x = combine(lr m)
    da-dmsgd    m~ = beta m + g;  x = W (x - lr m~);  m = W m~
    awc-dmsgd   m  = beta m + g;  x = W x - lr m
    qg-dmsgd    x+ = combine(lr (beta m + g));  m = mu m + (1 - mu) (x - x+) / lr;  x = x+
    decentlam   g~ = (x - combine(lr g)) / lr;  m = beta m + g~;  x = x - lr m
    pc-dmsgd    u  = beta m + g;  x+ = combine(lr u);  p = (1 - e/kappa) p + e (x+ - (x - lr u)) / den
                m  = u - p;  x = x+
"""

import numpy as np


def run(method, Ws, grad, x0, lrs, momentum, weight_decay, *, steps, schedule="atc", **hyper):
    """Every worker's parameters before and after each of `steps` steps, [steps + 1, n, d].

    Ws(step) is the mixing matrix, lrs(step) the learning rate, grad(step, x) the gradients [n, d] without weight decay.
    hyper: `mu` (default momentum) of qg-dmsgd; `correction_rate` (a number) and `correction_gain` of pc-dmsgd.
    """
    if schedule not in ("atc", "awc") or (schedule == "awc" and method in ("psgd", "pmsgd", "da-dmsgd")):
        raise ValueError(f"{method} has no schedule {schedule!r}")
    x = np.array(x0, dtype=np.float64)
    n, beta = len(x), momentum
    J = np.full((n, n), 1 / n)
    m, p = np.zeros_like(x), np.zeros_like(x)
    lr_max, lr_mean = 0.0, None
    trajectory = [x]
    for k in range(steps):
        W, lr = Ws(k), lrs(k)
        lr_max = max(lr_max, lr)
        literal = 0 < lr >= lr_max / 100  # elsewhere the division by lr is bounded: by lr_max / 100, and 0 at lr = 0
        inverse = 100 / lr_max if lr > 0 else 0.0
        local = grad(k, x)
        g = local + weight_decay * x

        def combine(d, W=W, x=x):
            return W @ (x - d) if schedule == "atc" else W @ x - d

        if method == "psgd":
            x = x - lr * (J @ local + weight_decay * x)
        elif method == "pmsgd":
            m = beta * m + J @ local + weight_decay * x
            x = x - lr * m
        elif method == "dsgd":
            x = combine(lr * g)
        elif method == "dmsgd":
            m = beta * m + g
            x = combine(lr * m)
        elif method == "da-dmsgd":
            u = beta * m + g
            x, m = W @ (x - lr * u), W @ u
        elif method == "awc-dmsgd":
            m = beta * m + g
            x = W @ x - lr * m
        elif method == "qg-dmsgd":
            mu = hyper.get("mu", beta)
            u = beta * m + g
            moved = combine(lr * u)
            step = (x - moved) / lr if literal else u + inverse * (x - lr * u - moved)
            x, m = moved, mu * m + (1 - mu) * step
        elif method == "decentlam":
            mixed = combine(lr * g)
            if literal:
                m = beta * m + (x - mixed) / lr
                x = x - lr * m
            else:
                x, m = mixed - lr * beta * m, beta * m + g + inverse * (x - lr * g - mixed)
        elif method == "pc-dmsgd":
            e, gain = hyper["correction_rate"], hyper.get("correction_gain", 10.0)
            lr_mean = lr if lr_mean is None else (1 - e) * lr_mean + e * lr
            den = max(lr, lr_mean, lr_max / 100)
            u = beta * m + g
            moved = combine(lr * u)
            p = (1 - e / gain) * p + (e / den * (moved - (x - lr * u)) if den > 0 else 0.0)
            x, m = moved, u - p
        else:
            raise ValueError(f"unknown method {method!r}")
        trajectory.append(x)
    return np.stack(trajectory)


def auto_rate(momentum, rho):
    """What `correction_rate="auto"` promises; rho is the contraction of disagreement per step."""
    return min((1 - momentum) / 10, (1 - momentum) ** 2, (1 - momentum) * (1 - rho))


class LeastSquares:
    """Worker i minimizes |A_i x - b_i|^2 / (2 rows), b_i = A_i x_i + noise: every worker has its own solution x_i.

    Called as grad(step, x). `gradient_noise` adds a normal draw that depends on the step alone, so that two runs see
    the same gradients. `optimum` minimizes the mean of the workers' losses.
    """

    def __init__(self, n, d=3, rows=12, spread=1.0, label_noise=0.1, gradient_noise=0.0, seed=0):
        rng = np.random.default_rng(seed)
        A = rng.standard_normal((n, rows, d))
        solutions = rng.standard_normal(d) + spread * rng.standard_normal((n, d))
        b = (A @ solutions[..., None])[..., 0] + label_noise * rng.standard_normal((n, rows))
        self.H = A.transpose(0, 2, 1) @ A / rows
        self.c = (A.transpose(0, 2, 1) @ b[..., None])[..., 0] / rows
        self.optimum = np.linalg.solve(self.H.mean(axis=0), self.c.mean(axis=0))
        self.noise = gradient_noise * rng.standard_normal((64, n, d))

    def __call__(self, step, x):
        return (self.H @ x[..., None])[..., 0] - self.c + self.noise[step % 64]

    def error(self, trajectory):
        """Mean over the workers of |x_i - optimum|^2 / |optimum|^2, one number per step."""
        return ((trajectory - self.optimum) ** 2).sum(-1).mean(-1) / (self.optimum**2).sum()
