"""The schemes of simulations by plain loops over steps, workers and messages, float64. Nothing here is the package's
but the random numbers: `generator(seed, step, stream)` with streams 2 (loss), 3 (participation), 4 (noise).

DmSGD, exact diffusion and gradient tracking stand for methods with one message, with a correction, and with two.
"""

import numpy as np

from fused_dlam.topology import generator


def heard(W):
    """All (i, j) where i hears from j, in the order in which the package draws for them."""
    return [(i, j) for i in range(len(W)) for j in range(len(W)) if i != j and W[i, j]]


def simulate(
    method, top, grad, x0, steps, lr, beta, *,
    loss=0.0, pairs=False, participation=1.0, delay=0, noise=0.0, seed=0, order=heard,
):  # fmt: skip
    """Every worker's x after every step, [steps + 1, n, d]. loss, participation, delay: numbers or functions."""
    n, d = x0.shape
    x, m, c = x0.copy(), np.zeros_like(x0), np.zeros_like(x0)
    sent, out = [], [x0]
    for k in range(steps):
        W = top.weights(k)
        here = participation
        if callable(participation):
            here = np.asarray(participation(k), bool)
        else:
            here = generator(seed, k, 3).random_sample(n) < participation
        g = grad(k, x)
        messages = []
        for i in range(n):
            if method == "dmsgd":
                messages.append([x[i] - lr * (beta * m[i] + g[i])])
            elif method == "exact-diffusion":
                messages.append([x[i] - lr * (beta * m[i] + g[i] + c[i])])
            else:
                y = c[i] + g[i]
                messages.append([x[i] - lr * (beta * m[i] + y), y])
        pairs_of = order(W)
        draws = dict(zip(pairs_of, generator(seed, k, 2).random_sample(len(pairs_of)), strict=True))
        arrives = {}
        for i, j in pairs_of:
            p = loss(k, j, i) if callable(loss) else loss
            draw = draws[i, j]
            if pairs and (j, i) in draws:
                draw = draws[min((i, j), (j, i), key=pairs_of.index)]
            arrives[i, j] = draw >= p and here[i] and here[j]
        sent.append((W, messages, arrives))
        count = len(messages[0])
        pull = np.zeros((count, n, d))
        variance = np.zeros(n)
        for i in range(n):
            for j in range(n):
                q = k - (delay(j, i) if callable(delay) else delay)
                if q < 0 or not sent[q][2].get((i, j), False):
                    continue
                W_q, messages_q, _ = sent[q]
                variance[i] += W_q[i, j] ** 2
                for r in range(count):
                    pull[r, i] += W_q[i, j] * (messages_q[j][r] - messages_q[i][r])
        draw = generator(seed, k, 4)
        for r in range(count):
            if noise:
                pull[r] += noise * np.sqrt(variance)[:, None] * draw.standard_normal((n, d))
        x_new, m_new, c_new = x.copy(), m.copy(), c.copy()
        for i in range(n):
            if not here[i]:
                continue
            if method == "dmsgd":
                m_new[i] = beta * m[i] + g[i]
                x_new[i] = messages[i][0] + pull[0, i]
            elif method == "exact-diffusion":
                m_new[i] = beta * m[i] + g[i]
                x_new[i] = messages[i][0] + pull[0, i] / 2
                c_new[i] = c[i] - pull[0, i] / (2 * lr)
            else:
                m_new[i] = beta * m[i] + messages[i][1]
                x_new[i] = messages[i][0] + pull[0, i]
                c_new[i] = messages[i][1] + pull[1, i] - g[i]
        x, m, c = x_new, m_new, c_new
        out.append(x)
    return np.stack(out)


def in_offsets(W):
    """The order of a circulant matrix's draws: offset by offset, its workers in turn."""
    n = len(W)
    return [(i, (i - k) % n) for k in range(1, n) if W[k % n, 0] for i in range(n)]
