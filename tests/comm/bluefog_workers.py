"""Runs what comm/bluefog.md has people write, on real processes."""

import os


def run_the_page(rank, blocks, folder):
    """What the page's lines leave in their variables."""
    os.chdir(folder)
    names = {}
    for block in blocks:
        exec(block, names)
    with open(f"rank{rank}.json", encoding="utf-8") as file:
        names["spans"] = file.read()
    kept = """x regular sources moved doubled there heard gathered mean swapped versions updated unread total mass
              estimate spans""".split()
    graphs = {name: names[name].weights() for name in ("left_ring", "sparse")}
    return {name: names[name] for name in kept} | graphs
