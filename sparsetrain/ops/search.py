"""Which of cuSPARSELt's algorithms is fastest for one product, among those that are right.

An algorithm can crash, hang, or give numbers that are wrong or change from call to call (pytorch/pytorch#155333). They
are tried in another process, which is started again behind the one that ended it.
"""

import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsetrain.ops import cusparselt, library
from sparsetrain.ops.timing import event_us

DEFAULT = 0
GAIN = 1.03  # what another algorithm must be faster by than the default one
ERROR = 1e-2  # largest error allowed, relative to the largest number of the result
_ALGORITHMS = range(100)  # there are fewer; a number that does not exist is refused at once
_INPUTS, _REPEATS, _ROUNDS = 3, 10, 9
_DEATHS, _TIMEOUT_S = 5, 180.0
_OURS = "sparsetrain: "  # begins each line that the process writes for this one


@dataclass(frozen=True)
class Product:
    """The product x @ A^T + bias with a 2:4 matrix A.

    The forward product of a layer [out, in] has rows = out and k = in; its input gradient rows = in, k = out, no bias.

    Args:
        rows: of A, divisible by 16.
        k: columns of A and of x, divisible by 16.
        tokens: rows of x, at least 1.
        dtype: torch.bfloat16 or torch.float16.
        bias: whether there is one.
    """

    rows: int
    k: int
    tokens: int
    dtype: torch.dtype = torch.bfloat16
    bias: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in cusparselt.DTYPES:
            raise ValueError(f"{self.dtype} has no 2:4 kernel; take {' or '.join(map(str, cusparselt.DTYPES))}.")
        if reason := cusparselt.obstacle(torch.Size((self.rows, self.k))):
            raise ValueError(f"There is nothing to search for A [{self.rows}, {self.k}]: {reason}.")
        if self.tokens < 1:
            raise ValueError(f"tokens={self.tokens} must be at least 1: the rows of x.")

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.rows}x{self.k}, {self.tokens} tokens, {dtype}{', bias' if self.bias else ''}"


@dataclass(frozen=True)
class Trial:
    """What one algorithm did.

    Args:
        algorithm: its number.
        error: largest |y - y in float64| over the largest |y in float64|, over several inputs; NaN if y has any.
        stable: whether repeated calls gave the same bits.
        time_us: median time of a call, in microseconds.
        default_us: the same for algorithm 0, measured in turn with it.
    """

    algorithm: int
    error: float
    stable: bool
    time_us: float
    default_us: float

    @property
    def correct(self) -> bool:
        """Whether it may be used at all."""
        return self.error <= ERROR and self.stable and self.time_us > 0


class Cache:
    """Algorithms found before, in a JSON file; of equal cuSPARSELt version, GPU and product only.

    Of two processes that write at once, one may lose an entry, which is searched again another time.

    Args:
        path: the file, read now; it and its folder are made at the first `put`.

    Raises:
        ValueError: the file is there and is something else, or cannot be read.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).expanduser().absolute()  # the working directory may change
        self._found = self._read()

    def get(self, product: Product) -> int | None:
        """The algorithm found for `product` on this GPU, or None."""
        found = self._found.get(_key(product))
        return found if type(found) is int and found in _ALGORITHMS else None

    def put(self, product: Product, algorithm: int) -> None:
        """Keep `algorithm` for `product` on this GPU.

        Raises:
            OSError: the file cannot be written.
        """
        self._found[_key(product)] = algorithm
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(ValueError):  # if it was damaged since
            self._found = {**self._read(), **self._found}  # what others have found meanwhile
        with tempfile.TemporaryDirectory(dir=self.path.parent, prefix=f".{self.path.name}-") as folder:
            new = Path(folder) / self.path.name
            new.write_text(json.dumps(self._found, indent=1) + "\n")
            new.replace(self.path)  # as a whole: another process may read it

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.path} is no cache of algorithms: {error}. Delete it to search again.") from error
        if not isinstance(content, dict):
            raise ValueError(f"{self.path} is no cache of algorithms: not a JSON object. Delete it to search again.")
        return content


def best_algorithm(product: Product, cache: Cache) -> int:
    """The number of the fastest correct algorithm for `product`, for `cusparselt.matmul`.

    It is looked up in `cache`, else searched (which takes some seconds of the GPU) and kept there, or a warning says
    why not.

    Args:
        product: the shapes and the dtype.
        cache: where results are kept.

    Returns:
        0, the default one, unless another is more than 3 % faster.

    Raises:
        RuntimeError: 2:4 products cannot run here, or the default algorithm itself is not correct.
    """
    _check_here(product.dtype)
    algorithm = cache.get(product)
    if algorithm is None:
        algorithm = fastest(sweep(product))
        try:
            cache.put(product, algorithm)
        except OSError as error:
            warnings.warn(f"The algorithm found for {product} is not kept for later runs: {error}.", stacklevel=2)
    return algorithm


def fastest(trials: Sequence[Trial]) -> int:
    """The correct algorithm with the largest gain over the default one, if that is more than 3 %; else the default."""
    gains = {trial.algorithm: trial.default_us / trial.time_us for trial in trials if trial.correct}
    best = max(gains, key=gains.__getitem__, default=DEFAULT)
    return best if gains and gains[best] > GAIN else DEFAULT


def sweep(product: Product, *, command: Sequence[str] | None = None, timeout_s: float = _TIMEOUT_S) -> list[Trial]:
    """Try all algorithms on the current GPU.

    Args:
        product: the shapes and the dtype.
        command: starts the process that tries them, given the product and the first number as JSON; None: `main`.
        timeout_s: after which a process is taken to hang.

    Returns:
        A trial of each algorithm that ran to its end, correct or not, the default one first.

    Raises:
        RuntimeError: 2:4 products cannot run here, or the default algorithm itself is not correct.
    """
    if command is None:
        _check_here(product.dtype)
        torch.cuda.empty_cache()  # the process needs memory of the same GPU
        run = f"import sys; from {__name__} import main; main(*sys.argv[1:])"
        command = (sys.executable, "-c", run, str(torch.cuda.current_device()))
    trials: list[Trial] = []
    first = DEFAULT
    for _ in range(_DEATHS):
        reached, found, end = _run(command, product, first, timeout_s)
        trials += found
        if not trials or trials[0].algorithm != DEFAULT or not trials[0].correct:
            raise RuntimeError(
                f"The default algorithm failed for {product}: {end or found[:1] or 'it was refused'}. "
                "Use backend='reference' for this layer."
            )
        if reached is None or end is None:
            break
        first = reached + 1
    return trials


def _check_here(dtype: torch.dtype) -> None:
    if reason := cusparselt.probe(dtype):
        raise RuntimeError(f"No algorithm can be searched: {reason}. Use the default one, 0.")


def _run(
    command: Sequence[str], product: Product, first: int, timeout_s: float
) -> tuple[int | None, list[Trial], str | None]:
    """Start the process at algorithm `first`: the last one that it began, its trials, why it ended early or None."""
    task = {**asdict(product), "dtype": str(product.dtype).removeprefix("torch."), "first": first}
    text = partial(tempfile.TemporaryFile, "w+", encoding="utf-8", errors="replace")  # libraries write what they like
    with text() as output, text() as errors:
        try:
            done = subprocess.run(
                [*command, json.dumps(task)], stdout=output, stderr=errors, timeout=timeout_s, env=_environment()
            )
            errors.seek(0)
            end = f"exit status {done.returncode}, {errors.read()[-500:].strip()}" if done.returncode else None
        except subprocess.TimeoutExpired:
            end = f"no end after {timeout_s:.0f} s"
        output.seek(0)
        reached, trials = None, []
        for line in output:
            if not (line.startswith(_OURS) and line.endswith("\n")):
                continue  # cut off by the end of the process, or a library's
            try:
                entry, _ = json.JSONDecoder().raw_decode(line.removeprefix(_OURS))  # a library's text may stand behind
            except ValueError:
                continue
            if isinstance(entry, int):
                reached = entry
            else:
                trials.append(Trial(**entry))
    return reached, trials, end


def _environment() -> dict[str, str]:
    """Lets the process find what this one has found, as from a path that a notebook has added."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def _key(product: Product) -> str:
    return " | ".join((f"cuSPARSELt {cusparselt.version()}", torch.cuda.get_device_name(), str(product)))


def try_algorithms(
    product: Product,
    first: int,
    device: torch.device,
    *,
    multiply: Callable[[Tensor, Tensor, Tensor | None, int], Tensor],
    time_us: Callable[[Callable[[], object]], float],
) -> Iterator[int | Trial]:
    """The number of each algorithm from `first` on as it begins, then its trial unless it is refused.

    Args:
        product: the shapes and the dtype.
        first: number of the first algorithm to try.
        device: where.
        multiply: of a compressed A, x, bias and an algorithm.
        time_us: microseconds that a function takes.
    """
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=product.dtype)

    pruned = library.prune(random(product.rows, product.k), 2, 4, product.dtype)
    compressed = library.compress(pruned)
    bias = random(product.rows) if product.bias else None
    inputs = [random(product.tokens, product.k) for _ in range(_INPUTS)]
    exact_bias = None if bias is None else bias.double()
    exact = [torch.nn.functional.linear(x.double(), pruned.double(), exact_bias) for x in inputs]

    def fresh(x: Tensor, algorithm: int) -> Tensor:
        # The result takes the memory that this leaves, so that what a kernel does not write is seen.
        torch.full((product.tokens + -product.tokens % 8, product.rows), math.nan, dtype=product.dtype, device=device)
        return multiply(compressed, x, bias, algorithm)

    for algorithm in _ALGORITHMS[first:]:
        yield algorithm
        try:
            multiply(compressed, inputs[0], bias, algorithm)
        except RuntimeError:
            random(1).item()  # fails too, and ends this process, unless the algorithm was refused in good order
            continue
        results = [fresh(x, algorithm) for x in inputs]
        errors = [(y - e).abs().max() / e.abs().max() for y, e in zip(results, exact, strict=True)]
        stable = all(
            torch.equal(fresh(x, algorithm), y)
            for x, y in zip(inputs, results, strict=True)
            for _ in range(_REPEATS - 1)
        )
        rounds = [
            [time_us(partial(multiply, compressed, inputs[0], bias, one)) for one in (algorithm, DEFAULT)]
            for _ in range(_ROUNDS + 2)
        ][2:]  # the first two warm up
        times = [statistics.median(column) for column in zip(*rounds, strict=True)]
        yield Trial(algorithm, float(torch.stack(errors).max()), stable, times[0], times[1])


def _multiply(compressed: Tensor, x: Tensor, bias: Tensor | None, algorithm: int) -> Tensor:
    return cusparselt.matmul(compressed, x, bias, algorithm=algorithm)


def main(index: str, task: str) -> None:
    """Try algorithms on the GPU of that index; one JSON line for each begin and each trial."""
    fields = json.loads(task)
    first = fields.pop("first")
    product = Product(**{**fields, "dtype": getattr(torch, fields["dtype"])})
    device = torch.device("cuda", int(index))
    torch.cuda.set_device(device)
    for entry in try_algorithms(product, first, device, multiply=_multiply, time_us=event_us):
        line = json.dumps(entry if isinstance(entry, int) else asdict(entry))
        print(f"\n{_OURS}{line}", flush=True)  # a library's line may not have ended
