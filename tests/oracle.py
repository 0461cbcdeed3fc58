"""The methods as their papers state them: dense averages `W @ X`, float64, all workers at once.

Nothing here is shared with the package. Its kernels, CPU passes and simulator run one text, the rule's two equations
written with pulls, so they cannot check each other; this file can check all of them.

    J g                        the exact mean of the workers' gradients (all-reduce)
    combine(d) = W (x - d)          adapt then combine (atc)
               = W (x - d/2) - d/2  midpoint
               = W x - d            adapt while communicating (awc)

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
    mi-dmsgd    u  = beta m + g;  d = lr u - rho p, rho = lr / (largest lr so far);  y = x - theta d is averaged
                x  = W y - (1 - theta) d;  p = (1 - e rho/kappa) p + e (W y - y);  m = u
    mi-adamw    the same with adamw's step in the place of lr u
    d2-dmsgd    m  = beta m + g;  x+ = combine(lr ((x_prev - x) / lr_prev + m - m_prev)), at first combine(lr m)
    exact-diffusion     the same with (W + I)/2 for W
    nids                exact diffusion, with I for W in the first step
    extra       m  = beta m + g;  x = W x - lr (m - S);  S = sum over the past of (W - (W + I)/2) x / lr
    led         m  = beta m + g;  phi = combine's own, x - lr (m + c);  x = W phi;  where W exchanges, K steps after the
                last time:  c = c + (phi - x) / (K lr)
    proxskip    the same with (W + I)/2 for W and the probability p for 1/K
    k-gt        m  = beta m + g;  z = z + (m + c);  x = W (x - lr (m + c));  where W exchanges: c = c + (W - I) z / K,
                z = 0
    gradient-tracking   y = W y_prev + g - g_prev, at first g;  m = beta m + y;  x = W (x - lr m)
    momentum-tracking   m = beta m + g;  x = W x - lr (m - c);  c = W (c - m) + m, at first 0
    push-sum    m  = beta m + g;  x = A (x - lr m);  w = A w;  the model computes with z = x / w, and g is there
    push-diging the same with m = beta m + y,  y = A y_prev + g - g_prev
    push-pull   m  = beta m + y, y as before;  z = R (z - lr m),  R = diag(1/w') A diag(w)
    adam        g = g + lambda x;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
                x = combine(lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps))
    adamw       the same with lambda x beside the fraction in place of in g
    gasloc      z = x - lr g;  x = z - alpha (z - W z) + beta (z - z_prev), at first z_prev = x
    noloco      delta = beta delta + lr W Delta - c (x - W x), Delta = -g;  x = x + delta
    nesterov-*  g + beta u in the place of u = beta m + g as the step

Layers around any of them:

    lars        g <- r (g + lambda x), r = eta |x| / (|g| + lambda |x| + 1e-8) for every layer; then no other decay
    spikes      r = |g| at first;  g <- g min(1, 1.5 r / |g|);  r <- .95 r + .05 |shortened g|, for every bucket
    slowmo      every H steps: y = J x;  u = beta_s u + (x_0 - y) / lr;  x_0 = x_0 - alpha lr u;  x = x_0

A worker without a gradient takes no local step: d = 0 in combine, and its m and v stay. What it sends in the place of
its parameters are its parameters. What its neighbors integrate it integrates too: p of pc- and mi-dmsgd, what d2-dmsgd
and exact-diffusion undo (their m_prev becomes minus the correction that it has), and y and c of the tracking methods,
for which its gradient is its weight decay alone. So sums over the workers stay zero. Where gradients are averaged one
that is missing counts as zero; among workers that have joined (`optimizer.join`) the mean is over those that have one.
"""

import numpy as np

SCHEDULES = ("atc", "midpoint", "awc")
PUSHED = ("push-sum", "push-diging", "push-pull")
ONLY_ATC = ("psgd", "pmsgd", "nesterov-pmsgd", "da-dmsgd", "gradient-tracking", "momentum-tracking", "k-gt", *PUSHED)
ONLY_AWC = ("awc-dmsgd", "nesterov-awc-dmsgd", "extra")


def run(
    method, Ws, grad, x0, lrs, momentum, weight_decay, *,
    steps, schedule="auto", lars=None, spikes=None, slowmo=None, skips=(), without=None, joined=False, mass=None,
    **hyper,
):  # fmt: skip
    """Every worker's parameters before and after each of `steps` steps, [steps + 1, n, d].

    Ws(step) is the mixing matrix, of the push- methods A, whose columns sum to one (mass: w before the first step, by
    default ones), lrs(step) the learning rate, grad(step, x) the gradients [n, d] without weight decay.
    In the steps `skips` nobody takes a local step: parameters are averaged (not where gradients are), buffers stay.
    without(step) has the workers that have no gradient; joined: see above.
    hyper: `mu` (default momentum) of qg-dmsgd; `probability` of proxskip; `correction_rate` (a number) and
    `correction_gain` of pc- and mi-dmsgd; `beta2` and `eps` of adam; `gossip_rate` of gasloc (alpha) and noloco (c).
    lars: (eta, layers as slices). slowmo: (H, beta_s, alpha).
    """
    schedule = own_schedule(method) if schedule == "auto" else schedule
    nesterov, method = method.startswith("nesterov-"), method.removeprefix("nesterov-")
    if schedule not in SCHEDULES or (schedule != "atc" and method in ONLY_ATC):
        raise ValueError(f"{method} has no schedule {schedule!r}")
    x = np.array(x0, dtype=np.float64)
    n, beta = len(x), momentum
    J = np.full((n, n), 1 / n)
    m, p = np.zeros_like(x), np.zeros_like(x)
    c, u_prev, x_prev, y, g_prev, v = (np.zeros_like(x) for _ in range(6))
    x_0, slow_u = x, np.zeros_like(x)
    lr_max, lr_mean, undo = 0.0, None, None
    theta = {"atc": 1.0, "midpoint": 0.5, "awc": 0.0}[schedule]
    W_prev = lr_prev = last_inverse = before_pull = mixed = None
    w = np.ones((n, 1)) if mass is None else np.array(mass, dtype=np.float64).reshape(n, 1)
    t, usual = np.zeros((n, 1)), {}
    z, K, S, local_steps, first = np.zeros_like(x), 1, np.zeros_like(x), 0, True
    z_prev, delta, gossip = x, np.zeros_like(x), hyper.get("gossip_rate", {"noloco": 0.7}.get(method, 1.0))
    trajectory = [x]
    for k in range(steps):
        W, lr = Ws(k), lrs(k)
        before, w = w, W @ w if method in PUSHED else w
        if k in skips:
            if method in PUSHED:
                x = W @ (before * x) / w
            elif method in ("gasloc", "noloco"):
                z_prev, x = z_prev + gossip * (W @ x - x), x + gossip * (W @ x - x)  # x - z_prev stays
            else:
                x = x if method in ("psgd", "pmsgd") else W @ x
            trajectory.append(x)
            continue
        lr_max = max(lr_max, lr)
        local_steps += 1
        exchanges = n == 1 or (W - np.diag(np.diag(W))).any()
        K, local_steps = (local_steps, 0) if exchanges else (K, local_steps)
        literal = 0 < lr >= lr_max / 100  # elsewhere the division by lr is bounded: by lr_max / 100, and 0 at lr = 0
        inverse = 100 / lr_max if lr > 0 else 0.0
        local, decay = np.array(grad(k, x)), weight_decay
        here = np.ones((n, 1), dtype=bool)
        here[list(without(k)) if without else []] = False
        local = np.where(here, local, 0.0)
        M = np.tile(here.T / here.sum(), (n, 1)) if joined and here.any() else J
        if method in ("psgd", "pmsgd"):
            if not here.any():
                trajectory.append(x)
                continue
            here[:] = True  # everybody steps
        m_before, v_before = m, v
        if spikes:
            local = M @ local if method in ("psgd", "pmsgd") else local.copy()
            for i in np.flatnonzero(here[:, 0]):
                for bucket in spikes:
                    size = np.linalg.norm(local[i, bucket])
                    if size > 0:
                        r = usual.get((i, bucket.start), size)
                        local[i, bucket] *= min(1.0, 1.5 * r / size)
                        usual[i, bucket.start] = 0.95 * r + 0.05 * min(size, 1.5 * r)
        if lars:
            if method in ("psgd", "pmsgd"):
                local = M @ local
            for i in range(n):
                for layer in (slice(None),) if lars[1] is None else lars[1]:
                    x_norm, g_norm = np.linalg.norm(x[i, layer]), np.linalg.norm(local[i, layer])
                    ratio = lars[0] * x_norm / (g_norm + decay * x_norm + 1e-8) if x_norm and g_norm else 1.0
                    local[i, layer] = ratio * (local[i, layer] + decay * x[i, layer])
            outside = np.ones(x.shape[1], bool)
            for layer in lars[1] or (slice(None),):
                outside[layer] = False
            local[:, outside] += decay * x[:, outside]
            decay = 0.0
        g = local + decay * x

        def combine(d, W=W, x=x, here=here):
            d = here * d
            return W @ (x - theta * d) - (1 - theta) * d

        if method == "psgd":
            x = x - lr * (M @ local + decay * x)
        elif method == "pmsgd":
            G = M @ local + decay * x
            m = beta * m + G
            x = x - lr * ((G + beta * m) if nesterov else m)
        elif method == "dsgd":
            x = combine(lr * g)
        elif method == "dmsgd":
            m = beta * m + g
            x = combine(lr * ((g + beta * m) if nesterov else m))
        elif method == "da-dmsgd":
            u = beta * m + g
            x, m = W @ (x - lr * here * u), W @ u
        elif method == "awc-dmsgd":
            m = beta * m + g
            x = W @ x - lr * here * ((g + beta * m) if nesterov else m)
        elif method == "qg-dmsgd":
            mu = hyper.get("mu", beta)
            u = beta * m + g
            u = g + beta * u if nesterov else u
            moved = combine(lr * u)
            step = (x - moved) / lr if literal else u + inverse * (x - lr * u - moved)
            x, m = moved, mu * m + (1 - mu) * step
        elif method == "decentlam":
            mixed = combine(lr * g)
            if literal:
                m = beta * m + (x - mixed) / lr
                x = np.where(here, x - lr * m, mixed)
            else:
                x, m = mixed - here * lr * beta * m, beta * m + g + inverse * (x - lr * g - mixed)
        elif method == "pc-dmsgd":
            e, gain = hyper["correction_rate"], hyper.get("correction_gain", 10.0)
            lr_mean = lr if lr_mean is None else (1 - e) * lr_mean + e * lr
            den = max(lr, lr_mean, lr_max / 100)
            u = beta * m + g
            step = here * (g + beta * u if nesterov else u)
            moved = combine(lr * step)
            p = (1 - e / gain) * p + (e / den * (moved - (x - lr * step)) if den > 0 else 0.0)
            x, m = moved, u - p
        elif method == "mi-dmsgd":
            u = beta * m + g
            x, p = midpoint_integral(lr * (g + beta * u if nesterov else u), combine, here, theta, p, lr, lr_max, hyper)
            m = u
        elif method in ("d2-dmsgd", "exact-diffusion"):
            W = W if method == "d2-dmsgd" else (W + np.eye(n)) / 2
            m = beta * m + g
            if undo == "divide":
                c = (x_prev - mixed) / lr_prev - u_prev
            elif undo == "bounded":  # the rate was below a hundredth of the largest: divide by that, or not at all
                c = c - last_inverse * (mixed - before_pull)
            before_pull = x - here * lr * (m + c)
            lr_prev, last_inverse, undo = lr, inverse, "divide" if literal else "bounded"
            x_prev, u_prev, x = x, np.where(here, m, -c), combine(lr * (m + c), W)
        elif method in ("nids", "led", "proxskip"):
            bound = 1 / lr if literal else inverse
            W = (W + np.eye(n)) / 2 if method != "led" else W
            W = np.eye(n) if method == "nids" and first else W
            share = {"nids": 1.0, "led": 1 / K, "proxskip": hyper.get("probability", 1.0)}[method]
            m = beta * m + g
            d = here * lr * (m + c)
            moved = combine(lr * (m + c), W)
            c = c + bound * share * (x - d - moved)  # which is phi - x' of adapt then combine
            x, first = moved, False
        elif method == "extra":
            m = beta * m + g
            moved = W @ x - here * lr * (m - S)
            S = S + (1 / lr if literal else inverse) * ((W - (W + np.eye(n)) / 2) @ x)
            x = moved
        elif method == "k-gt":
            m = beta * m + g
            sent = z + (m + c)
            x = W @ (x - here * lr * (m + c))
            z = np.where(here, 0 * z if exchanges else sent, z)
            c = c + (W - np.eye(n)) @ sent / K if exchanges else c
        elif method == "gradient-tracking":
            y, g_prev = W_prev @ y + g - g_prev if k else g, g
            m = beta * m + y
            x = W @ (x - here * lr * m)
        elif method == "momentum-tracking":
            m = beta * m + g
            x, c = W @ x - here * lr * (m - c), W @ (c - m) + m
        elif method in PUSHED:
            if method != "push-sum":
                y, g_prev = W_prev @ y + g - g_prev if k else g, g
            m = beta * m + (g if method == "push-sum" else y)
            if method == "push-pull":
                R = np.diag(1 / w[:, 0]) @ W @ np.diag(before[:, 0])
                x = R @ (x - here * lr * m)
            else:
                x = W @ (before * x - here * lr * m) / w  # z of the next step
        elif method in ("adam", "adamw", "mi-adamw"):
            b2, eps = hyper.get("beta2", 0.999), hyper.get("eps", 1e-8)
            t = t + here  # each worker's own
            g = g if method == "adam" else local
            m, v = beta * m + (1 - beta) * g, b2 * v + (1 - b2) * g**2
            T = np.maximum(t, 1)
            step = (m / (1 - beta**T)) / (np.sqrt(v / (1 - b2**T)) + eps)
            step = lr * (step if method == "adam" else step + decay * x)
            if method == "mi-adamw":
                x, p = midpoint_integral(step, combine, here, theta, p, lr, lr_max, hyper)
            else:
                x = combine(step)
        elif method == "gasloc":
            ahead = x - here * lr * g
            moved = ahead - gossip * (ahead - combine(lr * g))
            z_prev, x = np.where(here, ahead, z_prev + moved - x), moved + here * beta * (ahead - z_prev)
        elif method == "noloco":
            Delta = -(here * g)
            drawn = lr * theta * (W @ Delta - Delta) - gossip * (x - W @ x)  # all that neighbors do
            delta = np.where(here, beta * delta + lr * Delta + drawn, delta)
            x = x + np.where(here, delta, drawn)
        else:
            raise ValueError(f"unknown method {method!r}")
        m, v = np.where(here, m, m_before), np.where(here, v, v_before)
        W_prev, mixed = W, x  # a slow step is none of the method's
        if slowmo and (k + 1) % slowmo[0] == 0:
            _, beta_s, alpha = slowmo
            mean = J @ x
            x = x_0 - alpha * (x_0 - mean + lr * beta_s * slow_u)
            slow_u = beta_s * slow_u + ((x_0 - mean) / lr if literal else inverse * (x_0 - mean))
            z_prev, x_0 = z_prev + x - mixed, x
        trajectory.append(x)
    return np.stack(trajectory)


def midpoint_integral(step, combine, here, theta, p, lr, lr_max, hyper):
    """x' and p' of MI: the local step is -d = step - rho p, and p integrates what averaging does to the message.

    The message is x - theta d; combine(d) is W (x - theta d) - (1 - theta) d, so that plus d is W y - y + x.
    """
    e, gain = hyper["correction_rate"], hyper.get("correction_gain", 300.0)
    rho = lr / lr_max if lr_max > 0 else 0.0
    d = here * (step - rho * p)
    x_new = combine(d)
    pull = x_new + d - combine(np.zeros_like(d), np.eye(len(d)))  # combine at W = I and d = 0 is x
    return x_new, (1 - e * rho / gain) * p + e * pull


def own_schedule(method):
    """What schedule="auto" promises."""
    return "midpoint" if "mi-" in method else "awc" if method in ONLY_AWC else "atc"


def auto_rate(method, top, momentum):
    """What `correction_rate="auto"` promises. rho, the contraction per step, is at least 0.22^(1/T), see
    tests/topology/test_spectrum.py."""
    rho = top.slowest_rho
    if "mi-" not in method:
        return pull_rate(momentum, rho)
    return displacement_rate(momentum, rho, top.period == 1 and np.allclose(top.weights(), top.weights().T))


def displacement_rate(momentum, rho, static):
    """MI-DmSGD's; static: one matrix for all steps, and symmetric."""
    return min(0.5, 2 * (1 - rho)) if static else min((1 - rho) / (1 + rho), 5 * (1 - momentum))


def pull_rate(momentum, rho):
    """PC-DmSGD's."""
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
