"""Disk and memory: what is free, and sizes for people."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator, Mapping
from pathlib import Path

from embedcache.errors import NoRoomError


def free_bytes(store: Path) -> int:
    """Free on the disk that the store is on or will be on."""
    found = os.statvfs(_at(store))
    return found.f_bavail * found.f_frsize


def _at(store: Path) -> Path:
    """The store, or the nearest directory above it that is there."""
    path = store.absolute()
    while not path.exists():
        path = path.parent
    return path


def check_room(needed: Mapping[Path, int]) -> None:
    """Refuses what the disks cannot hold, before anything is written.

    Args:
        needed: bytes of each store; those on one disk share it.

    Raises:
        NoRoomError: says how much is missing, and what takes less.
    """
    disks: dict[int, list[Path]] = {}
    for store in needed:
        disks.setdefault(_at(store).stat().st_dev, []).append(store)
    for stores in disks.values():
        total, free = sum(needed[store] for store in stores), free_bytes(stores[0])
        if total > free:
            raise NoRoomError(
                f"{', '.join(map(str, stores))}: needs about {in_bytes(total)}, and {in_bytes(free)} are free there; "
                "nothing was started. Name another disk, or store less: no tokens, a token grid, int8, fewer views"
            )


def resident_bytes() -> int:
    """Memory of this process now."""
    found = _proc("/proc/self/status", "VmRSS:")
    return peak_bytes() if found is None else found


def peak_bytes() -> int:
    """Most memory that this process has had, since the last `forget_peak`."""
    found = _proc("/proc/self/status", "VmHWM:")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if found is None else found


def forget_peak() -> None:
    """Where Linux lets it, the peak is counted from here on."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def available_bytes() -> int:
    """Memory that the machine has left, or the control group that a container or a batch job runs in."""
    found = _proc("/proc/meminfo", "MemAvailable:")
    of_machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if found is None else found
    return min([of_machine, *left_by_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


def left_by_groups(said: Path, root: Path) -> Iterator[int]:
    """What each memory limit of a control group leaves, from this process's own group upwards.

    Args:
        said: which groups this process is in, as Linux tells it.
        root: where they are mounted.
    """
    with contextlib.suppress(OSError):
        for line in said.read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            top, limit, used, cached = root, "memory.max", "memory.current", "inactive_file"
            if controllers == "memory":  # version 1
                top, limit, used = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
                cached = "total_inactive_file"
            group = top / name.lstrip("/")
            for path in (group, *group.parents):
                if not path.is_relative_to(top):
                    break
                with contextlib.suppress(OSError, ValueError):  # `max`: no limit
                    left = int((path / limit).read_text()) - int((path / used).read_text())
                    yield left + _field(path / "memory.stat", cached)  # files in the cache are given up first


def _field(path: Path, name: str) -> int:
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            if line.startswith(f"{name} "):
                return int(line.split()[1])
    return 0


def _proc(path: str, name: str) -> int | None:
    """Bytes of a field that Linux gives in kB; None on other systems."""
    with contextlib.suppress(OSError):
        for line in Path(path).read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    return None


def in_bytes(n: int) -> str:
    """A size for people: `640 bytes`, `1.2 MB`, `86 GB`."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.{0 if n >= 10 * size else 1}f} {unit}"
    return f"{n} bytes"
