import itertools

import pytest
import torch
from torch import Tensor

from sparsetrain.data import Flip, InMemoryLoader, ResumableLoader, Shift

AUGMENT = (Shift(1), Flip())


def make(count: int = 23, *, batch_size: int = 5, augment=AUGMENT, **options) -> InMemoryLoader:
    """A loader whose label is the index of the sample and whose first pixel too, if nothing is augmented."""
    images = torch.arange(count * 2 * 4 * 4).remainder(251).byte().view(count, 2, 4, 4)
    options = {"shuffle": True, **options}
    return InMemoryLoader(
        images,
        torch.arange(count),
        batch_size=batch_size,
        mean=(100.0, 90.0),
        std=(50.0, 60.0),
        augment=augment,
        **options,
    )


def epoch(loader: InMemoryLoader, number: int) -> list[tuple[Tensor, Tensor]]:
    loader.sampler.set_epoch(number)
    return list(loader)


def same(left: list[tuple[Tensor, Tensor]], right: list[tuple[Tensor, Tensor]]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, b) for pairs in zip(left, right, strict=True) for a, b in zip(*pairs, strict=True)
    )


def order(batches: list[tuple[Tensor, Tensor]]) -> list[int]:
    return torch.cat([labels for _, labels in batches]).tolist()


def test_a_batch_is_the_standardised_pixels_and_the_labels():
    loader = make(augment=(), shuffle=False)
    images, labels = next(iter(loader))
    assert torch.equal(labels, torch.arange(5))
    assert images.dtype == torch.float32
    expected = (loader.images[:5].float() - torch.tensor([100.0, 90.0]).view(2, 1, 1)) / torch.tensor(
        [50.0, 60.0]
    ).view(2, 1, 1)
    assert torch.equal(images, expected)


def test_a_subclass_of_the_contract_hands_out_its_own_batches_untouched():
    class Places(ResumableLoader):
        def batches(self, share, start, *, seed, epoch):
            for index in range(start, len(self)):
                made.append((self.part(share, index), torch.tensor([seed, epoch, index])))
                yield made[-1]

    made: list[tuple[Tensor, Tensor]] = []
    loader = Places(7, batch_size=3, seed=5)
    loader.load_state_dict({"epoch": 2, "batch": 1})
    given = epoch(loader, 2)
    assert all(ours is theirs for ours, theirs in zip(given, made, strict=True))
    assert [tuple(part.tolist() for part in batch) for batch in given] == [([3, 4, 5], [5, 2, 1]), ([6], [5, 2, 2])]
    assert given[0][0].dtype == torch.int64


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [5, 5, 5, 5, 3]), (True, [5, 5, 5, 5])])
def test_an_epoch_holds_every_sample_once_in_batches_of_the_given_size(drop_last, sizes):
    loader = make(drop_last=drop_last)
    batches = epoch(loader, 0)
    assert [len(labels) for _, labels in batches] == sizes
    assert len(loader) == len(sizes)
    assert len(set(order(batches))) == sum(sizes)


def test_batches_are_a_function_of_seed_and_epoch_alone():
    loader = make(seed=3)
    zeroth, first = epoch(loader, 0), epoch(loader, 1)
    assert same(epoch(loader, 0), zeroth)
    assert same(epoch(make(seed=3), 1), first)
    assert order(zeroth) != order(first)
    assert order(epoch(make(seed=4), 0)) != order(zeroth)


def test_an_unshuffled_loader_keeps_the_order_in_every_epoch():
    loader = make(shuffle=False)
    assert order(epoch(loader, 0)) == order(epoch(loader, 5)) == list(range(23))


def test_augmentation_differs_between_epochs_batches_and_ranks():
    images = torch.ones(64, 1, 9, 9, dtype=torch.uint8)

    def first_batches(rank: int, number: int) -> list[Tensor]:
        loader = InMemoryLoader(
            images,
            torch.arange(64),
            batch_size=16,
            mean=(0.0,),
            std=(1.0,),
            augment=(Shift(4),),
            rank=rank,
            world_size=2,
        )
        return [batch for batch, _ in epoch(loader, number)]

    batches = [batch for rank in (0, 1) for number in (0, 1) for batch in first_batches(rank, number)]
    assert len(batches) == 8
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(batches, 2))


def test_the_global_generators_are_left_alone_and_without_effect():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    batches = epoch(make(), 0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert same(epoch(make(), 0), batches)


@pytest.mark.parametrize("iterate_first", [False, True], ids=["load, iter", "iter, load"])
@pytest.mark.parametrize("done", range(12))
def test_resuming_after_any_batch_continues_the_stream_bit_for_bit(done, iterate_first):
    loader = make()  # 5 batches an epoch
    stream = [batch for number in range(3) for batch in epoch(loader, number)]

    interrupted = make()
    number, rest = divmod(done, 5)
    for past in range(number):
        epoch(interrupted, past)
    if rest:
        interrupted.sampler.set_epoch(number)
        list(itertools.islice(interrupted, rest))
    state = interrupted.state_dict()

    resumed = make()
    iterator = iter(resumed) if iterate_first else None
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    resumed.sampler.set_epoch(number)
    tail = list(iterator if iterator is not None else resumed)
    tail += [batch for later in range(number + 1, 3) for batch in epoch(resumed, later)]
    assert same(tail, stream[done:])


def test_state_counts_the_batches_handed_out_modulo_the_length():
    loader = make()
    loader.sampler.set_epoch(7)
    states = [loader.state_dict() for _ in loader]
    assert states == [{"epoch": 7, "batch": batch} for batch in (1, 2, 3, 4, 0)]


def test_a_state_of_another_epoch_starts_at_batch_0():
    loader = make()
    loader.load_state_dict({"epoch": 1, "batch": 3})
    assert same(epoch(loader, 2), epoch(make(), 2))


def test_a_loaded_place_is_used_by_one_iteration_only():
    loader = make()
    loader.load_state_dict({"epoch": 0, "batch": 3})
    assert len(list(loader)) == 2
    assert len(list(loader)) == 5


def test_an_iteration_cut_short_does_not_move_the_start_of_the_next():
    loader = make()
    list(itertools.islice(loader, 2))
    assert same(list(loader), epoch(make(), 0))


@pytest.mark.parametrize("batch", [-1, 5])
def test_a_state_beyond_the_epoch_is_refused(batch):
    with pytest.raises(ValueError, match=r"has 5 here\. Resume with the data, batch size"):
        make().load_state_dict({"epoch": 0, "batch": batch})


def test_reseed_gives_an_epoch_the_stream_of_the_new_seed_counted_from_epoch0():
    loader = make(seed=0)
    loader.reseed(9, epoch0=4)
    assert same(epoch(loader, 4), epoch(make(seed=9), 0))
    assert same(epoch(loader, 6), epoch(make(seed=9), 2))
    assert loader.state_dict() == {"epoch": 6, "batch": 0}


def test_reseed_takes_effect_after_iter_but_not_within_an_iteration():
    loader = make(seed=0)
    iterator = iter(loader)
    loader.reseed(9)
    assert torch.equal(next(iterator)[1], epoch(make(seed=9), 0)[0][1])
    loader.reseed(5)
    assert order(list(iterator)) == order(epoch(make(seed=9), 0))[5:]


@pytest.mark.parametrize(("count", "world_size"), [(24, 2), (23, 2), (10, 3), (2, 3)])
def test_training_ranks_get_equal_batches_that_cover_the_data_and_repeat_only_the_padding(count, world_size):
    ranks = [epoch(make(count, batch_size=3, rank=rank, world_size=world_size), 1) for rank in range(world_size)]
    sizes = [[len(labels) for _, labels in batches] for batches in ranks]
    assert all(size == sizes[0] for size in sizes)
    seen = [index for batches in ranks for index in order(batches)]
    assert set(seen) == set(range(count))
    assert len(seen) - count == -count % world_size


def test_training_ranks_together_walk_the_order_of_one_process():
    one = order(epoch(make(24, batch_size=4), 2))
    ranks = [order(epoch(make(24, batch_size=2, rank=rank, world_size=2), 2)) for rank in (0, 1)]
    assert [index for pair in zip(*ranks, strict=True) for index in pair] == one


def test_drop_last_repeats_no_sample_on_several_ranks():
    ranks = [epoch(make(23, batch_size=3, rank=rank, world_size=2, drop_last=True), 0) for rank in (0, 1)]
    seen = [index for batches in ranks for index in order(batches)]
    assert [len(batches) for batches in ranks] == [3, 3]
    assert len(seen) == len(set(seen)) == 18


@pytest.mark.parametrize("batch_size", [2, 3, 4, 5, 100])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [9, 16, 17, 23])
def test_evaluation_ranks_partition_the_data_in_equally_many_batches(count, world_size, batch_size):
    ranks = [
        list(make(count, batch_size=batch_size, shuffle=False, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert sorted(index for batches in ranks for index in order(batches)) == list(range(count))
    assert {len(batches) for batches in ranks} == {-(-count // (world_size * batch_size))}
    assert all(1 <= len(labels) <= batch_size for batches in ranks for _, labels in batches)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"rank": 2, "world_size": 2}, r"rank 2 is outside its world of 2"),
        ({"count": 4, "drop_last": True}, "4 samples .* a smaller batch_size or drop_last=False"),
        ({"count": 5, "batch_size": 1, "shuffle": False, "world_size": 2}, "batch_size of at least 2"),
        ({"count": 2, "shuffle": False, "world_size": 3}, "Use fewer ranks"),
    ],
)
def test_sizes_that_cannot_be_batched_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_wrong_tensors_and_statistics_are_refused():
    images, labels = torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    ok = {"batch_size": 2, "mean": (0.0,), "std": (1.0,)}
    with pytest.raises(ValueError, match=r"torch\.float32 \(4, 1, 2, 2\).*torch\.uint8"):
        InMemoryLoader(images.float(), labels, **ok)
    with pytest.raises(ValueError, match=r"labels are torch\.int32 \(4,\)"):
        InMemoryLoader(images, labels.int(), **ok)
    with pytest.raises(ValueError, match="each of the 1 channels"):
        InMemoryLoader(images, labels, **{**ok, "std": (1.0, 2.0)})
    with pytest.raises(ValueError, match="above 0"):
        InMemoryLoader(images, labels, **{**ok, "std": (0.0,)})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is False")
def test_batches_made_on_a_gpu_are_those_made_on_the_cpu():
    on_cpu, on_gpu = epoch(make(), 1), epoch(make(device="cuda"), 1)
    assert {images.device.type for images, _ in on_gpu} == {"cuda"}
    assert same([(images.cpu(), labels.cpu()) for images, labels in on_gpu], on_cpu)
