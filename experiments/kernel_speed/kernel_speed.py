"""How fast are 2:4 products, and training steps with them, beside dense ones? Runs on the GPU that it finds.

python experiments/kernel_speed/kernel_speed.py             # every part; writes results/<GPU>_<cuSPARSELt>.json
python experiments/kernel_speed/kernel_speed.py --parts mlp vit --budget 500 --out FILE
python experiments/kernel_speed/kernel_speed.py --preload libcusparseLt.so.0    # of another wheel than torch's
python experiments/kernel_speed/kernel_speed.py --quick --out FILE              # small; on a CPU too, without kernels
python experiments/kernel_speed/kernel_speed.py --report    # the tables of this folder's README.md
"""

import argparse
import gc
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from kernel_tables import tables
from torch import Tensor, nn

import sparsetrain
from sparsetrain.cli.artifacts import git_state
from sparsetrain.ops import NMRule, convert, cusparselt, effective_layers, library, policy, search
from sparsetrain.report import write_between
from sparsetrain.selection import Selection

HERE = Path(__file__).parent
RESULTS, README = HERE / "results", HERE / "README.md"

BDWP = NMRule(2, 4, backward="bidirectional")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
CACHE_BYTES = 256 << 20  # rotated buffers together, several times the L2 cache of any GPU
BLOCK_US = 20_000.0  # of work between two looks at the clock

Row = dict[str, Any]


@dataclass(frozen=True)
class Transformer:
    """A network of blocks: of timm's ViT `name`, or of a GPT that is built here.

    Args:
        batch: images or sequences in a step.
        name: of timm's model; empty for a GPT.
        options: of timm's model.
        width: of the GPT.
        depth: its blocks.
        heads: its attention heads.
        vocabulary: its tokens.
        length: of its sequences.
    """

    batch: int
    name: str = ""
    options: tuple[tuple[str, int], ...] = ()
    width: int = 0
    depth: int = 0
    heads: int = 0
    vocabulary: int = 0
    length: int = 0


@dataclass(frozen=True)
class Scale:
    """How large everything is.

    Args:
        products: rows (outputs), tokens and k (inputs) of y = x @ W^T.
        dtypes: of the products.
        weights: outputs and inputs of the weights that are pruned and compressed.
        mlp: width and tokens of each block.
        vit: whole steps of a ViT.
        gpt: whole steps of a GPT.
        rounds: looks at each variant, in turn; one value is their median.
        step_rounds: the same for whole training steps.
        calls: of one operator in the part that looks for growing memory.
    """

    products: tuple[tuple[int, int, int], ...]
    dtypes: tuple[str, ...]
    weights: tuple[tuple[int, int], ...]
    mlp: tuple[tuple[int, int], ...]
    vit: Transformer
    gpt: Transformer
    rounds: int
    step_rounds: int
    calls: int


FULL = Scale(
    products=(
        (4096, 16384, 1024),
        (1024, 16384, 4096),
        (16384, 16384, 4096),
        (4096, 16384, 16384),
        (8192, 8192, 8192),
    ),
    dtypes=("bfloat16", "float16"),
    weights=((1024, 1024), (4096, 1024), (1024, 4096), (8192, 2048), (16384, 4096), (4096, 16384)),
    mlp=tuple((width, tokens) for width in (1024, 2048, 4096) for tokens in (16384, 32768)),
    vit=Transformer(128, "vit_large_patch16_224"),
    gpt=Transformer(16, width=2048, depth=16, heads=16, vocabulary=50304, length=1024),
    rounds=21,
    step_rounds=11,
    calls=20_000,
)
QUICK = Scale(
    products=((256, 512, 128), (128, 500, 256)),
    dtypes=("bfloat16", "float16"),
    weights=((256, 128), (128, 256)),
    mlp=((64, 256),),
    vit=Transformer(4, "vit_tiny_patch16_224", (("img_size", 64), ("depth", 2))),
    gpt=Transformer(2, width=64, depth=2, heads=2, vocabulary=256, length=64),
    rounds=3,
    step_rounds=2,
    calls=200,
)


class Bench:
    """Times functions on one device, in turn.

    Args:
        device: where; microseconds are between CUDA events, on a CPU those of the clock.
        scale: how large everything is.
        deadline: of `time.monotonic`; nothing new is begun after it.
    """

    def __init__(self, device: torch.device, scale: Scale, deadline: float = float("inf")) -> None:
        self.device, self.scale, self.deadline = device, scale, deadline
        self.generator = torch.Generator(device).manual_seed(0)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def random(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=dtype)

    def compile(self, function: Any, mode: str | None = None) -> Any:
        """What `torch.compile` makes of a function or a module; on a CPU it is only traced."""
        if not self.on_gpu:
            return torch.compile(function, backend="eager", dynamic=False)
        return torch.compile(function, mode=mode, dynamic=False)

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def interleaved(self, variants: Mapping[str, Callable[[int], object]], rounds: int) -> dict[str, Row]:
        """Microseconds of a call of each variant: the median of `rounds` blocks, all blocks, and calls in a block.

        Args:
            variants: are given the number of the call, to take other buffers each time.
            rounds: in each, every variant has one block, another one first.
        """
        calls: dict[str, int] = {}
        us: dict[str, list[float]] = {}
        for name, function in variants.items():
            self._block_us(function, 2)  # compiles
            least = min(self._block_us(function, 1) for _ in range(2))
            calls[name] = max(1, min(50, round(BLOCK_US / least))) if self.on_gpu else 1
            us[name] = []
        names = list(variants)
        for number in range(rounds):
            start = number % len(names)
            for name in names[start:] + names[:start]:
                us[name].append(self._block_us(variants[name], calls[name]))
        return {
            name: {
                "median_us": round(statistics.median(values), 2),
                "all_us": [round(value, 2) for value in values],
                "calls": calls[name],
            }
            for name, values in us.items()
        }

    def _block_us(self, function: Callable[[int], object], calls: int) -> float:
        if not self.on_gpu:
            begin = time.perf_counter()
            for number in range(calls):
                function(number)
            return (time.perf_counter() - begin) * 1e6 / calls
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.synchronize()
        start.record()
        for number in range(calls):
            function(number)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / calls


def products(bench: Bench) -> Iterator[Callable[[], Row]]:
    """One product y = x @ W^T: dense, masked, and sparse with the default algorithm; errors against float64."""
    for dtype in bench.scale.dtypes:
        for shape in bench.scale.products:
            yield partial(_product, bench, shape, dtype)


def _product(bench: Bench, shape: tuple[int, int, int], dtype: str) -> Row:
    variants, operands = _product_variants(bench, shape, DTYPES[dtype])
    compiled = bench.compile(_linear, "max-autotune-no-cudagraphs")
    xs, weights, pruned, masks, _ = operands
    count = len(xs)
    variants |= {
        "dense_compiled": lambda i: compiled(xs[i % count], weights[i % count]),
        "masked": lambda i: F.linear(xs[i % count], weights[i % count] * masks[i % count]),
    }
    us = bench.interleaved(variants, bench.scale.rounds)
    exact = F.linear(xs[0].double(), pruned[0].double())
    results = {"dense": F.linear(xs[0], pruned[0]), "sparse": variants["sparse"](0)}
    rows, tokens, k = shape
    return {
        "rows": rows, "tokens": tokens, "k": k, "dtype": dtype, "buffers": count, "us": us,
        "error": {name: _error(y, exact) for name, y in results.items()}, "gpu": gpu_state(),
    }  # fmt: skip


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


def _product_variants(
    bench: Bench, shape: tuple[int, int, int], dtype: torch.dtype
) -> tuple[dict[str, Callable[[int], Tensor]], tuple[list[Tensor], ...]]:
    """Dense and sparse calls over several sets of buffers, and these: x, W, pruned W, its mask, compressed W."""
    rows, tokens, k = shape
    size_bytes = (tokens * k + rows * k + rows * tokens) * dtype.itemsize
    count = max(3, -(-CACHE_BYTES // size_bytes)) if bench.on_gpu else 1
    xs = [bench.random(tokens, k, dtype=dtype) for _ in range(count)]
    weights = [bench.random(rows, k, dtype=dtype) for _ in range(count)]
    pruned = [library.prune(weight, 2, 4, dtype) for weight in weights]
    masks = [weight != 0 for weight in pruned]
    compressed = [library.compress(weight) for weight in pruned]
    variants: dict[str, Callable[[int], Tensor]] = {
        "dense": lambda i: F.linear(xs[i % count], weights[i % count]),
        "sparse": lambda i: library.spmm(compressed[i % count], xs[i % count], None),
    }
    return variants, (xs, weights, pruned, masks, compressed)


def _error(y: Tensor, exact: Tensor) -> float:
    """The norm of the difference from the product in float64 over the norm of that."""
    return float((y.double() - exact).norm() / exact.norm())


def algorithms(bench: Bench) -> Iterator[Callable[[], Row]]:
    """The search over cuSPARSELt's algorithms, and the one found beside the default one; a GPU is needed."""
    for dtype in bench.scale.dtypes if bench.on_gpu else ():
        for shape in bench.scale.products:
            yield partial(_algorithm, bench, shape, dtype)


def _algorithm(bench: Bench, shape: tuple[int, int, int], dtype: str) -> Row:
    rows, tokens, k = shape
    trials = search.sweep(search.Product(rows, k, tokens, DTYPES[dtype]))
    algorithm = search.fastest(trials)
    variants, (xs, _, _, _, compressed) = _product_variants(bench, shape, DTYPES[dtype])

    def searched(i: int) -> Tensor:
        i %= len(xs)
        return cusparselt.matmul(compressed[i], xs[i], None, algorithm=algorithm)

    us = bench.interleaved({**variants, "searched": searched}, bench.scale.rounds)
    return {
        "rows": rows, "tokens": tokens, "k": k, "dtype": dtype, "algorithm": algorithm, "us": us,
        "trials": [asdict(trial) for trial in trials], "gpu": gpu_state(),
    }  # fmt: skip


def packing(bench: Bench) -> Iterator[Callable[[], Row]]:
    """What a weight costs in each optimizer step: both pruned operands from float32, and their compression."""
    for shape in bench.scale.weights:
        yield partial(_packing, bench, shape)


def _packing(bench: Bench, shape: tuple[int, int]) -> Row:
    out, inner = shape
    count = max(3, -(-CACHE_BYTES // (out * inner * 8))) if bench.on_gpu else 1
    weights = [bench.random(out, inner) for _ in range(count)]
    operands = [library.prune_dual_t(weight, 2, 4, torch.bfloat16) for weight in weights]

    def compress(i: int) -> None:
        for operand in operands[i % count]:
            library.compress(operand)

    us = bench.interleaved(
        {
            "prune": lambda i: library.prune_dual_t(weights[i % count], 2, 4, torch.bfloat16),
            "compress": compress,
            "copy": lambda i: weights[i % count].clone(),
        },
        bench.scale.rounds,
    )
    # A weight: 4 bytes read, two operands of 2 bytes and two masks of a bit written; each operand read, 9/16 written.
    bytes_per_weight = {"prune": 4 + 2 * 2, "compress": 2 * (2 + 2 * 9 / 16), "copy": 4 + 4}
    for name, size in bytes_per_weight.items():
        us[name]["gb_per_s"] = round(size * out * inner / us[name]["median_us"] / 1e3, 2)
    return {"out": out, "in": inner, "us": us, "gpu": gpu_state()}


def host(bench: Bench) -> Iterator[Callable[[], Row]]:
    """Time of the host for a call, of products so small that the device never makes it wait."""
    yield partial(_host, bench)


def _host(bench: Bench) -> Row:
    calls, size = (500, 256) if bench.on_gpu else (20, 64)
    x, weight = (bench.random(size, size, dtype=torch.bfloat16) for _ in range(2))
    pruned = library.prune(weight, 2, 4, torch.bfloat16)
    compressed = library.compress(pruned)
    variants: dict[str, Callable[[], object]] = {
        "dense": lambda: F.linear(x, weight),
        "sparse": lambda: library.spmm(compressed, x, None),
        "compress": lambda: library.compress(pruned),
    }
    if bench.on_gpu:
        variants["sparse, without the operator's wrapper"] = lambda: cusparselt.matmul(compressed, x, None)
    us: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(bench.scale.rounds + 1):
        for name, function in variants.items():
            bench.synchronize()
            begin = time.perf_counter()
            for _ in range(calls):
                function()
            us[name].append((time.perf_counter() - begin) * 1e6 / calls)
    medians = {name: {"median_us": round(statistics.median(values[1:]), 2)} for name, values in us.items()}
    return {"size": size, "calls": calls, "us": medians}


def memory(bench: Bench) -> Iterator[Callable[[], Row]]:
    """Growth of the process's memory and of the device's over many calls."""
    for name in ("dense", "sparse", "compress"):
        yield partial(_memory, bench, name)


def _memory(bench: Bench, name: str) -> Row:
    x, weight = (bench.random(256, 256, dtype=torch.bfloat16) for _ in range(2))
    pruned = library.prune(weight, 2, 4, torch.bfloat16)
    compressed = library.compress(pruned)
    call: Callable[[], object] = {
        "dense": lambda: F.linear(x, weight),
        "sparse": lambda: library.spmm(compressed, x, None),
        "compress": lambda: library.compress(pruned),
    }[name]
    calls, samples = bench.scale.calls, []
    for number in range(calls + calls // 10 + 1):
        if number >= calls // 10 and (number - calls // 10) % (calls // 10) == 0:  # the first tenth warms up
            bench.synchronize()
            free, total = torch.cuda.mem_get_info() if bench.on_gpu else (0, 0)
            samples.append({"host_bytes": resident_bytes(), "device_bytes": total - free})
        call()
    growth = {key: (samples[-1][key] - samples[0][key]) / calls for key in samples[0]}
    return {"call": name, "calls": calls, "growth_per_call": growth, "samples": samples}


def mlp(bench: Bench) -> Iterator[Callable[[], Row]]:
    """Forward and backward of a block d -> 4d -> d, with the pruning and compression of one optimizer step."""
    for width, tokens in bench.scale.mlp:
        yield partial(_mlp, bench, width, tokens)


def _mlp(bench: Bench, width: int, tokens: int) -> Row:
    def block() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)).to(bench.device)

    count = 3 if bench.on_gpu else 1
    xs = [bench.random(tokens, width, dtype=torch.bfloat16).requires_grad_() for _ in range(count)]
    gs = [bench.random(tokens, width, dtype=torch.bfloat16) for _ in range(count)]
    dense, masked, sparse = block(), block(), block()
    light = block().to(torch.bfloat16)
    for module, backend in ((masked, "reference"), (sparse, "cusparselt")):
        convert(module, BDWP)
        _run_on(module, backend)

    def step(module: nn.Module, call: Callable[[Tensor], Tensor], i: int) -> None:
        refresh_(module)
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=module is not light):
            y = call(xs[i % count])
        y.backward(gs[i % count])
        xs[i % count].grad = None
        module.zero_grad()

    compiled = bench.compile(dense)
    us = bench.interleaved(
        {
            "dense": partial(step, dense, dense),
            "dense_compiled": partial(step, dense, compiled),
            "dense_bfloat16": partial(step, light, light),
            "masked": partial(step, masked, masked),
            "sparse": partial(step, sparse, sparse),
        },
        bench.scale.rounds,
    )
    return {"width": width, "tokens": tokens, "us": us, "gpu": gpu_state()}


def vit(bench: Bench) -> Iterator[Callable[[], Row]]:
    """Whole training steps of a ViT."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model(config.name, **dict(config.options)).to(bench.device)

    def row() -> Row:
        plain = make()
        size, patches = plain.patch_embed.img_size, plain.patch_embed.num_patches + 1
        images = [bench.random(config.batch, 3, *size) for _ in range(3)]
        labels = torch.randint(plain.num_classes, (config.batch,), device=bench.device)
        where = Selection(include=("blocks.*.weight",))
        return _steps(bench, plain, make(), where, config.batch * patches, images, labels)

    config = bench.scale.vit
    yield lambda: {"name": config.name, "batch": config.batch, **row()}


class Block(nn.Module):
    """A GPT block: causal attention and an MLP of four times the width, each after a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.rise, self.fall = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.fall(F.gelu(self.rise(self.norm_mlp(x))))


class GPT(nn.Module):
    """Token and position embeddings, blocks, and a head of its own."""

    def __init__(self, config: Transformer) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.places = nn.Parameter(0.02 * torch.randn(config.length, config.width))
        self.blocks = nn.Sequential(*[Block(config.width, config.heads) for _ in range(config.depth)])
        self.norm, self.head = nn.LayerNorm(config.width), nn.Linear(config.width, config.vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.tokens(tokens) + self.places))).flatten(0, 1)


def gpt(bench: Bench) -> Iterator[Callable[[], Row]]:
    """Whole training steps of a GPT."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        return GPT(config).to(bench.device)

    def row() -> Row:
        shape = (config.batch, config.length)
        texts = [torch.randint(config.vocabulary, shape, device=bench.device) for _ in range(3)]
        labels = torch.randint(config.vocabulary, (config.batch * config.length,), device=bench.device)
        where = Selection(include=("blocks.*.weight",))
        return _steps(bench, make(), make(), where, config.batch * config.length, texts, labels)

    config = bench.scale.gpt
    name = f"GPT, width {config.width}, {config.depth} blocks, length {config.length}"
    yield lambda: {"name": name, "batch": config.batch, **row()}


def _steps(
    bench: Bench,
    plain: nn.Module,
    method: nn.Module,
    where: Selection,
    tokens: int,
    inputs: Sequence[Tensor],
    labels: Tensor,
) -> Row:
    """Training steps under bfloat16 autocast with AdamW: dense, and BDWP in the blocks on the backend of "auto"."""
    convert(method, BDWP, where=where)
    decisions = policy.choose(method, "auto", tokens=tokens, dtype=torch.bfloat16)
    optimizers = {
        module: torch.optim.AdamW(module.parameters(), lr=1e-5, fused=bench.on_gpu) for module in (plain, method)
    }

    def step(module: nn.Module, call: Callable[[Tensor], Tensor], i: int) -> None:
        refresh_(module)
        with torch.autocast(bench.device.type, torch.bfloat16):
            loss = F.cross_entropy(call(inputs[i % len(inputs)]), labels)
        loss.backward()
        optimizers[module].step()
        optimizers[module].zero_grad()

    compiled, compiled_method = bench.compile(plain), bench.compile(method)
    us = bench.interleaved(
        {
            "dense": partial(step, plain, plain),
            "dense_compiled": partial(step, plain, compiled),
            "bdwp": partial(step, method, method),
            "bdwp_compiled": partial(step, method, compiled_method),
        },
        bench.scale.step_rounds,
    )
    return {
        "tokens": tokens,
        "us": us,
        "sparse_layers": sum(decision.backend == "cusparselt" for decision in decisions),
        "layers": len(decisions),
        "decisions": [str(decision) for decision in decisions],
        "gpu": gpu_state(),
    }


def refresh_(module: nn.Module) -> None:
    """What a callback does once in each optimizer step: prune, and compress where kernels are sparse."""
    for _, layer in effective_layers(module):
        layer.refresh_(torch.bfloat16)


def _run_on(module: nn.Module, backend: str) -> None:
    """Set the backend without asking whether a GPU has it: a CPU's sparse operators multiply uncompressed."""
    for _, layer in effective_layers(module):
        layer.backend = backend
        layer.forget()


PARTS: dict[str, Callable[[Bench], Iterator[Callable[[], Row]]]] = {
    "products": products,
    "packing": packing,
    "host": host,
    "memory": memory,
    "mlp": mlp,
    "vit": vit,
    "gpt": gpt,
    "algorithms": algorithms,
}


def measure(bench: Bench, parts: Sequence[str], save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Rows of each part, what failed, and what time did not suffice for; `save` gets all of it after each row."""
    found: dict[str, Any] = {"rows": {}, "failures": [], "left_out": []}
    for part in parts:
        found["rows"][part] = []
        for number, make in enumerate(PARTS[part](bench)):
            if time.monotonic() > bench.deadline:
                found["left_out"].append(f"{part} {number}")
                continue
            gc.collect()
            torch.compiler.reset()
            if bench.on_gpu:
                torch.cuda.empty_cache()
            begin = time.monotonic()
            try:
                row = make()
                row["seconds"] = round(time.monotonic() - begin, 1)
                found["rows"][part].append(row)
            except Exception as error:  # the other rows are worth having
                found["failures"].append({"part": part, "row": number, "error": f"{type(error).__name__}: {error}"})
            print(f"{part} {number}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
            save(found)
    save(found)
    return found


def environment(bench: Bench, *, quick: bool) -> dict[str, Any]:
    """What every number depends on."""
    device: dict[str, Any] = {"type": bench.device.type, "name": platform.processor() or platform.machine()}
    if bench.on_gpu:
        driver = (nvidia_smi("driver_version") or ["unknown"])[0]
        device = {"type": "cuda", "name": torch.cuda.get_device_name(), "driver": driver}
    return {
        "quick": quick,
        "device": device,
        "versions": {
            "sparsetrain": sparsetrain.__version__,
            "torch": torch.__version__,
            "CUDA": torch.version.cuda,
            "cuSPARSELt": cusparselt.version(),
            "timm": timm.__version__,
            "python": platform.python_version(),
        },
    }


def nvidia_smi(*fields: str) -> list[str] | None:
    """What nvidia-smi says of the current GPU, or None where it cannot be asked."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.splitlines()
    return [value.strip() for value in lines[torch.cuda.current_device()].split(",")]


def gpu_state() -> dict[str, str] | None:
    """Clock, power and temperature just after a measurement; None on a CPU."""
    fields = ("clocks.sm", "power.draw", "temperature.gpu")
    values = nvidia_smi(*fields) if torch.cuda.is_available() else None
    return dict(zip(("sm_mhz", "power_w", "temperature_c"), values, strict=True)) if values else None


def resident_bytes() -> int:
    """Memory of this process that is in RAM; Linux only."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) << 10


def load_results(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """All results files, in the order of their names.

    Raises:
        ValueError: one is not of a whole run on a GPU.
    """
    results = []
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        if result["quick"] or result["device"]["type"] != "cuda":
            kind = "a quick run" if result["quick"] else f"a {result['device']['type']}"
            raise ValueError(f"{path.name} is of {kind}; only whole runs on a GPU are results. Move it elsewhere.")
        results.append(result)
    return results


def write_report() -> None:
    write_between(README, "tables", tables(*load_results()))


def run(
    path: Path | None, parts: Sequence[str], *, scale: Scale, quick: bool, budget_s: float, commit: str | None
) -> dict[str, Any]:
    """Measure, and write JSON after each row; parts of an earlier run in the same environment stay in the file.

    Raises:
        SystemExit: the file is of another environment, or no file is named on a CPU.
    """
    bench = Bench(torch.device("cuda" if torch.cuda.is_available() else "cpu"), scale, time.monotonic() + budget_s)
    here = environment(bench, quick=quick)
    if path is None:
        if quick or not bench.on_gpu:
            raise SystemExit("What is measured on a CPU, or quickly, is no result: name a file by --out.")
        path = RESULTS / f"{_slug(here['device']['name'])}_{here['versions']['cuSPARSELt']}.json"
    old = json.loads(path.read_text()) if path.exists() else {**here, "rows": {}, "failures": [], "left_out": []}
    if any(old[key] != here[key] for key in here):
        raise SystemExit(f"{path} is of another device, other versions or another scale. Name another file by --out.")
    git = git_state()
    facts = {**here, "date": date.today().isoformat(), "commit": commit or (git["commit"] if git else None)}

    def whole(found: Mapping[str, Any]) -> dict[str, Any]:
        kept = {part: rows for part, rows in old["rows"].items() if part not in parts}
        failures = [failed for failed in old["failures"] if failed["part"] not in parts]
        left_out = [name for name in old["left_out"] if name.split()[0] not in parts]
        return {
            **facts,
            "rows": {**kept, **found["rows"]},
            "failures": failures + found["failures"],
            "left_out": left_out + found["left_out"],
        }

    def save(found: Mapping[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(json.dumps(whole(found), indent=1) + "\n")
        temporary.replace(path)

    return whole(measure(bench, parts, save))


def _slug(name: str) -> str:
    return re.sub(r"\W+", "_", name.lower()).strip("_")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only write the tables of results/*.json")
    parser.add_argument("--out", type=Path, help="the JSON file; parts that it holds and that are not run again stay")
    parser.add_argument("--quick", action="store_true", help="small and few: try whether everything runs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure, in this order")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no new row is begun")
    parser.add_argument("--preload", type=Path, help="a libcusparseLt.so.0 to use in place of the one torch brings")
    parser.add_argument("--commit", help="to write down where git is not at hand")
    arguments = parser.parse_args()
    if arguments.report:
        write_report()
        return
    if arguments.preload and os.environ.get("LD_PRELOAD") != str(arguments.preload.resolve()):
        # torch finds its own library by RPATH, before LD_LIBRARY_PATH: only one that is loaded already wins.
        environment_ = {**os.environ, "LD_PRELOAD": str(arguments.preload.resolve())}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment_)
    if not (torch.cuda.is_available() or arguments.quick):
        raise SystemExit("torch sees no CUDA device; --quick --out FILE tries the script without one.")
    warnings.simplefilter("ignore")
    scale = QUICK if arguments.quick else FULL
    results = run(
        arguments.out,
        arguments.parts,
        scale=scale,
        quick=arguments.quick,
        budget_s=arguments.budget,
        commit=arguments.commit,
    )
    print(tables(results))


if __name__ == "__main__":
    main()
