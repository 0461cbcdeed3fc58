"""Methods of the field as their papers write them: dense, float64, all workers at once, at a constant learning rate.

Each is a generator of x after every step, from x on, without momentum and weight decay. W is one symmetric matrix, or
W(k) that of step k; grad(k, x) are the gradients.
"""

import numpy as np


def nids(W, grad, x, lr):
    """Li, Shi and Yan 2019, algorithm 1 without the nonsmooth term: x^2 = W~ (2 x^1 - x^0 - lr (g^1 - g^0))."""
    half, before, g_before = (np.eye(len(W)) + W) / 2, x, grad(0, x)
    x = x - lr * g_before
    yield x
    for k in range(1, 10**9):
        g = grad(k, x)
        x, before, g_before = half @ (2 * x - before - lr * (g - g_before)), x, g
        yield x


def extra(W, grad, x, lr):
    """Shi, Ling, Wu and Yin 2015: x^2 = (I + W) x^1 - W~ x^0 - lr (g^1 - g^0), from x^1 = W x^0 - lr g^0."""
    identity = np.eye(len(W))
    before, g_before = x, grad(0, x)
    x = W @ x - lr * g_before
    yield x
    for k in range(1, 10**9):
        g = grad(k, x)
        x, before, g_before = (identity + W) @ x - (identity + W) / 2 @ before - lr * (g - g_before), x, g
        yield x


def led(W, grad, x, lr, K):
    """Alghunaim 2024 at beta = 1/K. phi steps by -lr g - y / K; after K of them x = W phi, y = y + phi - x."""
    y = np.zeros_like(x)
    for k in range(10**9):
        x = x - lr * grad(k, x) - y / K
        if k % K == K - 1:
            phi, x = x, W @ x
            y = y + phi - x
        yield x


def proxskip(W, grad, x, lr, p, coin):
    """Mishchenko et al. 2022 over a network, with h in units of the gradient: x^ = x - lr (g - h), and where the coin
    falls so x = (I + W)/2 x^, h = h + p/lr (x - x^)."""
    h, half = np.zeros_like(x), (np.eye(len(W)) + W) / 2
    for k in range(10**9):
        ahead = x - lr * (grad(k, x) - h)
        x = half @ ahead if coin(k) else ahead
        h = h + p / lr * (x - ahead)
        yield x


def k_gt(W, grad, x, lr, K):
    """Liu, Lin, Koloskova and Stich 2024, algorithm 1 at eta_s = 1, from c = 0."""
    c = np.zeros_like(x)
    for first in range(0, 10**9, K):
        start = x
        for k in range(first, first + K - 1):
            x = x - lr * (grad(k, x) + c)
            yield x
        x = x - lr * (grad(first + K - 1, x) + c)
        z = (start - x) / (K * lr)
        c = c - z + W @ z
        x = W @ (start - K * lr * z)
        yield x
