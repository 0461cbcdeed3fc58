"""Whether what a page shows is what a run prints: the same words, and numbers that agree."""

import re

NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?(?![\w])")
ROUNDING = 1e-10  # numbers below this are errors of rounding, of which one is as good as another


def differences(shown: str, printed: str, rel: float = 0.02, ignore: str = r"$^") -> list[str]:
    """Lines that differ. rel: how far numbers may be apart; ignore: lines of which only the words are compared."""
    pages, runs = ([line.split() for line in text.strip().splitlines() if line.strip()] for text in (shown, printed))
    if len(pages) != len(runs):
        return [f"{len(pages)} lines are shown and {len(runs)} printed"]
    out = []
    for page, run in zip(map(" ".join, pages), map(" ".join, runs), strict=True):
        numbers = [[float(n.replace(",", "")) for n in NUMBER.findall(line)] for line in (page, run)]
        words = [NUMBER.sub("#", line) for line in (page, run)]
        near = len(numbers[0]) == len(numbers[1]) and all(
            abs(a - b) <= rel * max(abs(a), abs(b)) or max(abs(a), abs(b)) < ROUNDING
            for a, b in zip(*numbers, strict=True)
        )
        if words[0] != words[1] or not (near or re.search(ignore, page)):
            out.append(f"shown {page!r}, printed {run!r}")
    return out
