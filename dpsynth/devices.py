"""Devices: which one a name means, and what memory is free there."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from dpsynth.checks import UsageError, check_choice

__all__ = ["free_memory", "resolve"]


def resolve(device: str) -> torch.device:
    """The device named `cpu`, `cuda` or `auto`; one that is not there is refused."""
    check_choice("device", device, ("auto", "cpu", "cuda"))
    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        raise UsageError("device=cuda: no GPU is visible to torch; use device=cpu")
    return torch.device("cuda" if there and device != "cpu" else "cpu")


def free_memory(device: str) -> float:
    """Bytes that are free on `cpu`, within this process's control groups, or on `cuda`.

    Raises:
        UsageError: Where the system does not say.
    """
    if device == "cuda":
        # What torch holds in its cache is as good as free.
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return float(torch.cuda.mem_get_info()[0] + cached)
    return _available(Path("/"))


def _available(root: Path) -> float:
    """Bytes that the kernel could give to this process, within its control groups."""
    try:
        text = (root / "proc/meminfo").read_text()
        found = re.search(r"MemAvailable:\s+(\d+) kB", text)
        assert found is not None
    except (OSError, AssertionError) as error:
        raise UsageError(
            "memory: this system does not say what is free; set training.memory to a number of GiB"
        ) from error
    return min([1024.0 * int(found[1]), *_granted(root)])


def _granted(root: Path) -> list[float]:
    """What is left in each control group (version 1 or 2) that this process is in."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    left: list[float] = []
    for line in lines:
        _, names, path = line.split(":", 2)
        if names and "memory" not in names.split(","):
            continue
        mount, most, used = (
            ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes")
            if names
            else ("sys/fs/cgroup", "memory.max", "memory.current")
        )
        for part in (Path(path.lstrip("/")), *Path(path.lstrip("/")).parents):
            folder = root / mount / part
            left += _left(folder / most, folder / used, folder / "memory.stat")
    return left


def _left(most: Path, used: Path, stat: Path) -> list[float]:
    """Limit less use, where there is a limit; files in the page cache that are idle are no use."""
    try:
        limit, taken = most.read_text().strip(), int(used.read_text())
        if limit == "max":
            return []
        idle = re.search(r"^(?:total_)?inactive_file (\d+)$", stat.read_text(), re.MULTILINE)
    except OSError:  # a group may be seen from outside only
        return []
    return [max(0.0, float(int(limit) - taken + (int(idle[1]) if idle else 0)))]
