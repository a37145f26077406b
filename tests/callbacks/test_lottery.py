import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from conformance.harness import (
    PlainModule,
    Run,
    SaveEverywhere,
    TinyModule,
    assert_same,
    differences,
    fit,
    loaders,
    make_trainer,
    seed_all,
)
from conformance.test_exact_resume import Setting, resume_everywhere
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from sparsetrain import (
    FixedMasks,
    IterativeMagnitudePruning,
    LotteryTicketRewinding,
    Pruning,
    ScaledLR,
    Selection,
    Ticket,
    load_masks,
    prune,
)
from sparsetrain.snapshot import Snapshot

EPOCH = 5  # steps; the task's data has 5 batches


class Record(Checkpoint):
    """Copies of the module and its optimizer's state as each batch begins, and (rate, momentum) of each step.

    Being a `Checkpoint`, it comes after the pruning.
    """

    def __init__(self) -> None:
        self.starts: dict[int, dict[str, Tensor]] = {}
        self.states: dict[int, list[dict[str, Any]]] = {}
        self.rates: list[tuple[float, float]] = []
        self.labels: list[list[int]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        def before_step(optimizer: Optimizer, *_: Any) -> None:
            group = optimizer.param_groups[0]
            self.rates.append((group["lr"], group["momentum"] if "momentum" in group else group["betas"][0]))

        self.handle = trainer.optimizers[0].register_step_pre_hook(before_step)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *_: Any) -> None:
        place = trainer.fit_loop.total_batch_idx
        self.starts[place] = deepcopy(dict(pl_module.state_dict()))
        self.states[place] = [deepcopy(dict(state)) for state in trainer.optimizers[0].state.values()]
        self.labels.append(batch[1].tolist())

    def on_train_end(self, *_: Any) -> None:
        self.handle.remove()


def lottery(rounds: int = 2, length: str = "2ep", **choices: Any) -> LotteryTicketRewinding:
    """To 0.8 from step 5 on, unless it says otherwise."""
    given = {} if "ticket" in choices or "per_round" in choices else {"sparsity": 0.8}
    return LotteryTicketRewinding(rounds, length, **({"rewind_to": "1ep", "check": "full"} | given | choices))


def trains(ticket: Path, **choices: Any) -> LotteryTicketRewinding:
    """A callback that trains the ticket in this file."""
    return lottery(0, ticket=ticket, **choices)


def train(
    callback: L.Callback, *, seed: int = 3, make: Callable[[], L.LightningModule] = TinyModule, **settings: Any
) -> tuple[Run, Record]:
    """A fit of the callback's length with a module and generators of this seed."""
    seed_all(seed)
    record, module = Record(), make()
    trainer = make_trainer(callback, record, **({"max_epochs": -1} | settings))
    trainer.fit(module, **loaders())
    return Run(module, trainer, record), record


def masked(tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.masked_fill(~masks[name], 0) if name in masks else t for name, t in tensors.items()}


def kept(masks: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in masks.items()}


@pytest.fixture(scope="module")
def search() -> tuple[Run, Record]:
    """A run that finds a ticket."""
    return train(lottery())


@pytest.fixture
def found(search: tuple[Run, Record]) -> Ticket:
    return search[0].callback.ticket


@pytest.fixture
def path(tmp_path: Path, found: Ticket) -> Path:
    found.save(tmp_path / "ticket.safetensors")
    return tmp_path / "ticket.safetensors"


# Finding


@pytest.mark.parametrize(("rewind_to", "place"), [("0ep", 0), ("0it", 0), ("1ep", 5)])
def test_the_ticket_is_the_state_of_step_k_and_the_final_masks(rewind_to, place):
    run, record = train(lottery(rewind_to=rewind_to))
    ticket = run.callback.ticket
    assert_same(dict(ticket.weights.tensors), record.starts[place])
    assert_same(dict(ticket.masks), dict(run.callback.masks))
    assert run.callback.masks.sparsity() == pytest.approx(0.8, abs=1e-3)
    assert ticket.origin == Snapshot(record.starts[0]).digest


def test_the_ticket_keeps_its_masks_when_the_callback_is_used_again(search):
    ticket = search[0].callback.ticket
    before = deepcopy(dict(ticket.masks))
    for mask in search[0].callback.ticket.masks.values():
        mask.zero_()
    assert_same(dict(search[0].callback.masks), before)
    assert_same(dict(ticket.masks), before)


def test_the_ticket_of_a_resumed_run_is_the_same(tmp_path, found):
    saver = SaveEverywhere(tmp_path)
    fit(lottery(), saver, max_epochs=-1)
    for saved in saver.saved:
        if (saved.batches, saved.moment) in {(3, "batch"), (12, "batch"), (17, "batch"), (20, "epoch")}:
            again = fit(lottery(), max_epochs=-1, ckpt_path=saved.path).callback.ticket
            assert (again.weights.digest, again.origin) == (found.weights.digest, found.origin)
            assert_same(dict(again.masks), dict(found.masks))


def test_there_is_no_ticket_before_step_k():
    class Asking(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            if trainer.fit_loop.total_batch_idx == 5:
                self.found = callback.ticket  # listed after the pruning it would have one
            elif trainer.fit_loop.total_batch_idx < 5:
                with pytest.raises(RuntimeError, match="There is no ticket before"):
                    _ = callback.ticket

    class AskingLast(Asking, Checkpoint):
        pass

    callback, asking = lottery(), AskingLast()
    with pytest.raises(RuntimeError, match=r"There is no ticket before a run with weights='rewind' has come to"):
        _ = callback.ticket
    fit(callback, asking, max_epochs=-1)
    assert int(asking.found.weights.tensors["body.1.num_batches_tracked"]) == 5


def test_iterative_pruning_has_a_ticket_where_it_rewinds_weights(found):
    settings = {"sparsity": 0.8, "rewind_to": "1ep", "optimizer_state": "reset"}
    run, _ = train(IterativeMagnitudePruning(2, "2ep", weights="rewind", **settings))
    assert run.callback.ticket.weights.digest == found.weights.digest
    assert_same(dict(run.callback.ticket.masks), dict(found.masks))
    run, _ = train(IterativeMagnitudePruning(2, "2ep", **settings))
    with pytest.raises(RuntimeError, match="There is no ticket"):
        _ = run.callback.ticket


def test_it_is_iterative_pruning_that_rewinds_weights_and_resets_the_optimizer(search):
    choices = {"weights": "rewind", "optimizer_state": "reset", "sparsity": 0.8, "rewind_to": "1ep"}
    same, _ = train(IterativeMagnitudePruning(2, "2ep", **choices))
    assert_same(dict(search[0].module.state_dict()), dict(same.module.state_dict()))
    assert_same(dict(search[0].callback.masks), dict(same.callback.masks))


# Training a ticket


@pytest.mark.parametrize("seed", [3, 4])
@pytest.mark.parametrize("optimizer", [None, lambda parameters: Adam(parameters, lr=0.01)], ids=["sgd", "adam"])
def test_a_ticket_is_trained_from_exactly_its_weights_under_its_masks_with_a_fresh_optimizer(
    path, found, seed, optimizer
):
    def make() -> TinyModule:
        return PlainModule(optimizer)

    run, record = train(trains(path), seed=seed, make=make)
    assert_same(record.starts[0], masked(found.weights.tensors, found.masks))
    assert not any(value is not None for state in record.states[0] for value in state.values())
    assert_same(dict(run.callback.masks), dict(found.masks))
    assert run.callback.step == EPOCH
    assert all(not run.module.get_parameter(name)[~mask].any() for name, mask in found.masks.items())


def test_a_ticket_is_trained_with_the_learning_rates_from_place_k_on(search, path):
    _, record = train(trains(path), seed=8)
    rates = search[1].rates
    assert record.rates == rates[5:10] == rates[-5:]
    _, whole = train(trains(path, rewind_to="0ep"), seed=8)
    assert whole.rates == rates[:10]


def test_trained_after_a_search_the_ticket_begins_as_the_last_round_did(search, path):
    run, record = train(trains(path), seed=8)
    assert_same(record.starts[0], search[1].starts[15])
    assert run.callback.round == 1
    assert_same(dict(run.callback.ticket.masks), dict(search[0].callback.masks))
    assert run.callback.ticket.weights.digest == search[0].callback.ticket.weights.digest


def test_a_ticket_counted_in_steps_is_trained_for_as_many(path):
    run, record = train(trains(path, length="9it", rewind_to="2it"))
    assert run.callback.step == len(record.rates) == 7


def test_the_given_masks_make_one_entry_of_history(path, found):
    run, _ = train(trains(path))
    (update,) = run.callback.history
    assert (update.step, update.kept) == (0, kept(found.masks))
    assert {name: update.kept[name] + update.dropped[name] for name in update.kept} == {
        name: mask.numel() for name, mask in found.masks.items()
    }
    assert update.target == pytest.approx(0.8, abs=1e-3)
    assert not any(update.grown.values())


def test_a_ticket_of_some_layers_prunes_those_and_no_others(tmp_path):
    search, _ = train(lottery(pruning=Pruning(Selection(include=("body.*",)))))
    search.callback.ticket.save(tmp_path / "body.safetensors")
    run, _ = train(trains(tmp_path / "body.safetensors"), seed=5)
    assert set(run.callback.masks) == {"body.0.weight", "body.5.weight"}
    assert run.module.head.weight.all()


@pytest.mark.slow
@pytest.mark.parametrize("control", ["none", "random_mask", "reinit", "random_mask_reinit"])
def test_a_run_of_a_ticket_resumes_bit_identically(tmp_path, control):
    path = tmp_path / "ticket.safetensors"
    train(lottery(), seed=8)[0].callback.ticket.save(path)
    setting = Setting("ticket", trainer={"max_epochs": 2})
    assert not resume_everywhere(tmp_path, lambda: [trains(path, length="3ep", control=control)], setting)


# Controls


def test_random_masks_keep_as_many_in_each_tensor_at_other_places_under_the_tickets_weights(path, found):
    run, record = train(trains(path, control="random_mask"), seed=8)
    masks = dict(run.callback.masks)
    assert kept(masks) == kept(found.masks)
    assert all(not torch.equal(mask, found.masks[name]) for name, mask in masks.items())
    assert_same(record.starts[0], masked(found.weights.tensors, masks))
    # Not only shuffled within rows, and not among those of the ticket.
    assert (masks["body.5.weight"] & ~found.masks["body.5.weight"]).sum() > 50


def test_random_masks_are_a_function_of_the_seed(path):
    def masks(seed: int, **choices: Any) -> dict[str, Tensor]:
        return deepcopy(dict(train(trains(path, control="random_mask", **choices), seed=seed)[0].callback.masks))

    once = masks(3)
    assert_same(once, masks(3))
    assert_same(once, masks(3, length="3ep"))
    other = masks(4)
    assert all(not torch.equal(once[name], other[name]) for name in once)


class Large(L.LightningModule):
    """Two equal tensors of 120 x 200."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(200, 120, bias=False), nn.Linear(200, 120, bias=False)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        features = batch[0].flatten(1)[:, :1].expand(-1, 200)
        return self.first(features).square().mean() + self.second(features).square().mean()

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def large_masks(seed: int, tmp_path: Path) -> dict[str, Tensor]:
    """Random masks beside a ticket that keeps the first quarter of each tensor, by place."""
    path = tmp_path / "large.safetensors"
    if not path.exists():
        quarter = torch.zeros(120, 200, dtype=torch.bool)
        quarter.view(-1)[:6000] = True
        masks = {"first.weight": quarter, "second.weight": quarter.clone()}
        Ticket(Snapshot.of(Large()), masks, "").save(path)
    seed_all(seed)
    callback = trains(path, control="random_mask", length="1ep", rewind_to="0ep")
    trainer = make_trainer(callback, max_epochs=-1, limit_train_batches=1, limit_val_batches=0)
    trainer.fit(Large(), loaders()["train_dataloaders"])
    return deepcopy(dict(callback.masks))


def test_random_masks_are_spread_uniformly_and_independently(tmp_path):
    masks = large_masks(3, tmp_path)
    for name, mask in masks.items():
        assert int(mask.sum()) == 6000, name
        # Hypergeometric: 24 parts of 1,000 places with 250 kept each, sd 13.4; so are rows and columns, sd 6.1 and 4.7.
        parts = mask.view(-1).view(24, 1000).sum(1)
        assert (parts - 250).abs().max() < 5 * 13.4
        assert 0.3 < float(((parts - 250.0) / 13.4).square().mean()) < 2.2
        assert (mask.sum(1) - 50).abs().max() < 5 * 6.1
        assert (mask.sum(0) - 30).abs().max() < 5 * 4.7
        neighbours = mask.view(-1)[1:] & mask.view(-1)[:-1]
        assert abs(int(neighbours.sum()) - 1500) < 5 * 27
    both = int((masks["first.weight"] & masks["second.weight"]).sum())
    assert abs(both - 1500) < 5 * 29  # two tensors of one shape have two streams
    other = large_masks(4, tmp_path)
    assert abs(int((masks["first.weight"] & other["first.weight"]).sum()) - 1500) < 5 * 29


@pytest.mark.parametrize("control", ["reinit", "random_mask_reinit"])
def test_a_reinit_trains_the_modules_own_weights(path, found, control):
    seed_all(8)
    own = deepcopy(dict(TinyModule().state_dict()))
    run, record = train(trains(path, control=control), seed=8)
    masks = dict(run.callback.masks)
    assert_same(record.starts[0], masked(own, masks))
    assert kept(masks) == kept(found.masks)
    assert all(torch.equal(mask, found.masks[name]) == (control == "reinit") for name, mask in masks.items())
    assert record.rates == train(trains(path), seed=8)[1].rates


def test_both_controls_have_one_mask(path):
    one, other = (train(trains(path, control=c), seed=8)[0] for c in ("random_mask", "random_mask_reinit"))
    assert_same(dict(one.callback.masks), dict(other.callback.masks))


@pytest.mark.parametrize("control", ["reinit", "random_mask_reinit"])
def test_a_reinit_of_the_tickets_own_initialisation_is_refused(path, control):
    with pytest.raises(
        ValueError, match=rf"control='{control}' compares the ticket with another init.* Build it after"
    ):
        train(trains(path, control=control), seed=3)
    train(trains(path), seed=3)  # that is what it was found from


def test_the_controls_have_the_same_data_in_the_same_order(path):
    orders = [train(trains(path, control=c), seed=8)[1].labels for c in ("none", "random_mask", "reinit")]
    assert orders[0] == orders[1] == orders[2]


# Files


@pytest.mark.parametrize("control", ["none", "random_mask"])
def test_fixed_masks_fine_tunes_under_the_masks_of_any_ticket_file(tmp_path, path, control):
    run, _ = train(trains(path, control=control), seed=8)
    again = tmp_path / "again.safetensors"
    run.callback.ticket.save(again)
    tuned = fit(FixedMasks(again), make=PlainModule)
    assert_same(dict(tuned.callback.masks), dict(run.callback.masks))
    assert_same(load_masks(again), dict(run.callback.masks))
    assert all(not tuned.module.get_parameter(n)[~m].any() for n, m in run.callback.masks.items())


def test_a_ticket_of_a_ticket_trains_the_same_again(tmp_path, path):
    first, one = train(trains(path, control="random_mask"), seed=8)
    first.callback.ticket.save(tmp_path / "again.safetensors")
    second, two = train(trains(tmp_path / "again.safetensors"), seed=8)
    assert_same(one.starts[0], two.starts[0])
    assert_same(dict(first.module.state_dict()), dict(second.module.state_dict()))


def test_a_ticket_of_a_bfloat16_run_is_read_back_and_trained_in_either_precision(tmp_path):
    search, record = train(lottery(), precision="bf16-true")
    ticket = search.callback.ticket
    assert ticket.weights.tensors["head.weight"].dtype == torch.bfloat16
    assert_same(dict(ticket.weights.tensors), record.starts[5])
    ticket.save(tmp_path / "ticket.safetensors")
    half, same = train(trains(tmp_path / "ticket.safetensors"), seed=8, precision="bf16-true")
    assert_same(same.starts[0], masked(ticket.weights.tensors, ticket.masks))
    full, other = train(trains(tmp_path / "ticket.safetensors"), seed=8)
    assert other.starts[0]["head.weight"].dtype == torch.float32
    single = {n: t.float() if t.is_floating_point() else t for n, t in ticket.weights.tensors.items()}
    assert_same(other.starts[0], masked(single, ticket.masks))
    assert_same(dict(half.callback.masks), dict(full.callback.masks))


def test_a_ticket_found_in_single_precision_is_trained_in_bfloat16(path, found):
    _, record = train(trains(path), seed=8, precision="bf16-true")
    rounded = {n: t.bfloat16() if t.is_floating_point() else t for n, t in found.weights.tensors.items()}
    assert_same(record.starts[0], masked(rounded, found.masks))


def test_a_ticket_of_another_model_is_refused(tmp_path, path):
    class Wide(TinyModule):
        def __init__(self) -> None:
            super().__init__()
            self.body[5], self.head = nn.Linear(64, 20), nn.Linear(20, 3)

    class WiderBias(TinyModule):
        def __init__(self) -> None:
            super().__init__()
            self.body.register_buffer("extra", torch.zeros(1))

    with pytest.raises(ValueError, match=r"The ticket's masks belong to another model: 'body\.5\.weight' has shape"):
        train(trains(path), make=Wide)
    with pytest.raises(ValueError, match=r"'body\.extra' is missing in the snapshot"):
        train(trains(path), make=WiderBias)
    other = nn.Sequential(nn.Linear(3, 3))
    Ticket(Snapshot.of(other), prune(other, 0.5), "").save(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"'0\.weight' matches no parameter"):
        train(trains(tmp_path / "other.safetensors"))


@pytest.mark.parametrize("batches", [True, 2])
@pytest.mark.parametrize("control", ["none", "random_mask"])
def test_fast_dev_run_trains_the_ticket(path, found, batches, control):
    run, record = train(trains(path, control=control), make=PlainModule, max_epochs=1, fast_dev_run=batches)
    assert kept(run.callback.masks) == kept(found.masks)
    assert_same(record.starts[0], masked(found.weights.tensors, run.callback.masks))


# Arguments


@pytest.mark.parametrize(
    ("choices", "error", "message"),
    [
        (
            {"control": "random"},
            ValueError,
            r"control='random' is unknown\. Choose one of 'none', 'random_mask', 'reinit', ",
        ),
        ({"control": "reinit"}, ValueError, r"control='reinit' needs the ticket .*Give its file as ticket=\."),
        ({"ticket": "PATH", "rounds": 1}, ValueError, r"trained and not pruned, but rounds=1, .* Use rounds=0"),
        ({"ticket": "PATH", "sparsity": 0.8}, ValueError, r"but rounds=0, sparsity=0\.8 and per_round=None"),
        ({"ticket": "PATH", "per_round": 0.2}, ValueError, r"sparsity=None and per_round=0\.2\. Use rounds=0"),
        ({"ticket": "PATH", "retrain": ScaledLR()}, ValueError, r"ScaledLR\(\) needs the learning rates of a dense"),
        ({"ticket": "missing.safetensors"}, FileNotFoundError, r"missing\.safetensors does not exist\. Give the tic"),
        ({"rounds": 0, "sparsity": 0.8}, ValueError, r"rounds is 0; there must be at least 1"),
        ({"rounds": 2}, ValueError, r"sparsity=None and per_round=None: give exactly one"),
        (
            {"rounds": 2, "sparsity": 0.8, "rewind_to": "2ep"},
            ValueError,
            r"rewind_to is 2, but a round is over after 2",
        ),
        ({"rounds": 2, "sparsity": 0.8, "rewind_to": "3it"}, ValueError, r"are in two units"),
        ({"rounds": 2, "sparsity": 0.8, "optimizer_state": "none"}, ValueError, r"optimizer_state='none' is unknown"),
        ({"rounds": 2, "sparsity": 0.8, "check": "no"}, ValueError, r"check='no' is unknown"),
    ],
    ids=str,
)
def test_arguments_that_do_not_go_together_are_refused(path, choices, error, message):
    choices = {"rounds": 0, "rewind_to": "1ep"} | choices
    if choices.get("ticket") == "PATH":
        choices["ticket"] = path
    with pytest.raises(error, match=message):
        LotteryTicketRewinding(choices.pop("rounds"), "2ep", **choices)


def test_a_trainer_of_another_length_is_told_that_of_the_round(path):
    with pytest.raises(
        ValueError, match=r"A dense phase of 0 and 1 rounds of 1 are 1 epochs; .*Trainer\(max_epochs=1\)"
    ):
        train(trains(path), max_epochs=2)
    assert trains(path, length="40ep").length == "39ep"


def test_what_is_kept_of_a_ticket_is_exact_for_any_number_of_rounds():
    for rounds, share in ((1, 0.5), (3, 0.2)):
        run, _ = train(lottery(rounds, "1ep", per_round=share, rewind_to="0ep"))
        total = sum(mask.numel() for mask in run.callback.masks.values())
        assert sum(kept(run.callback.ticket.masks).values()) == total - math.floor(
            (1 - (1 - share) ** rounds) * total + 0.5
        )


def test_the_search_moves_the_weights_that_the_ticket_goes_back_to(search, found):
    assert list(differences(dict(search[0].module.state_dict()), masked(found.weights.tensors, found.masks)))
