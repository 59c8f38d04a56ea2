"""Devices: names, and what is free."""

from pathlib import Path

import pytest
import torch

from dpsynth import devices
from dpsynth.checks import UsageError
from dpsynth.devices import free_memory, resolve


def test_a_device_is_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for there in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert resolve("cpu").type == "cpu"
        assert resolve("auto").type == ("cuda" if there else "cpu")
    assert resolve("cuda").type == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="device=cuda: no GPU is visible"):
        resolve("cuda")
    with pytest.raises(UsageError, match="device=gpu: unknown"):
        resolve("gpu")


def system(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal: 99 kB\nMemAvailable:    1000 kB\n"}
V2 = "sys/fs/cgroup/"
V1 = "sys/fs/cgroup/memory/"


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 1000 * 1024),
        ({"proc/self/cgroup": "0::/a/b\n"}, 1000 * 1024),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                f"{V2}a/b/memory.max": "max\n",
                f"{V2}a/b/memory.current": "5\n",
                f"{V2}a/b/memory.stat": "anon 1\ninactive_file 9\n",
                f"{V2}a/memory.max": "5000\n",
                f"{V2}a/memory.current": "1000\n",
                f"{V2}a/memory.stat": "anon 1\ninactive_file 300\n",
            },
            4300,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,memory:/job\n3:cpuset:/\n0::/\n",
                f"{V1}job/memory.limit_in_bytes": "9000\n",
                f"{V1}job/memory.usage_in_bytes": "9500\n",
                f"{V1}job/memory.stat": "cache 7\ntotal_inactive_file 700\n",
            },
            200,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/job\n",
                f"{V1}memory.limit_in_bytes": "9223372036854771712\n",
                f"{V1}memory.usage_in_bytes": "9500\n",
                f"{V1}memory.stat": "cache 7\n",
            },
            1000 * 1024,
        ),
    ],
    ids=["none", "unseen", "version 2, above", "version 1", "no limit"],
)
def test_what_is_free_is_the_least_of_machine_and_groups(
    files: dict[str, str], free: float, tmp_path: Path
) -> None:
    assert devices._available(system(tmp_path, {**MEMINFO, **files})) == free


def test_a_system_that_does_not_say_what_is_free_needs_a_number(tmp_path: Path) -> None:
    for files in ({}, {"proc/meminfo": "MemTotal: 99 kB\n"}):
        with pytest.raises(UsageError, match=r"does not say what is free; set training\.memory"):
            devices._available(system(tmp_path, files))


def test_what_torch_holds_in_its_cache_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 10)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80, 1000))
    assert free_memory("cuda") == 100
