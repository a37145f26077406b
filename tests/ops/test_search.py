"""Only an algorithm that is right, stable and clearly faster is chosen, whatever the others do to their process."""

import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsetrain.ops import cusparselt, search
from sparsetrain.ops.search import Cache, Product, Trial, best_algorithm, fastest, sweep

REASON = cusparselt.probe()
PRODUCT = Product(32, 48, 20, bias=True)
GOOD = Trial(0, 1e-3, True, 100.0, 100.0)

# Each number but 0 stands for what an algorithm does to its process.
PROCESS = """
import json, os, sys, time
from pathlib import Path
task = json.loads(sys.argv[2])
with Path(sys.argv[1]).open("a") as starts:
    starts.write(str(task["first"]) + "\\n")
for algorithm in range(task["first"], 6):
    print("a library says hello", flush=True)
    sys.stdout.buffer.write(b"r\\xe9glage\\n")
    sys.stderr.buffer.write(b"r\\xe9glage\\n")
    print('sparsetrain: {"cut": ', "says another", flush=True)
    print("sparsetrain:", algorithm, flush=True)
    if algorithm == 1:
        os.abort()
    if algorithm == 2:
        time.sleep(60)
    if algorithm == 3:
        continue
    if algorithm == 4:
        print('sparsetrain: {"algorithm": 4, "err', end="", flush=True)
        os._exit(3)
    time_us = 100.0 - 10.0 * algorithm
    trial = {"algorithm": algorithm, "error": 1e-3, "stable": True, "time_us": time_us, "default_us": 100.0}
    print("sparsetrain:", json.dumps(trial) + "tuned", flush=True)
"""


def test_crashing_hanging_refused_and_half_written_trials_are_survived(tmp_path):
    script, starts = tmp_path / "process.py", tmp_path / "starts"
    script.write_text(PROCESS)
    begin = time.monotonic()
    trials = sweep(PRODUCT, command=(sys.executable, "-S", str(script), str(starts)), timeout_s=2.0)
    assert time.monotonic() - begin < 30  # the hanging one was ended
    assert starts.read_text().split() == ["0", "2", "3", "5"]
    assert [trial.algorithm for trial in trials] == [0, 5]
    assert fastest(trials) == 5


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise SystemExit('no such device')", "exit status 1, no such device"),
        ("print('sparsetrain: 0'); raise SystemExit(2)", "exit status 2"),
        ("print('sparsetrain: 0'); print('sparsetrain: 1')", "it was refused"),
        (
            f"print('sparsetrain: 0'); print('sparsetrain: {json.dumps({**GOOD.__dict__, 'error': math.nan})}')",
            "error=nan",
        ),
    ],
)
def test_a_default_algorithm_that_fails_is_an_error_with_the_reason(code, reason):
    with pytest.raises(RuntimeError, match=rf"failed for 32x48, 20 tokens, bfloat16, bias: .*{reason}.*Use backend"):
        sweep(PRODUCT, command=(sys.executable, "-S", "-c", code), timeout_s=30.0)


def test_the_process_reads_the_task_and_writes_what_is_read_of_it(monkeypatch, capsys, tmp_path):
    task = tmp_path / "task"
    echo = f"import sys; open({str(task)!r}, 'w').write(sys.argv[1]); raise SystemExit(1)"
    with pytest.raises(RuntimeError, match="exit status 1"):
        sweep(PRODUCT, command=(sys.executable, "-S", "-c", echo))
    seen = []

    def try_algorithms(product, first, device, **functions):
        seen.append((product, first, device))
        yield from (first, GOOD, first + 1)

    monkeypatch.setattr(search, "try_algorithms", try_algorithms)
    monkeypatch.setattr(torch.cuda, "set_device", seen.append)
    search.main("2", task.read_text())
    device = torch.device("cuda", 2)
    assert seen == [device, (PRODUCT, 0, device)]
    noisy = capsys.readouterr().out.replace("\nsparsetrain:", "tuning ...\nsparsetrain:")  # a line that is not ended
    lines = f"import sys; sys.stdout.write({noisy!r})"
    assert sweep(PRODUCT, command=(sys.executable, "-S", "-c", lines)) == [GOOD]


@pytest.mark.slow
@pytest.mark.skipif(REASON is None, reason="there is a device with sparse kernels")
def test_by_itself_it_tries_them_in_a_process_on_the_same_gpu(monkeypatch):
    monkeypatch.setattr(cusparselt, "probe", lambda dtype: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    with pytest.raises(RuntimeError, match=r"(?s)exit status 1, .*set_device\(device\)"):
        sweep(PRODUCT)


def test_fast_but_wrong_unstable_and_barely_faster_algorithms_are_not_chosen():
    fast = replace(GOOD, algorithm=1, time_us=50.0)
    rejected = [
        replace(fast, error=0.02),
        replace(fast, error=math.nan),
        replace(fast, stable=False),
        replace(fast, time_us=0.0),  # did nothing
        replace(fast, time_us=98.0),
    ]
    assert [fastest([GOOD, trial]) for trial in rejected] == [0] * len(rejected)
    assert fastest([GOOD, *rejected, replace(fast, algorithm=7, time_us=96.0)]) == 7
    # By its gain over the default in the same rounds, not by its own time: the clock of the GPU moves.
    assert fastest([GOOD, replace(fast, algorithm=3, time_us=80.0, default_us=82.0), replace(fast, algorithm=4)]) == 4


class Algorithms:
    """0 and 1 are right, 2 is wrong in one place, 3 changes from call to call, 4 does not exist, 5 writes NaN at times.

    6 writes nothing: its result is what free memory holds, a right one of the same x unless something was put there.
    """

    def __init__(self, monkeypatch):
        self.calls, self.free = 0, None
        monkeypatch.setattr(torch, "full", self.fill)

    def fill(self, shape, value, **options):
        self.free = torch.empty(shape, **options).fill_(value)
        return self.free

    def __call__(self, compressed, x, bias, algorithm):
        self.calls += 1
        if algorithm == 4 or algorithm > 6:
            raise RuntimeError("CUDA error: invalid value")
        y = torch.nn.functional.linear(x, compressed, bias)
        free, self.free = self.free, None
        if algorithm == 6 and free is not None:
            return free[: len(x)]
        if algorithm == 2:
            y[3, 5] += 1.0
        if algorithm == 3:
            y[0, 0] += 2**-6 * (self.calls % 2)  # within the error that is allowed
        if algorithm == 5 and self.calls % 7 == 0:
            y[1, 1] = math.nan
        return y


def test_trials_see_a_single_wrong_number_a_changing_bit_nan_and_memory_that_is_not_written(monkeypatch):
    algorithms, cpu = Algorithms(monkeypatch), torch.device("cpu")
    events = list(search.try_algorithms(PRODUCT, 0, cpu, multiply=algorithms, time_us=lambda call: 1.0))
    assert [event for event in events if isinstance(event, int)] == list(range(100))
    trials = {event.algorithm: event for event in events if isinstance(event, Trial)}
    assert list(trials) == [0, 1, 2, 3, 5, 6]
    assert [number for number, trial in trials.items() if trial.correct] == [0, 1]
    assert trials[2].stable
    assert trials[2].error > search.ERROR
    assert not trials[3].stable
    assert trials[3].error <= search.ERROR
    later = search.try_algorithms(PRODUCT, 97, cpu, multiply=algorithms, time_us=lambda call: 1.0)
    assert list(later) == [97, 98, 99]


@pytest.fixture
def gpu(monkeypatch):
    """A GPU's names; what is searched is counted, and found to be 7."""
    searched = []

    def find(product):
        searched.append(product)
        return [GOOD, replace(GOOD, algorithm=7, time_us=50.0)]

    monkeypatch.setattr(cusparselt, "probe", lambda dtype: None)
    monkeypatch.setattr(cusparselt, "version", lambda: "0.8.1")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU A")
    monkeypatch.setattr(search, "sweep", find)
    return searched


def test_the_cache_is_used_for_equal_library_gpu_and_product_only(gpu, monkeypatch, tmp_path):
    cache = Cache(tmp_path / "new" / "algorithms.json")
    assert best_algorithm(PRODUCT, cache) == best_algorithm(replace(PRODUCT), Cache(cache.path)) == 7
    assert gpu == [PRODUCT]
    others = [
        replace(PRODUCT, rows=48, k=32),
        replace(PRODUCT, tokens=21),
        replace(PRODUCT, dtype=torch.float16),
        replace(PRODUCT, bias=False),
    ]
    for other in others:
        assert cache.get(other) is None
        best_algorithm(other, cache)
    assert gpu == [PRODUCT, *others]
    monkeypatch.setattr(cusparselt, "version", lambda: "0.8.0")
    assert cache.get(PRODUCT) is None
    monkeypatch.setattr(cusparselt, "version", lambda: "0.8.1")
    assert cache.get(PRODUCT) == 7
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU B")
    assert cache.get(PRODUCT) is None
    assert [path.name for path in cache.path.parent.iterdir()] == ["algorithms.json"]
    beside = cache.path.with_name("other")
    beside.touch()
    assert cache.path.stat().st_mode == beside.stat().st_mode  # others may read it


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", None], ids=["cut", "list", "binary", "folder"])
def test_a_spoiled_cache_is_an_error_with_the_remedy(gpu, tmp_path, content):
    path = tmp_path / "algorithms.json"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is no cache of algorithms.*Delete it"):
        Cache(path)


@pytest.mark.parametrize("value", ["abc", [1], math.inf, -3, 100, 7.0, True, None])
def test_what_is_no_algorithm_in_a_cache_is_searched_anew(gpu, tmp_path, value):
    path = tmp_path / "algorithms.json"
    path.write_text(json.dumps({search._key(PRODUCT): value}))
    assert best_algorithm(PRODUCT, Cache(path)) == 7
    assert gpu == [PRODUCT]
    assert json.loads(path.read_text()) == {search._key(PRODUCT): 7}


def test_a_cache_that_cannot_be_written_warns_and_what_was_found_is_used(gpu, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache = Cache("a.json")
    Path("b").mkdir()
    monkeypatch.chdir("b")  # which does not move the file
    assert best_algorithm(PRODUCT, cache) == 7
    assert (tmp_path / "a.json").exists()
    cache = Cache(tmp_path / "folder" / "a.json")
    (tmp_path / "folder").touch()  # a file in its place
    with pytest.warns(UserWarning, match=r"The algorithm found for 32x.* is not kept for later runs: .*folder"):
        assert best_algorithm(PRODUCT, cache) == 7
    assert cache.get(PRODUCT) == 7


def test_entries_that_another_process_has_added_stay(gpu, tmp_path):
    mine, other = Cache(tmp_path / "a.json"), Cache(tmp_path / "a.json")
    more = replace(PRODUCT, bias=False)
    other.put(more, 3)
    mine.put(PRODUCT, 5)
    both = Cache(tmp_path / "a.json")
    assert (both.get(PRODUCT), both.get(more)) == (5, 3)
    (tmp_path / "a.json").write_text("{")  # damaged in between
    mine.put(PRODUCT, 6)
    assert Cache(tmp_path / "a.json").get(PRODUCT) == 6


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"rows": 24, "k": 32, "tokens": 8}, "the output has 24"),
        ({"rows": 32, "k": 24, "tokens": 8}, "the input has 24"),
        ({"rows": 32, "k": 32, "tokens": 0}, "tokens=0 must be at least 1"),
        ({"rows": 32, "k": 32, "tokens": 8, "dtype": torch.float32}, "torch.float32 has no 2:4 kernel"),
    ],
)
def test_products_without_a_kernel_are_refused(fields, reason):
    with pytest.raises(ValueError, match=reason):
        Product(**fields)


@pytest.mark.skipif(REASON is None, reason="there is a device with sparse kernels")
def test_without_a_gpu_a_search_is_refused_with_the_reason(tmp_path):
    for call in (lambda: sweep(PRODUCT), lambda: best_algorithm(PRODUCT, Cache(tmp_path / "algorithms.json"))):
        with pytest.raises(RuntimeError, match=f"No algorithm can be searched: {REASON}. Use the default one, 0."):
            call()


def test_the_version_is_that_of_the_library_that_torch_has_loaded():
    if torch.backends.cusparselt.is_available():
        major, minor, patch = map(int, cusparselt.version().split("."))
        assert 1000 * major + 100 * minor + patch == torch.backends.cusparselt.version()
    else:
        assert cusparselt.version() is None


@pytest.mark.gpu
@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_a_search_on_a_gpu_ends_with_a_correct_algorithm():
    product = Product(1024, 512, 4096, bias=True)
    trials = sweep(product)
    assert trials[0].algorithm == 0
    assert trials[0].correct
    assert next(trial for trial in trials if trial.algorithm == fastest(trials)).correct
