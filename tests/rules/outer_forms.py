"""Outer methods of low-communication training as their papers and codes write them: float64, plain loops over workers.

Each is a generator of the anchors x, [n, d], after every round, from x on. y(x) are the parameters after a round's
inner steps from x, W(k) the weights of round k and lr(k) its outer learning rate.
"""

import numpy as np


def mean_of(weights, values):
    """The weighted mean of the workers' values, as worker i with these weights has it."""
    mean = np.zeros_like(values[0])
    for w, value in zip(weights, values, strict=True):
        mean = mean + w * value
    return mean


def gasloc(W, y, x, lr, gamma, alpha):
    """Cagnasso, Belilovsky and Oyallon 2026: theta' = z - alpha Lambda z + gamma (z - z_prev), z = theta + eta g.

    g is the drift y - x, Lambda = I - W the graph's Laplacian, z_prev at first theta itself.
    """
    n, z_prev = len(x), [np.array(row) for row in x]
    for k in range(10**9):
        end = y(x)
        z = [x[i] + lr(k) * (end[i] - x[i]) for i in range(n)]
        new = []
        for i in range(n):
            laplacian = np.zeros_like(z[i])
            for j in range(n):
                laplacian = laplacian + W(k)[i, j] * (z[i] - z[j])
            new.append(z[i] - alpha * laplacian + gamma * (z[i] - z_prev[i]))
        x, z_prev = np.stack(new), z
        yield x


def noloco(W, y, x, lr, alpha, gamma):
    """Kolehmainen et al. 2025, with its two messages: phi' = phi + delta', Delta = theta - phi,
    delta' = alpha delta + beta mean(Delta) - gamma (phi - mean(phi)), at first delta = 0. beta is lr; in the authors'
    code gamma is too.
    """
    n, delta = len(x), np.zeros_like(x)
    for k in range(10**9):
        Delta, new = y(x) - x, []
        for i in range(n):
            mean_Delta, mean_phi = mean_of(W(k)[i], Delta), mean_of(W(k)[i], x)
            delta[i] = alpha * delta[i] + lr(k) * mean_Delta - gamma * (x[i] - mean_phi)
            new.append(x[i] + delta[i])
        x = np.stack(new)
        yield x


def factored(W1, W2, y, x, lr, momentum):
    """Factored Gossip DiLoCo (Hewa Koneputugodage et al., ICML 2026): two mixings around DiLoCo's outer optimizer.

    Mix1, by W1, averages the anchors while the inner steps run, which start from the worker's own anchor. Mix2, by W2,
    averages the outer gradients after them. Nesterov SGD, with the worker's own momentum, takes these from there.
    """
    n, m = len(x), np.zeros_like(x)
    for k in range(10**9):
        g, new = x - y(x), []
        for i in range(n):
            mixed_x, mixed_g = mean_of(W1(k)[i], x), mean_of(W2(k)[i], g)
            m[i] = momentum * m[i] + mixed_g
            new.append(mixed_x - lr(k) * (mixed_g + momentum * m[i]))
        x = np.stack(new)
        yield x
