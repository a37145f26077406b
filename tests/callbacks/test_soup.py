import random
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from callbacks.recording import EPOCH, Quiet, Record, recorded
from conformance.harness import (
    BATCH,
    PlainModule,
    Run,
    SaveEverywhere,
    TinyModule,
    assert_same,
    differences,
    fit,
    loaders,
    samples,
    seed_all,
)
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset

from sparsetrain import CyclicLR, IterativeMagnitudePruning, LinearLR, ReplayLR, SparseModelSoup, Vary
from sparsetrain.callbacks.recalibration import recalibrate
from sparsetrain.rng import derive_seed
from sparsetrain.soups import uniform

WEIGHTS = ("body.0.weight", "body.5.weight", "head.weight")


def soup(rounds: int = 2, ingredients: int = 2, **choices: Any) -> SparseModelSoup:
    """Legs of one epoch, to 0.8."""
    return SparseModelSoup(rounds, "1ep", sparsity=0.8, ingredients=ingredients, check="full", **choices)


class Ends(L.Callback):
    """Copies of the module at the end of each batch, before a method's own end of the batch."""

    def __init__(self) -> None:
        self.states: dict[int, dict[str, Tensor]] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.states[trainer.fit_loop.total_batch_idx] = deepcopy(dict(pl_module.state_dict()))


class Normless(TinyModule):
    """Without batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.body[1] = nn.Identity()


def cooked(callback: SparseModelSoup, *others: L.Callback, **settings: Any) -> tuple[Run, Record, Ends]:
    """A fit; Record sees what there is after the method's end of each batch, Ends what there is before it."""
    ends = Ends()
    run, record = recorded(callback, ends, *others, **settings)
    return run, record, ends


class Causal(TinyModule):
    """With a buffer that holds infinities, as a causal mask does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("causal", torch.full((4, 4), -torch.inf).triu(1))


# Soups


def test_a_buffer_of_infinities_that_ingredients_share_is_that_of_the_soup():
    run, _, _ = cooked(soup(rounds=1, ingredients=3), make=Causal)
    assert_same(run.module.causal, Causal().causal)


def test_a_round_ends_with_the_float64_mean_of_its_ingredients_and_with_uniform_s_soup_bit_for_bit():
    run, record, ends = cooked(soup(rounds=2, ingredients=3))
    for number in (1, 2):
        last = EPOCH * (1 + 3 * number) - 1
        members = [ends.states[last - 2 * EPOCH], ends.states[last - EPOCH], ends.states[last]]
        made, masks = record.ends[last].module, record.ends[last].masks
        from_all = uniform(members, [masks] * 3)
        for name, tensor in made.items():
            if name in ("body.1.running_mean", "body.1.running_var"):
                continue  # recalibrated
            assert_same(tensor, from_all[name])
            mean = torch.stack([member[name].double() for member in members]).mean(0)
            torch.testing.assert_close(tensor.double(), mean, rtol=0, atol=1e-6)
        assert len({float(member["head.weight"].norm()) for member in members}) == 3
        for name in WEIGHTS:
            assert all(not member[name][~masks[name]].any() for member in [*members, made])
    assert run.callback.masks.sparsity() == pytest.approx(0.8, abs=1e-3)


def test_only_the_end_of_a_round_shows_a_soup():
    _, record, ends = cooked(soup(rounds=1, ingredients=3))
    for place, before in ends.states.items():
        changed = bool(list(differences(before, record.ends[place].module)))
        assert changed == (place == 4 * EPOCH - 1), place


def test_the_validation_at_the_end_of_a_round_is_of_the_soup_and_of_the_others_of_an_ingredient():
    run, record, _ = cooked(soup(rounds=1, ingredients=2))
    module = TinyModule()
    for batches, loss in run.trace.validations.items():
        module.load_state_dict(record.ends[batches - 1].module)
        module.eval()
        with torch.no_grad():
            found = [nn.functional.cross_entropy(module(x), y) * len(y) for x, y in loaders()["val_dataloaders"]]
        assert loss == pytest.approx(float(sum(found)) / 16, rel=1e-5)


def test_each_ingredient_starts_from_the_pruned_network_of_its_round_with_a_fresh_optimizer():
    _, record, _ = cooked(soup(rounds=2, ingredients=2))
    for first in (EPOCH, 3 * EPOCH):
        start, second = record.starts[first], record.starts[first + EPOCH]
        assert_same(start.module, second.module)
        assert_same(start.masks, second.masks)
        assert not any(start.optimizer.values())
        assert not any(second.optimizer.values())
        trained = record.ends[first - 1].module
        for name, mask in start.masks.items():
            assert_same(start.module[name], trained[name].masked_fill(~mask, 0))  # the next round prunes the soup


def test_with_one_ingredient_it_is_iterative_pruning_bit_for_bit_where_there_is_no_batch_norm():
    imp = IterativeMagnitudePruning(2, "1ep", sparsity=0.8, retrain=LinearLR(), optimizer_state="reset")
    one, other = (recorded(callback, make=Normless)[0] for callback in (imp, soup(ingredients=1)))
    assert_same(one.module.state_dict(), other.module.state_dict())
    assert_same(one.trace.batches, other.trace.batches)


def test_in_steps_legs_begin_and_end_within_an_epoch():
    callback = SparseModelSoup(1, 4, sparsity=0.8, ingredients=2, dense_length=3)
    _, record, ends = cooked(callback, max_epochs=-1, max_steps=11)
    assert [i for i in ends.states if list(differences(ends.states[i], record.ends[i].module))] == [10]
    assert_same(record.starts[3].module, record.starts[7].module)


# What varies


def order(seed: bool, place: int = EPOCH) -> list[list[list[int]]]:
    _, record, _ = cooked(soup(rounds=1, ingredients=2, vary=Vary(seed=seed, weight_decay=(1e-3, 1e-2))))
    return [[record.labels[start + i] for i in range(EPOCH)] for start in (place, place + EPOCH)]


def test_each_ingredient_has_its_own_order_of_data_unless_the_seed_is_not_varied():
    first, second = order(seed=True)
    assert first != second
    assert order(seed=False) == [first, first]


def test_ingredients_without_a_varied_seed_differ_by_what_is_varied_alone():
    def ends_of(vary: Vary) -> list[dict[str, Tensor]]:
        _, _, ends = cooked(soup(rounds=1, ingredients=2, vary=vary))
        return [ends.states[2 * EPOCH - 1], ends.states[3 * EPOCH - 1]]

    assert_same(*ends_of(Vary(seed=False, weight_decay=(1e-3, 1e-3))))
    assert list(differences(*ends_of(Vary(seed=False, weight_decay=(1e-3, 1e-1)))))


class Grouped(PlainModule):
    """Weights with decay at one rate, biases without at a tenth of it; a label smoothing."""

    def __init__(self) -> None:
        super().__init__()
        self.label_smoothing = 0.1
        self.loss = nn.CrossEntropyLoss(label_smoothing=0.2)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        biases = [p for p in self.parameters() if p.ndim == 1]
        weights = [p for p in self.parameters() if p.ndim > 1]
        groups = [{"params": weights}, {"params": biases, "lr": 0.01, "weight_decay": 0.0}]
        return SGD(groups, lr=0.1, momentum=0.9, weight_decay=1e-3)


class Settings(L.Callback):
    """What the optimizer's groups and the module are set to in each batch."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, ...]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        numbers = [group[key] for group in optimizer.param_groups for key in ("lr", "weight_decay")]
        self.seen.append((*numbers, pl_module.label_smoothing, pl_module.loss.label_smoothing))


def test_values_are_zipped_by_ingredient_and_groups_keep_their_ratios():
    vary = Vary(weight_decay=(2e-3, 0.0), lr=(0.2, 0.05), label_smoothing=(0.0, 0.5))
    settings = Settings()
    run, _, _ = cooked(soup(rounds=2, vary=vary, dense_length="2ep"), settings, make=Grouped)
    dense = (0.1, 1e-3, 0.01, 0.0, 0.1, 0.2)
    expected = [dense] * (2 * EPOCH)
    for _ in range(2):
        for peak, decay, smoothing in zip(vary.lr, vary.weight_decay, vary.label_smoothing, strict=True):
            rates = [peak * (EPOCH - step) / EPOCH for step in range(EPOCH)]
            expected += [(rate, decay, rate / 10, 0.0, smoothing, smoothing) for rate in rates]
    assert settings.seen == [pytest.approx(row) for row in expected]
    assert (run.module.label_smoothing, run.module.loss.label_smoothing) == (0.1, 0.2)  # given back


def test_a_resumed_ingredient_has_its_own_settings(tmp_path):
    def make() -> SparseModelSoup:
        return soup(rounds=1, vary=Vary(weight_decay=(2e-3, 1e-2), lr=(0.2, 0.05), label_smoothing=(0.0, 0.5)))

    saver, whole, part = SaveEverywhere(tmp_path), Settings(), Settings()
    cooked(make(), saver, whole, make=Grouped)
    saved = next(saved for saved in saver.saved if saved.batches == 2 * EPOCH + 2)
    cooked(make(), part, make=Grouped, ckpt_path=saved.path)
    assert part.seen == whole.seen[saved.batches :]


def test_label_smoothing_is_given_back_after_an_exception():
    class Failing(Grouped):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.label_smoothing == 0.5:
                raise KeyboardInterrupt
            return super().training_step(batch, batch_idx)

    modules = []

    def make() -> Failing:
        modules.append(Failing())
        return modules[0]

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        cooked(soup(rounds=1, vary=Vary(label_smoothing=(0.0, 0.5))), make=make)
    assert (modules[0].label_smoothing, modules[0].loss.label_smoothing) == (0.1, 0.2)


# Batch norm


def statistics_by_hand(module: TinyModule, batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Means over the batches of the mean and unbiased variance of what comes into batch norm."""
    with torch.no_grad():
        inputs = [module.body[0](batch).transpose(0, 1).flatten(1).double() for batch in batches]
    means, variances = ([f(x) for x in inputs] for f in (lambda x: x.mean(1), lambda x: x.var(1)))
    return torch.stack(means).mean(0), torch.stack(variances).mean(0)


def test_the_soups_batch_norm_has_the_statistics_of_a_fifth_of_the_batches_in_a_fixed_order():
    _, record, ends = cooked(soup(rounds=1, ingredients=2), make=Quiet)
    made = record.ends[3 * EPOCH - 1].module
    module = Quiet()
    module.load_state_dict(made)
    batches = [x for x, _ in loaders()["train_dataloaders"].fresh(derive_seed(3, "recalibration"))]
    assert len(batches) == 5
    mean, variance = statistics_by_hand(module, batches[:1])
    torch.testing.assert_close(made["body.1.running_mean"].double(), mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(made["body.1.running_var"].double(), variance, rtol=0, atol=1e-6)
    members = [ends.states[place] for place in (2 * EPOCH - 1, 3 * EPOCH - 1)]
    averaged = torch.stack([member["body.1.running_mean"] for member in members]).mean(0).double()
    assert (averaged - mean).abs().max() > 1e-3  # which the averages of their statistics are not


class Darkened(L.LightningDataModule):
    """Subtracts from the images before they are moved."""

    def train_dataloader(self) -> Any:
        return loaders()["train_dataloaders"]

    def val_dataloader(self) -> Any:
        return loaders()["val_dataloaders"]

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] - 3, batch[1]


@pytest.mark.filterwarnings("ignore:You have overridden `on_after_batch_transfer` in `LightningModule` but")
def test_recalibration_sees_the_batches_as_a_hook_of_the_data_module_changes_them():
    _, record, _ = cooked(soup(rounds=1, ingredients=2), make=Quiet, data={"datamodule": Darkened()})
    made = record.ends[3 * EPOCH - 1].module
    module = Quiet()
    module.load_state_dict(made)
    batches = [x - 3 for x, _ in loaders()["train_dataloaders"].fresh(derive_seed(3, "recalibration"))]
    mean, variance = statistics_by_hand(module, batches[:1])
    torch.testing.assert_close(made["body.1.running_mean"].double(), mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(made["body.1.running_var"].double(), variance, rtol=0, atol=1e-5)


def plain(generator: torch.Generator | None = None) -> DataLoader:
    images, labels = samples()
    data = TensorDataset(images.float() / 128 - 1, labels)
    return DataLoader(data, BATCH, sampler=RandomSampler(data, generator=generator))


def at_the_end(check: Callable[[L.Trainer, L.LightningModule], None], **settings: Any) -> None:
    class AtEnd(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            if trainer.fit_loop.total_batch_idx == 1:
                check(trainer, pl_module)

    fit(AtEnd(), max_epochs=1, **settings)


def random_states() -> list[Any]:
    return [torch.get_rng_state(), random.getstate(), np.random.get_state()]


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.parametrize("own_stream", [False, True])
def test_recalibration_moves_neither_a_loader_nor_a_random_stream(own_stream):
    stream = torch.Generator().manual_seed(5) if own_stream else None
    for loader in (loaders()["train_dataloaders"], plain(stream)):

        def check(trainer: L.Trainer, module: L.LightningModule, loader: Any = loader) -> None:
            place = loader.state_dict() if hasattr(loader, "state_dict") else None
            before = [random_states(), place, None if stream is None else stream.get_state()]
            weights = deepcopy(dict(module.state_dict()))
            recalibrate(trainer, module, [loader], 1)
            after = [random_states(), place, None if stream is None else stream.get_state()]
            assert_same(before, after)
            changed = {name for name in weights if list(differences(weights[name], module.state_dict()[name]))}
            assert changed == {"body.1.running_mean", "body.1.running_var"}

        at_the_end(check, data=loaders() | {"train_dataloaders": loader})


def test_recalibrating_twice_gives_the_same_statistics():
    def check(trainer: L.Trainer, module: L.LightningModule) -> None:
        found = []
        for _ in range(2):
            recalibrate(trainer, module, [trainer.train_dataloader], 1)
            found.append(deepcopy(dict(module.state_dict())))
        assert_same(*found)

    at_the_end(check)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda loader: [loader, loader], "one training loader; there are 2"),
        (lambda loader: [[{"image": batch} for batch in loader]], "is a dict that does not begin with a tensor"),
    ],
)
def test_batches_that_cannot_be_used_are_refused(given, message):
    def check(trainer: L.Trainer, module: L.LightningModule) -> None:
        with pytest.raises(ValueError, match=message):
            recalibrate(trainer, module, given(loaders()["train_dataloaders"]), 1)

    at_the_end(check, make=Quiet)


class Shard(IterableDataset):
    """Says that it has more samples than it gives."""

    def __len__(self) -> int:
        return 40

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = samples()
        yield from list(zip(images.float(), labels, strict=True))[:32]


@pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__`")
def test_a_loader_that_gives_fewer_batches_than_its_length_is_refused_after_the_first_epoch():
    def data() -> dict[str, Any]:
        return loaders() | {"train_dataloaders": DataLoader(Shard(), batch_size=8)}

    with pytest.raises(ValueError, match=r"Epoch 0 had 4 batches, where .* is 5: .* Set limit_train_batches=4\."):
        recorded(soup(), make=Quiet, data=data(), exact=False)
    run, _ = recorded(soup(), make=Quiet, data=data(), exact=False, limit_train_batches=4)
    assert run.callback.round == 2


class Counts(L.Callback):
    """Counts the steps made."""

    def __init__(self) -> None:
        self.steps = 0

    def on_before_zero_grad(self, *_: Any) -> None:
        self.steps += 1


class ByName(Quiet):
    """Takes batches that are dictionaries."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return super().training_step((batch["image"], batch["label"]), batch_idx)


class Unforwarded(Quiet):
    forward = L.LightningModule.forward


@pytest.mark.parametrize(
    ("make", "given", "message"),
    [
        (Quiet, lambda loader: [loader, loader], "one training loader; there are 2"),
        (ByName, lambda loader: [{"image": x, "label": y} for x, y in loader], "dict that does not begin with a"),
        (Unforwarded, lambda loader: loader, "by calling Unforwarded: give it a `forward`"),
    ],
    ids=["loaders", "batches", "module"],
)
def test_what_no_soup_can_be_made_with_is_refused_before_the_first_step(make, given, message):
    counts, data = Counts(), loaders()
    batches = given(data["train_dataloaders"])
    loader = DataLoader(batches, batch_size=None) if make is ByName else batches
    with pytest.raises(ValueError, match=message):
        fit(soup(), counts, make=make, data=data | {"train_dataloaders": loader}, exact=False, max_epochs=-1)
    assert counts.steps == 0


@pytest.mark.parametrize("wrap", [lambda loader: [loader], lambda loader: {"only": loader}], ids=["list", "dict"])
def test_one_loader_may_come_in_a_list_or_a_dictionary(wrap):
    class Unwraps(Quiet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            (part,) = batch.values() if isinstance(batch, dict) else batch
            return super().training_step(part, batch_idx)

    data = loaders()
    data |= {"train_dataloaders": wrap(data["train_dataloaders"])}
    run = fit(soup(rounds=1), make=Unwraps, data=data, exact=False, max_epochs=-1)
    assert run.callback.masks.sparsity() == pytest.approx(0.8, abs=1e-3)


def test_without_batch_norm_no_loader_is_looked_at():
    recalibrate(None, nn.Linear(2, 2), [], 1)


# Legs by themselves


def test_ingredients_trained_by_themselves_make_the_same_soup_bit_for_bit(tmp_path):
    def make(only: tuple[int, int] | None = None) -> SparseModelSoup:
        return soup(rounds=1, ingredients=2, only=only, vary=Vary(lr=(0.2, 0.1)))

    whole, _ = recorded(make(), make=Normless)
    saver = SaveEverywhere(tmp_path)
    recorded(make((0, 0)), saver, make=Normless)
    parts = [recorded(make((1, j)), make=Normless, ckpt_path=saver.saved[-1].path)[0] for j in range(2)]
    assert all(part.trainer.current_epoch == 2 for part in parts)
    for part in parts:
        assert_same(dict(part.callback.masks), dict(whole.callback.masks))
    members = [part.module.state_dict() for part in parts]
    assert_same(uniform(members, [dict(whole.callback.masks)] * 2), dict(whole.module.state_dict()))
    assert list(differences(members[0], members[1]))


def test_a_leg_of_a_later_round_needs_the_checkpoint_of_the_one_before():
    with pytest.raises(ValueError, match=r"only=\(1, 0\) goes on with round 1.* Give it as ckpt_path"):
        recorded(soup(only=(1, 0)))


# Checkpoints


def test_a_checkpoint_holds_the_phases_start_and_mean_without_pruned_places(tmp_path):
    saver = SaveEverywhere(tmp_path)
    run, _, _ = cooked(soup(rounds=1, ingredients=3), saver)
    kept = run.callback.masks.kept
    for saved in saver.saved:
        state = torch.load(saved.path, weights_only=True)["callbacks"]
        held = next(state for key, state in state.items() if key.startswith("SparseModelSoup"))
        in_round = EPOCH < saved.batches < 4 * EPOCH or (saved.batches, saved.moment) == (4 * EPOCH, "batch")
        assert (held["snapshot"] is not None) == in_round
        if in_round:
            assert {name: len(held["snapshot"][name]) for name in kept} == kept
        if held["mean"] is not None:
            tensors, count = held["mean"]
            assert {name: len(tensors[name]) for name in kept} == kept
            assert count == (saved.batches - EPOCH - (saved.moment == "batch")) // EPOCH


# Refusals


def refused() -> Iterator[tuple[dict[str, Any], str]]:
    yield {"ingredients": 0}, "ingredients is 0; a soup has at least 1"
    yield {"vary": Vary(weight_decay=(1e-3,))}, r"has 1 values, and a soup of 2 ingredients needs as many"
    yield {"vary": Vary(seed=False)}, "The 2 ingredients would be equal"
    yield {"vary": Vary(lr=(0.1, 0.2)), "retrain": ReplayLR()}, r"under ReplayLR\(\) the module's schedulers do"
    yield {"retrain": CyclicLR(), "dense_length": "0ep"}, "CyclicLR.. needs the learning rates of a dense phase"
    yield {"only": (3, 0)}, r"only=\(3, 0\) is no leg of this soup: rounds are 0 to 2, ingredients 0 to 1"
    yield {"only": (0, 1)}, "is no leg"
    yield {"only": (0, 0), "dense_length": "0ep"}, "rounds are 1 to 2"


@pytest.mark.parametrize(("choices", "message"), [*refused()])
def test_arguments_that_do_not_go_together_are_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        soup(**choices)


def test_a_leg_by_itself_needs_lengths_in_epochs():
    with pytest.raises(ValueError, match="here they are in steps"):
        SparseModelSoup(2, "5it", sparsity=0.8, only=(1, 0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_decay": (0.1, -0.1)}, r"weight_decay=\(0.1, -0.1\)\): each has to be in \[0.0, inf\)"),
        ({"label_smoothing": (0.5, 1.0)}, r"each has to be in \[0.0, 1.0\)"),
        ({"lr": 0.1}, r"lr=0.1\) is no list"),
        ({"lr": "0.1"}, "is no list"),
    ],
)
def test_values_outside_of_their_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Vary(**settings)


def test_varying_what_is_not_there_is_refused_before_the_first_step():
    with pytest.raises(ValueError, match="sets the attribute `label_smoothing`, and neither"):
        cooked(soup(vary=Vary(label_smoothing=(0.1, 0.2))))
    without = lambda: PlainModule(lambda parameters: SGD(parameters, lr=0.1))  # noqa: E731
    with pytest.raises(ValueError, match="that have one, and none has"):
        cooked(soup(vary=Vary(weight_decay=(0.1, 0.2))), make=without)


def test_a_trainer_of_another_length_is_told_that_of_all_legs():
    with pytest.raises(ValueError, match=r"dense phase of 1 and 4 legs of 1 are 5 epochs"):
        fit(soup(), max_epochs=3)


def test_a_soup_needs_its_ingredients_to_be_finite():
    class Diverge(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.fit_loop.total_batch_idx == 3 * EPOCH - 1:
                nn.init.constant_(pl_module.head.bias, float("inf"))

    with pytest.raises(ValueError, match=r"'head\.bias' is not finite: a member has diverged"):
        cooked(soup(rounds=1), Diverge())


def test_seeds_of_ingredients_do_not_depend_on_how_many_there_are():
    seed_all(3)
    assert soup(ingredients=3).stream(3) == ("round", 1, "ingredient", 2)
    assert soup(ingredients=3).stream(4) == soup(ingredients=2).stream(3) == ("round", 2)
    assert soup(ingredients=3, only=(2, 1)).stream(2) == soup(ingredients=3).stream(5) == ("round", 2, "ingredient", 1)
