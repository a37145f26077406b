"""N:M methods on 2:4 kernels: who decides, when, and that the same network is trained.

The operators have exact kernels on a CPU, so that only the probe and the timing are replaced here.
"""

import itertools
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from callbacks.nm_network import BDWP, STE, Batch, Master, Regression, is_n_of_m, kinds, train
from callbacks.test_base import Metrics
from conformance.harness import STEPS, PlainModule, fit
from conformance.test_exact_resume import Setting, resume_everywhere
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn

from sparsetrain import Selection, ops
from sparsetrain.callbacks.backends import BackendChoice, _note_tokens
from sparsetrain.ops import cusparselt, library, policy, search
from sparsetrain.ops.policy import Decision

REASON = cusparselt.probe()
BF16: dict[str, Any] = {"precision": "bf16-mixed"}


@pytest.fixture
def as_if_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe says yes."""
    monkeypatch.setattr(cusparselt, "probe", lambda dtype=torch.bfloat16, device=None: None)


@pytest.fixture
def timings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, ...], int]]:
    """Shape and tokens of what has been timed; the kernels win for 16 outputs."""
    timed = []

    def time_us(layer: ops.EffectiveLinear, tokens: int, *_: Any) -> tuple[float, float]:
        timed.append((tuple(layer.weight.shape), tokens))
        return 100.0, 80.0 if len(layer.weight) == 16 else 99.0

    monkeypatch.setattr(policy, "_time_us", time_us)
    return timed


class Count(L.Callback):
    """Counts the calls of an operator, by batch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.calls, self.by_batch = 0, []
        operator = getattr(library, name)

        def count(*arguments: Any) -> Tensor:
            self.calls += 1
            return operator(*arguments)

        monkeypatch.setattr(library, name, count)

    def on_train_batch_start(self, *_: Any) -> None:
        self.by_batch.append(self.calls)


class Net(nn.Sequential):
    """A 1x1 convolution and linear layers; of the last two one is called twice, and one has no kernel."""

    def __init__(self) -> None:
        torch.manual_seed(4)
        super().__init__(
            nn.Conv2d(16, 16, 1, stride=2), nn.Flatten(), nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 12)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self[2](self[1](self[0](x).relu()).relu())
        for _ in range(2):
            x = self[3](x).relu()
        return self[4](x)


def data(count: int) -> list[Batch]:
    stream = torch.Generator().manual_seed(5)
    return [(torch.randn(6, 16, 4, 4, generator=stream), torch.randn(6, 12, generator=stream)) for _ in range(count)]


METHODS = [
    pytest.param(partial(BDWP, decay=0.01), id="bdwp"),
    pytest.param(partial(STE, decay=0.01), id="sr_ste"),
    pytest.param(partial(STE, decay=0.01, transposable=True, refresh="2it"), id="transposable"),
]


@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-6), ("bf16-mixed", 5e-3)])
@pytest.mark.parametrize("method", METHODS)
def test_on_kernels_the_network_is_trained_that_the_reference_trains(
    monkeypatch, as_if_sparse, method, precision, tolerance
):
    def trained(backend: str) -> tuple[Master, L.LightningModule]:
        record = Master()
        callback = method(backend=backend)
        module, _ = train(
            Regression(Net(), lr=0.02), data(5), callback, record, products, precision=precision, limit_val_batches=2
        )
        return record, module

    monkeypatch.setattr(cusparselt, "DTYPES", (torch.float32, torch.bfloat16))
    products = Count(monkeypatch, "spmm")
    dense, reference = trained("reference")
    assert products.calls == 0
    sparse, module = trained("cusparselt")
    # Four calls of three layers forward, and back all but the first, which needs no input gradient.
    backward = 0 if method.func is STE and "transposable" not in method.keywords else 3
    assert products.calls == 5 * (4 + backward) + 2 * 4
    for ours, theirs in zip(sparse.masters, dense.masters, strict=True):
        for name, weight in ours.items():
            torch.testing.assert_close(weight, theirs[name], rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(sparse.outputs, dense.outputs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=10 * tolerance, atol=10 * tolerance)
    assert kinds(module.net) == kinds(Net())
    for index in (0, 2, 3, 4):
        weight = module.net[index].weight.detach()
        assert is_n_of_m(weight)
        expected = reference.net[index].weight.detach()
        torch.testing.assert_close(weight, expected, rtol=tolerance, atol=tolerance)


def test_weights_are_compressed_once_per_optimizer_step(monkeypatch, as_if_sparse):
    count = Count(monkeypatch, "compress")
    train(Regression(Net()), data(9), BDWP(backend="cusparselt"), count, accumulate_grad_batches=3, **BF16)
    both = 2 * 3  # directions, layers
    assert [after - before for before, after in itertools.pairwise(count.by_batch)] == [both, 0, 0] * 2 + [both, 0]


class Present(L.Callback):
    """Asserts after each forward that what the kernels multiply follows from the present master."""

    def __init__(self) -> None:
        self.looked = 0

    def look(self, pl_module: L.LightningModule) -> None:
        for _, layer in ops.effective_layers(pl_module):
            assert layer._fresh
            weight = layer.weight.detach().flatten(1)
            forward, backward = ops.NMRule(2, 4, backward="bidirectional").weights(weight, torch.bfloat16)
            for made, expected in zip(layer._compressed, (forward, backward.t()), strict=True):
                assert torch.equal(made, expected)
                self.looked += 1

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.look(pl_module)

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.look(pl_module)


@pytest.mark.parametrize("settings", [{}, {"val_check_interval": 2}, {"accumulate_grad_batches": 2}])
def test_kernels_multiply_the_present_master_or_the_average_that_takes_its_place(as_if_sparse, settings):
    present = Present()
    fit(BDWP(backend="cusparselt"), EMAWeightAveraging(decay=0.5), present, **BF16, **settings)
    assert present.looked >= 2 * (STEPS + 3)


def test_it_resumes_bit_identically_on_kernels_and_from_them_into_a_dense_tail(tmp_path, as_if_sparse):
    def make() -> list[L.Callback]:
        method = STE(transposable=True, refresh="4it", sparse_until=11, backend="cusparselt")
        return [method, EMAWeightAveraging(decay=0.5)]

    setting = Setting("bf16", trainer={**BF16, "accumulate_grad_batches": 2, "max_epochs": 5})
    assert not resume_everywhere(tmp_path, make, setting, moments=lambda saved: saved.batches in (7, 12, 20))


# The decision.


class Hooks(L.Callback):
    """How many hooks note tokens before each batch, and how many hooks layers have after the last one."""

    def __init__(self) -> None:
        self.found: list[int] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        hooks = [hook for layer in pl_module.modules() for hook in layer._forward_pre_hooks.values()]
        self.found.append(sum(hook.func is _note_tokens for hook in hooks))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert not any(layer._forward_pre_hooks for layer in pl_module.modules())


def printed(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines of the only message about backends."""
    (message,) = {r.getMessage() for r in caplog.records if r.getMessage().startswith("Backends of the N:M layers:")}
    return message.splitlines()[1:]


def test_auto_decides_after_the_first_step_by_the_tokens_of_the_largest_call(as_if_sparse, timings, caplog):
    class Twice(Regression):
        """Calls a layer once more, with fewer rows."""

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + self.net[3](torch.ones(2, 32)).sum()

    callback, hooks, metrics = BDWP(), Hooks(), Metrics()
    with caplog.at_level("INFO"):
        module, _ = train(
            Twice(Net()), data(6), callback, hooks, metrics, accumulate_grad_batches=2,
            limit_val_batches=1, num_sanity_val_steps=1, **BF16,
        )  # fmt: skip
    assert timings == [((16, 16, 1, 1), 6 * 2 * 2), ((32, 64), 6), ((32, 32), 6)]
    assert hooks.found == [3, 3, 0, 0, 0, 0]
    lost = "sparse would be 1.01 times as fast as dense at 6 tokens; more than 1.05 is asked"
    assert printed(caplog) == [
        "net.0: cusparselt (1.25 times as fast as dense at 24 tokens; 100.0 us dense, 80.0 us sparse)",
        f"net.2: reference ({lost}; 100.0 us dense, 99.0 us sparse)",
        f"net.3: reference ({lost}; 100.0 us dense, 99.0 us sparse)",
        "net.4: reference (2:4 kernels need sizes divisible by 16; the output has 12)",
    ]
    assert [str(decision) for decision in callback.decisions] == printed(caplog)
    assert [logged["sparsity/layers_on_kernels"] for logged in metrics.logged] == [0, 1, 1, 1, 1, 1]
    assert is_n_of_m(module.net[2].weight)


def test_an_input_that_is_given_by_its_name_is_counted(as_if_sparse, timings):
    class ByName(Net):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self:
                x = layer(input=x)
            return x

    train(Regression(ByName()), data(1), BDWP(), **BF16)
    assert timings == [((16, 16, 1, 1), 6 * 2 * 2), ((32, 64), 6), ((32, 32), 6)]


def test_validation_before_the_first_step_is_not_counted(as_if_sparse, timings):
    large = [(x.repeat(3, 1, 1, 1), y.repeat(3, 1)) for x, y in data(1)]
    trainer_settings: dict[str, Any] = {"accumulate_grad_batches": 4, "val_check_interval": 1, "exact": False}
    fit(BDWP(), make=lambda: Regression(Net()), data={"train_dataloaders": data_loader(data(4)),
        "val_dataloaders": data_loader(large)}, max_epochs=1, **trainer_settings, **BF16)  # fmt: skip
    assert {tokens for _, tokens in timings} == {24, 6}


def data_loader(batches: list[Batch]) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(batches, batch_size=None)


@pytest.mark.parametrize("backend", ["auto", "cusparselt"])
def test_algorithms_are_searched_after_the_first_step_and_kept_for_the_next_run(
    monkeypatch, tmp_path, as_if_sparse, timings, caplog, backend
):
    swept = []

    def sweep(product: search.Product) -> list[search.Trial]:
        swept.append((product.rows, product.k, product.tokens, product.bias))
        return [search.Trial(number, 0.0, True, 100.0 / (number + 1), 100.0) for number in range(3)]

    monkeypatch.setattr(search, "sweep", sweep)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU A")
    path = tmp_path / "algorithms.json"
    for searched in (True, False):
        callback = BDWP(backend=backend, algorithms=path)
        caplog.clear()
        with caplog.at_level("INFO"):
            train(Regression(Net()), data(3), callback, **BF16)
        shapes = [(16, 16, 24), (32, 64, 6), (32, 32, 6)]
        both = [(*shape, bias) for o, i, t in shapes for shape, bias in (((o, i, t), True), ((i, o, t), False))]
        assert swept == (both if searched else [])
        assert "net.0: cusparselt" in printed(caplog)[0]
        assert "algorithms 2 and 2)" in printed(caplog)[0]
        assert callback.decisions[0].algorithms == cusparselt.Algorithms(24, 2, 2)
        swept.clear()
    path.write_text("[]")
    with pytest.raises(ValueError, match="is no cache of algorithms"):
        train(Regression(Net()), data(3), BDWP(backend=backend, algorithms=path), **BF16)


@pytest.mark.skipif(REASON is None, reason="there is a device with sparse kernels")
@pytest.mark.parametrize(
    ("precision", "reason"), [("bf16-mixed", REASON), ("32-true", cusparselt.probe(torch.float32))]
)
def test_where_nothing_can_run_sparse_auto_costs_nothing_and_says_why(timings, caplog, precision, reason):
    callback, hooks = BDWP(), Hooks()
    with caplog.at_level("INFO"):
        train(Regression(Net()), data(2), callback, hooks, precision=precision)
    assert (timings, hooks.found) == ([], [0, 0])
    assert printed(caplog) == [f"all 4 layers: reference ({reason})"]


def test_after_a_resume_it_is_decided_again(tmp_path, as_if_sparse, timings):
    class Save(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    fit(BDWP(), Save(), **BF16)
    first = timings.copy()
    run = fit(BDWP(), ckpt_path=tmp_path / "1.ckpt", **BF16)
    assert timings == [*first, *first] == [((16, 64), 8)] * 2
    assert [decision.backend for decision in run.callback.decisions] == ["cusparselt"]


def test_every_rank_takes_the_decision_of_the_first_which_alone_searches(monkeypatch, tmp_path, as_if_sparse, timings):
    searched = []
    monkeypatch.setattr(search, "best_algorithm", lambda product, cache: searched.append(product) or 0)
    module = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 32))
    ops.convert(module, ops.NMRule(2, 4))
    sent: Iterator[Any] = iter([("0",), (Decision("0", "reference", "theirs"), Decision("1", "cusparselt", "theirs"))])
    strategy = SimpleNamespace(broadcast=lambda mine: next(sent))
    trainer: Any = SimpleNamespace(strategy=strategy, is_global_zero=False)
    choice = BackendChoice(trainer, module, "auto", torch.bfloat16, tmp_path / "algorithms.json")
    assert [len(layer._forward_pre_hooks) for layer in module] == [1, 0]
    module(torch.ones(4, 32))
    choice.after_step(trainer, module)
    assert [layer.backend for layer in module] == ["reference", "cusparselt"]
    assert [decision.reason for decision in choice.decisions] == ["theirs"] * 2
    assert not searched
    choice.after_step(trainer, module)  # which has nothing more to decide
    assert [len(layer._forward_pre_hooks) for layer in module] == [0, 0]


@pytest.mark.parametrize("moment", ["on_train_batch_end", "on_train_batch_start"])
def test_an_exception_before_the_decision_leaves_no_hook(as_if_sparse, timings, moment):
    def raises(*_: Any, **__: Any) -> None:
        raise RuntimeError("as arranged")

    failing, module = L.Callback(), PlainModule()
    setattr(failing, moment, raises)
    with pytest.raises(RuntimeError, match="as arranged"):
        fit(BDWP(), failing, make=lambda: module, accumulate_grad_batches=2, **BF16)
    assert kinds(module) == kinds(PlainModule())
    assert not any(layer._forward_pre_hooks for layer in module.modules())


# Refusals.


@pytest.mark.skipif(REASON is None, reason="there is a device with sparse kernels")
@pytest.mark.parametrize(
    ("precision", "reason"), [("bf16-mixed", REASON), ("32-true", "2:4 kernels compute in bfloat16 or float16, not in")]
)
def test_kernels_that_cannot_run_here_are_refused_at_setup(precision, reason):
    class Later(L.Callback):
        def on_fit_start(self, *_: Any) -> None:
            pytest.fail("the fit has begun")

    module = PlainModule()
    with pytest.raises(ValueError, match=f"^backend='cusparselt' cannot run here: {reason}.*'auto' or 'reference'"):
        fit(STE(backend="cusparselt"), Later(), make=lambda: module, precision=precision)
    assert kinds(module) == kinds(PlainModule())


def test_kernels_that_fit_no_layer_are_refused(as_if_sparse):
    with pytest.raises(ValueError, match="cannot run here: 2:4 kernels need sizes divisible by 16; the output has 12"):
        train(Regression(Net()), data(1), BDWP(backend="cusparselt", where=Selection(("net.4.*",))), **BF16)


def test_an_unknown_backend_is_refused_at_construction():
    with pytest.raises(
        ValueError, match=r"backend='cuda' is unknown\. Choose one of 'auto', 'reference', 'cusparselt'"
    ):
        BDWP(backend="cuda")


@pytest.mark.slow
def test_compiled_layers_follow_the_decision_and_the_switch_to_a_dense_tail(monkeypatch, as_if_sparse, timings):
    def trained(compiled: bool) -> list[dict[str, Tensor]]:
        module, record = Regression(Net(), lr=0.02), Master()
        if compiled:
            module.net.compile(backend="aot_eager")
        count = Count(monkeypatch, "compress")
        callback = BDWP(decay=0.01, sparse_until=3, final="dense")
        train(module, data(5), callback, record, count, **BF16)
        assert count.by_batch == [0, 0, 2, 4, 4]  # the convolution's, in the two batches before the tail
        assert [decision.backend for decision in callback.decisions] == ["cusparselt", *["reference"] * 3]
        return record.masters

    torch.compiler.reset()
    for ours, theirs in zip(trained(True), trained(False), strict=True):
        for name, weight in ours.items():
            torch.testing.assert_close(weight, theirs[name], rtol=1e-3, atol=1e-3)
    assert len(timings) == 6


@pytest.mark.gpu
@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize("method", METHODS)
def test_on_a_gpu_the_network_is_trained_that_the_reference_trains(method):
    def trained(backend: str) -> list[dict[str, Tensor]]:
        record = Master()
        settings: dict[str, Any] = {"accelerator": "cuda", "devices": 1, "accumulate_grad_batches": 2}
        train(Regression(Net(), lr=0.02), data(6), method(backend=backend), record, **settings, **BF16)
        return record.masters

    for ours, theirs in zip(trained("cusparselt"), trained("reference"), strict=True):
        for name, weight in ours.items():
            torch.testing.assert_close(weight, theirs[name], rtol=1e-2, atol=1e-2)
