"""How benchmarks time rivals against each other: in turn within each round, so that drift of the machine hits all."""

import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def wait(device: torch.device) -> None:
    """Returns when the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# Seconds that pass, or that this process computes: where others use the cores too, only the latter repeats itself.
CLOCKS = {"wall": time.perf_counter, "process": time.process_time}


def in_turn(
    rivals: dict[str, Callable[[], object]], rounds: int, device: torch.device, clock: str = "wall"
) -> dict[str, list[float]]:
    """Runs rivals in turn and times each.

    Args:
        rivals: What to run, by name.
        rounds: Timed rounds; one more comes first, in which libraries set themselves up. The order rotates.
        device: What they run on.
        clock: One of CLOCKS.

    Returns:
        Seconds of each round by name.
    """
    seconds = {name: [] for name in rivals}
    names = list(rivals)
    for number in range(rounds + 1):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            wait(device)
            start = CLOCKS[clock]()
            rivals[name]()
            wait(device)
            if number:
                seconds[name].append(CLOCKS[clock]() - start)
    return seconds


def median_ratio(seconds: dict[str, list[float]], name: str, base: str) -> float:
    """Median over the rounds of one rival's time by another's, of the same round."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))


def peak_memory(run: Callable[[], None], device: torch.device) -> int | None:
    """Bytes that a call needs at its peak beyond what was held before it; None where the system does not tell.

    On CUDA as torch's allocator counts them, on Linux as the process' resident memory.
    """
    wait(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not Path("/proc/self/clear_refs").exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # what was freed and kept by the allocator would not grow again
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def gigabytes(count: int | None) -> str:
    """A number of bytes in GB, or a dash."""
    return "-" if count is None else f"{count / 1e9:.2f}"


def describe_device(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} {'thread' if threads == 1 else 'threads'}"
