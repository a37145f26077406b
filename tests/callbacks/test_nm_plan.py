"""Which layers N:M training converts, and what it refuses."""

import math
from types import SimpleNamespace

import pytest
import torch
from callbacks.nm_network import BDWP, SCALED, STE, Regression, SaveOnce, is_n_of_m, kinds
from conformance.harness import PlainModule, SaveEverywhere, fit
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn

from sparsetrain import GradualMagnitudePruning, OneShot, Pruning, Selection, SparsityCallback, ops


class Mixed(nn.Module):
    """One layer of each kind that has a reason of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 8)
        self.stem = nn.Conv2d(3, 8, 3)
        self.deep = nn.Conv2d(8, 8, 3, groups=8)
        self.norm = nn.LayerNorm(8)
        self.attend = nn.MultiheadAttention(8, 2)
        self.fc = nn.Linear(8, 16)
        self.head = nn.Linear(16, 10)


def plan_of(method: SparsityCallback, net: nn.Module) -> dict[str, tuple[bool, str]]:
    """The plan at the start of a fit, without training."""
    module, trainer = Regression(net), SimpleNamespace(callbacks=[method], strategy=None)
    method.setup(trainer, module, "fit")
    rows = {row.name: (row.pruned, row.reason) for row in method.plan}
    method.undo(module)
    return rows


def test_the_plan_says_of_each_parameter_what_it_computes_with_or_why_it_stays_dense():
    both, forward = plan_of(BDWP(), Mixed()), plan_of(STE(1, 4), Mixed())
    fused = "attention projection: nn.MultiheadAttention multiplies it without calling a layer"
    expected = {
        "net.embed.weight": (False, "embedding: name it in `include`"),
        "net.stem.weight": (False, "3 input channels are not divisible by 4"),
        "net.deep.weight": (False, "depthwise convolution: name it in `include`"),
        "net.norm.weight": (False, "no maskable weight (LayerNorm)"),
        "net.attend.in_proj_weight": (False, fused),
        "net.attend.out_proj.weight": (False, fused),
        "net.fc.weight": (True, "2:4 in both directions"),
        "net.fc.bias": (False, "bias"),
        "net.head.weight": (False, "10 output channels are not divisible by 4"),
    }
    assert {name: both[name] for name in expected} == expected
    assert forward["net.head.weight"] == forward["net.fc.weight"] == (True, "1:4 in the forward product")
    left_out = plan_of(
        BDWP(where=Selection(exclude=("*fc*",), include=("*.weight",))), nn.Sequential(nn.Linear(8, 8), Mixed())
    )
    assert left_out["net.1.fc.weight"] == (False, "excluded by '*fc*'")


def test_the_plan_is_printed_once(caplog):
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        fit(BDWP(), make=PlainModule)
    messages = {
        record.getMessage() for record in caplog.records if "BidirectionalWeightPruning:" in record.getMessage()
    }
    assert len(messages) == 1
    assert "3 output channels are not divisible by 4" in messages.pop()


class Manual(PlainModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Fused(PlainModule):
    """Its optimizer unscales gradients within its step."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, fused=True)


class HeadOnly(PlainModule):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.head.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BDWP(decay=-0.1), r"^decay is -0.1; it must be at least 0\.$"),
        (lambda: STE(decay=math.nan), r"^decay is nan; it must be at least 0\.$"),
        (
            lambda: BDWP(4, 2),
            r"^n=4 of m=2 must satisfy 1 <= n < m <= 64\. Common choices: 2 of 4, 1 of 4, 2 of 8, 4 of 8\.$",
        ),
        (
            lambda: STE(4, 8, transposable=True),
            r"^Transposable 4:8 masks are found by enumeration, for m <= 5 only\. Take n=2, m=4\.$",
        ),
        (lambda: STE(refresh="four"), r"^refresh: 'four'"),
        (lambda: BDWP(where=Selection(include="body.*")), r"^include='body\.\*' is one string"),
    ],
)
def test_arguments_out_of_range_are_refused_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


REFUSALS = [
    pytest.param(
        lambda: [BDWP(decay=0.5)],
        {"make": Manual},
        r"^decay=0\.5 is added after gradients are clipped, which a module under manual optimization does itself\. "
        r"Use decay=0\.0 there, or automatic optimization\.$",
        id="manual_optimization",
    ),
    pytest.param(
        lambda: [STE()],
        {"make": Fused} | SCALED,
        r"^SGD unscales gradients within its step \(fused\), so that decay=0\.0002 would be divided by the scale\. "
        r"Use fused=False, precision='bf16-mixed' or decay=0\.0\.$",
        id="fused_under_a_scaler",
    ),
    pytest.param(
        lambda: [EMAWeightAveraging(), BDWP()],
        {},
        r"^EMAWeightAveraging has copied the module before BidirectionalWeightPruning could convert its layers\. "
        r"List it after BidirectionalWeightPruning\.$",
        id="averaging_first",
    ),
    pytest.param(
        lambda: [BDWP(where=Selection(include=("head.*",)))],
        {},
        r"^No layer of PlainModule can hold 2:4 in both directions: .*head\.weight: 3 output channels are not "
        r"divisible by 4.*\. Choose others in `where`\.$",
        id="nothing_fits",
    ),
    pytest.param(lambda: [STE(refresh="0it")], {}, r"^refresh='0it' is less than one step\.$", id="refresh"),
    pytest.param(
        lambda: [BDWP(), STE(where=Selection(include=("head.*",)))],
        {},
        r"^BidirectionalWeightPruning and StraightThroughNM would both convert layers of this module, which goes with "
        r"one N:M callback\. Remove one of them\.$",
        id="two_of_them",
    ),
    pytest.param(
        lambda: [BDWP()],
        {"make": HeadOnly},
        r"^No optimizer holds any of the N:M weights\. Return one from configure_optimizers\.$",
        id="no_optimizer",
    ),
    pytest.param(
        lambda: [BDWP(), GradualMagnitudePruning(OneShot(0.5, at=2))],
        {},
        r"^'body\.5\.weight' is pruned by two callbacks, \w+ and \w+\. "
        r"Give them selections without a common parameter\.$",
        id="pruned_too",
    ),
    pytest.param(
        lambda: [GradualMagnitudePruning(OneShot(0.5, at=2)), BDWP()],
        {},
        r"^'body\.5\.weight' is pruned by two callbacks",
        id="pruned_too_first",
    ),
]


@pytest.mark.parametrize(("callbacks", "settings", "message"), REFUSALS)
def test_what_cannot_go_well_is_refused_before_the_first_step_and_leaves_plain_layers(callbacks, settings, message):
    module = settings.get("make", PlainModule)()
    with pytest.raises(ValueError, match=message):
        fit(*callbacks(), **(settings | {"make": lambda: module}))
    assert kinds(module) == kinds(type(module)())
    assert {"configure_gradient_clipping", "configure_model"}.isdisjoint(vars(module))


def test_the_same_without_a_decay_is_not_refused():
    fit(STE(decay=0.0), make=Fused, max_epochs=1, **SCALED)


def test_it_goes_with_gradual_pruning_of_other_layers():
    gradual = GradualMagnitudePruning(
        OneShot(0.5, at=2), pruning=Pruning(Selection(include=("body.0.weight", "head.*")))
    )
    run = fit(BDWP(), gradual, make=PlainModule)
    assert is_n_of_m(run.module.body[5].weight)
    assert sum(int((run.module.get_parameter(n) == 0).sum()) for n in gradual.masks) == (36 + 48) // 2


def test_a_checkpoint_with_an_average_is_not_resumed_without_it(tmp_path):
    saver = SaveOnce(tmp_path)
    fit(BDWP(), EMAWeightAveraging(decay=0.5), saver)
    with (
        pytest.warns(UserWarning, match="Please add the following callbacks"),
        pytest.raises(
            ValueError,
            match=r"^The checkpoint holds a copy of the weights that no callback has now: EMAWeightAveraging\."
            r"_average_model\. Resume a run with the callbacks it was trained with\.$",
        ),
    ):
        fit(BDWP(), ckpt_path=saver.full)


def test_a_layer_that_is_parametrized_after_its_conversion_is_refused_and_given_back():
    class Late(PlainModule):
        def on_fit_start(self) -> None:
            nn.utils.parametrizations.spectral_norm(self.body[5])

    module = Late()
    with pytest.raises(ValueError, match=r"weight of 'body\.5' was parametrized after the layer had been"):
        fit(BDWP(), make=lambda: module)
    assert not list(ops.effective_layers(module))
    assert module(torch.randn(2, 1, 4, 4)).shape == (2, 3)
    assert isinstance(module.body[5], nn.Linear)


@pytest.mark.parametrize("hook", ["on_train_start", "on_train_epoch_end"])
def test_a_layer_that_is_parametrized_in_training_is_refused_at_the_next_batch(tmp_path, hook):
    def parametrize(module: PlainModule) -> None:
        nn.utils.parametrizations.weight_norm(module.body[5])

    with pytest.raises(ValueError, match=r"weight of 'body\.5' was parametrized after the layer had been converted to"):
        fit(BDWP(), SaveEverywhere(tmp_path), make=type("Late", (PlainModule,), {hook: parametrize}))


def test_a_layer_that_grows_in_training_is_refused_at_the_next_batch():
    class Grows(PlainModule):
        def on_train_epoch_end(self) -> None:
            self.body[5].weight = nn.Parameter(torch.randn(20, 64))

    with pytest.raises(ValueError, match=r"'body\.5\.weight' has shape \(20, 64\), and had \(16, 64\) when training"):
        fit(BDWP(), make=Grows)
