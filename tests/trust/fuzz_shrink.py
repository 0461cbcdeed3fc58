"""Makes a failing configuration smaller: python tests/trust/fuzz_shrink.py --n 3 --seed 349.

Parts are left out one after another, and stay out while something still fails.
"""

from __future__ import annotations

import argparse
import copy
import gc
import logging
from collections.abc import Iterator

from fuzz_check import check
from fuzz_draw import Config, draw
from fuzz_model import Tools
from fuzz_run import report

from fused_dlam.tools.launch import run_workers

PLAIN = {
    "weight_decay": 0.0, "maximize": False, "comm_dtype": None, "max_grad_norm": None, "clip": None, "layers": "",
    "scaler": None,
    "tied": False, "empty_group": False, "hook": None, "momentum": 0.0, "fused": False, "method": "dmsgd",
    "graph": "one-peer-exponential", "schedule": "auto", "certified": False, "hierarchical": False, "same": False,
}  # fmt: skip


def smaller(c: Config) -> Iterator[Config]:
    """Configurations with one part less."""
    for steps in range(1, c.steps):
        yield changed(c, steps=steps)
    for name in ("events", "unused", "trainable"):
        for k in range(len(getattr(c, name))):
            yield changed(c, **{name: getattr(c, name)[:k] + getattr(c, name)[k + 1 :]})
    for k in reversed(range(len(c.params))):
        used = {e.which for e in c.events} | {u[2] for u in c.unused} | {t[2] for t in c.trainable}
        if k == len(c.params) - 1 and k > 0 and k not in used:
            yield changed(c, params=c.params[:k])
        if c.params[k][1] != "float32" or c.params[k][2] != "c" or c.params[k][3] or c.params[k][0] != (3,):
            yield changed(c, params=[*c.params[:k], ((3,), "float32", "c", 0, c.params[k][4]), *c.params[k + 1 :]])
    for step in range(c.steps):
        if c.backward[step] != ("plain", None):
            yield changed(c, backward=[*c.backward[:step], ("plain", None), *c.backward[step + 1 :]])
        if c.zero[step] != "opt":
            yield changed(c, zero=[*c.zero[:step], "opt", *c.zero[step + 1 :]])
    for name, value in PLAIN.items():
        if getattr(c, name) != value:
            yield changed(c, **{name: value})


def changed(c: Config, **what: object) -> Config:
    new = copy.copy(c)
    for name, value in what.items():
        setattr(new, name, value)
    return new


def shrink(rank: int, n: int, seed: int, tries: int) -> str:
    gc.freeze()
    logging.getLogger("fused_dlam").setLevel(logging.ERROR)
    tools = Tools()
    c = draw(n, seed)

    def fails(config: Config) -> list[str]:
        for _ in range(tries):
            verdict, said = check(config, rank, tools)
            if verdict == "failed":
                return said
        return []

    said, going = fails(c), True
    while said and going:
        going = False
        for one in smaller(c):
            found = fails(one)
            if found:
                c, said, going = one, found, True
                break
    return report(c, said)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--tries", type=int, default=1, help="for failures that come and go")
    args = parser.parse_args()
    print(run_workers(shrink, args.n, args.n, args.seed, args.tries)[0])


if __name__ == "__main__":
    from fuzz_shrink import main as main_

    main_()
