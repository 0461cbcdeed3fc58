"""Runs the tutorials and puts what they print and draw into their pages.

    python -m fused_dlam.tutorials.to_pages          all of them
    python -m fused_dlam.tutorials.to_pages 2 5

In a page it is the block behind the line `$ fused-dlam tutorial N`. Pictures are reduced to 64 colors.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from fused_dlam.tutorials import ALL

FOLDER = Path(__file__).parent
FENCE = "```"


def output(number: int, picture: Path) -> str:
    """What the command prints between its first line and the last, which name this machine's files."""
    command = [sys.executable, "-m", "fused_dlam", "tutorial", str(number), "--out", str(picture)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        raise RuntimeError(f"tutorial {number} failed:\n{done.stderr}")
    first, *lines, last = done.stdout.strip().splitlines()
    assert first.startswith("Tutorial") and last.startswith("Picture:")
    return "\n".join(lines).strip("\n")


def block(page: str, number: int) -> tuple[str, str, str]:
    """A page in three: up to the block, what it shows, and the rest."""
    mark = f"{FENCE}text\n$ fused-dlam tutorial {number}"
    before, found, rest = page.partition(mark)
    shown, fence, after = rest.partition(f"\n{FENCE}")
    if not found or not fence:
        raise ValueError(f"the page of tutorial {number} has no block that begins with $ fused-dlam tutorial {number}")
    return before + mark + "\n", shown.removeprefix("\n"), fence + after


def main() -> None:
    from PIL import Image

    for number in map(int, sys.argv[1:] or range(1, len(ALL) + 1)):
        page, picture = (FOLDER / f"{ALL[number - 1]}{ending}" for ending in (".md", ".png"))
        with tempfile.TemporaryDirectory() as folder:
            drawn = Path(folder, "picture.png")
            before, _, after = block(page.read_text(), number)
            page.write_text(f"{before}{output(number, drawn)}{after}")
            Image.open(drawn).convert("RGB").quantize(64).save(picture, optimize=True)
        print(f"{page.name}, {picture.name}: {picture.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
