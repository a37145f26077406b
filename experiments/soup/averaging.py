"""What does it cost to average checkpoints, beside reading them? Eight of ResNet-50, 90 % sparse, from files.

    python experiments/soup/averaging.py             # writes results/averaging.json, then
    python experiments/soup/averaging.py --report    # the table of this folder's README.md
    python experiments/soup/averaging.py --quick     # only tries whether it runs, with ResNet-10; writes nothing

Run it on a machine that does nothing else. Reading, which the ratios are of, is that of all files, one after the other,
by unbuffered `readinto` in stretches as long as those of `soups.uniform`, to their places in one buffer as large as a
file, which is allocated, and written to, before. For comparison the same is done into a buffer as large as a stretch,
which stays in the processor's cache, and each file is loaded with safetensors' `load_file`, which maps it, and its
tensors are copied. The page cache is warm: a first repetition is not counted.
"""

import argparse
import ctypes
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsetrain import load_masks, prune, save_masks, soups
from sparsetrain.cli.artifacts import cpu_name, git_state
from sparsetrain.models.timm import timm_model
from sparsetrain.report import markdown_table, write_between
from sparsetrain.soups.members import AT_ONCE

HERE = Path(__file__).parent
RESULTS, README = HERE / "results" / "averaging.json", HERE / "README.md"

MODEL, QUICK_MODEL = "resnet50", "resnet10t"
SPARSITY, MEMBERS, REPETITIONS = 0.9, 8, 9
BAR, MEMORY_BAR = 1.5, 2.2
STRETCH_BYTES = 4 * AT_ONCE

Case = Literal["mappings", "files", "none"]
WORDS: dict[Case, str] = {
    "mappings": "`soups.uniform`, masks in memory, a copy for each member",
    "files": "`soups.uniform`, mask files, one for each member",
    "none": "`soups.uniform`, no masks: the zeros are compared",
}
FOR_COMPARISON = {
    "read": "reading",
    "read_into_cache": "reading into a buffer that stays in the cache",
    "load": "`load_file`, tensors copied",
}


def write_members(folder: Path, model: str) -> int:
    """Write the members and the masks of each, which are equal; returns how many weights and buffers a member has.

    No kept weight is 0, which a normally distributed one is by chance and without masks would be refused for.
    """
    torch.manual_seed(0)
    network = timm_model(model, num_classes=1000)
    masks = prune(network, SPARSITY)
    for number in range(MEMBERS):
        state = {
            name: torch.rand_like(tensor) + 0.5 if tensor.is_floating_point() else tensor
            for name, tensor in network.state_dict().items()
        }
        for name, mask in masks.items():
            state[name] *= mask
        save_file(state, _member(folder, number))
        save_masks(masks, _masks(folder, number))
    return sum(tensor.numel() for tensor in network.state_dict().values())


def _member(folder: Path, number: int) -> Path:
    return folder / f"member-{number}.safetensors"


def _masks(folder: Path, number: int) -> Path:
    return folder / f"masks-{number}.safetensors"


def read(paths: Sequence[Path], buffer: memoryview) -> None:
    """Read whole files, each to the places of its bytes in `buffer`; in one of a single stretch, all to its start."""
    for path in paths:
        with path.open("rb", buffering=0) as file:
            place = 0
            while size := file.readinto(buffer[place : place + STRETCH_BYTES]):
                place = (place + size) % len(buffer)


def load(paths: Sequence[Path]) -> None:
    """Load whole files, one after the other, with tensors of their own."""
    for path in paths:
        for tensor in load_file(path).values():
            tensor.clone()


def average(folder: Path, case: Case) -> Callable[[], dict[str, Tensor]]:
    """What averages the members; masks that it is given in memory are there before."""
    members = [_member(folder, number) for number in range(MEMBERS)]
    files = [_masks(folder, number) for number in range(MEMBERS)]
    masks: dict[Case, Sequence[soups.MemberMasks] | None] = {
        "mappings": [load_masks(path) for path in files] if case == "mappings" else None,
        "files": files,
        "none": None,
    }
    return lambda: soups.uniform(members, masks[case])


def measure_seconds(folder: Path, repetitions: int) -> dict[str, list[float]]:
    """Seconds of each way to read and to average, in turn; the first repetition does not count."""
    members = [_member(folder, number) for number in range(MEMBERS)]
    whole = memoryview(bytearray(members[0].stat().st_size))
    stretch = memoryview(bytearray(STRETCH_BYTES))
    ways: dict[str, Callable[[], object]] = {
        "read": lambda: read(members, whole),
        "read_into_cache": lambda: read(members, stretch),
        "load": lambda: load(members),
        **{case: average(folder, case) for case in WORDS},
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(repetitions + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if number > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_bytes(folder: Path, case: Case) -> int:
    """How far the memory of this process rises above what it was before the call (Linux with glibc)."""
    way = average(folder, case)
    ctypes.CDLL(None).malloc_trim(0)  # else the call would reuse memory that was freed and is counted before it
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _memory_bytes("VmRSS")
    way()
    return _memory_bytes("VmHWM") - before


def _memory_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def measure(*, quick: bool) -> dict[str, Any]:
    """The times in this process, the memory of each case in a fresh one."""
    load = os.getloadavg()[0]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        values = write_members(folder, QUICK_MODEL if quick else MODEL)
        file_bytes = _member(folder, 0).stat().st_size
        seconds = measure_seconds(folder, 2 if quick else REPETITIONS)
        peaks = {}
        for case in WORDS:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
                peaks[case] = fresh.submit(peak_bytes, folder, case).result()
    return {
        "date": date.today().isoformat(),
        "git": git_state(),
        "versions": {name: metadata.version(name) for name in ("sparsetrain", "torch", "safetensors", "timm")},
        "device": {"name": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "load_before": load,
        "total_s": round(time.perf_counter() - start, 1),
        "model": QUICK_MODEL if quick else MODEL,
        "sparsity": SPARSITY,
        "members": MEMBERS,
        "values": values,
        "file_bytes": file_bytes,
        "stretch_bytes": STRETCH_BYTES,
        "seconds": {name: [round(value, 6) for value in all_s] for name, all_s in seconds.items()},
        "peak_bytes": peaks,
    }


def table(results: Mapping[str, Any]) -> str:
    """Time and memory of each way, beside those of reading, and what they were measured with."""
    seconds, size = results["seconds"], results["file_bytes"]
    lines = []
    for name, described in (FOR_COMPARISON | WORDS).items():
        bars, memory = ("", ""), ""
        if name in WORDS:
            bars, memory = (f"<= {BAR:g}", f"<= {MEMORY_BAR:g}"), f"{results['peak_bytes'][name] / size:.2f}"
        least, median = (of(seconds[name]) for of in (min, statistics.median))
        ratios = [f"{of(seconds[name]) / of(seconds['read']):.2f}" for of in (min, statistics.median)]
        lines.append((described, f"{1000 * least:.0f}", f"{1000 * median:.0f}", *ratios, bars[0], memory, bars[1]))
    header = ("what", "minimum, ms", "median, ms", "ratio of minima", "ratio of medians", "bar", "peak, models", "bar")
    return f"{_facts(results)}\n\n{markdown_table(header, lines)}"


def _facts(results: Mapping[str, Any]) -> str:
    device, commit = results["device"], results["git"]["commit"][:10] if results["git"] else "none"
    software = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return (
        f"{results['members']} members of {results['model']}, {results['values']:,} values and "
        f"{results['file_bytes']:,} bytes each, sparsity {results['sparsity']:.0%}; {device['name']}, threads: "
        f"{device['threads']} of {device['cores']}; {software}; {results['date']}, commit {commit}; load average "
        f"before {results['load_before']:.2f}; {len(results['seconds']['read'])} repetitions."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--report", action="store_true", help="only write the table of results/averaging.json")
    modes.add_argument("--quick", action="store_true", help="only try whether it runs; writes nothing")
    arguments = parser.parse_args()
    if arguments.quick:
        print(table(measure(quick=True)))
        return
    if not arguments.report:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(measure(quick=False), indent=1) + "\n")
    results = json.loads(RESULTS.read_text())
    write_between(README, "averaging", table(results))


if __name__ == "__main__":
    main()
