"""Say what pip is about to download for a requirement, before it does: version, size, CUDA packages.

Run as `python constraints/announce.py torch`, with the constraints in PIP_CONSTRAINT. Package
metadata cannot ask for "the CPU build", so which build arrives depends on the index that pip is set
up with. This tells the difference between 0.2 GB and 3 GB ahead of the wait; it never refuses.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

Install = dict  # one entry of "install" in pip's report


def resolve(requirement: str) -> list[Install]:
    """Return what pip would install for `requirement`; an empty list when pip cannot tell."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--report", str(report), requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(done.stderr.strip(), file=sys.stderr)
            return []
        return json.loads(report.read_text())["install"]


def size_bytes(install: Install) -> int:
    """Return the size of the file behind one entry; 0 when its server does not say."""
    request = urllib.request.Request(install["download_info"]["url"], method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return int(answer.headers.get("Content-Length") or 0)
    except (OSError, ValueError):
        return 0


def describe(requirement: str, installs: list[Install], sizes: list[int]) -> str:
    """Return the announcement in one line."""
    names = {entry["metadata"]["name"].lower(): entry["metadata"]["version"] for entry in installs}
    cuda = [name for name in names if name.startswith(("nvidia-", "cuda-")) or name == "triton"]
    what = f"{requirement} {names.get(requirement, '(already installed)')}: {len(installs)} packages"
    room = f"{sum(sizes) / 1e9:.1f} GB to download" + (f" ({sizes.count(0)} sizes unknown)" if 0 in sizes else "")
    if not cuda:
        return f"{what}, {room}, no CUDA packages"
    return f"{what}, {room}, among them {len(cuda)} CUDA packages"


def main() -> None:
    """Announce the requirement named on the command line."""
    requirement = sys.argv[1]
    installs = resolve(requirement)
    if installs:
        print(describe(requirement, installs, [size_bytes(entry) for entry in installs]), flush=True)


if __name__ == "__main__":
    main()
