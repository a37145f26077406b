"""Texts here are bytes 0, 1, 2, ..., so that a token is its own place in the text."""

import hashlib
import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparsetrain.data import TextFile, TextLoader, TinyShakespeare

Batches = list[tuple[Tensor, Tensor]]
T = 4


def make(size: int = 30, *, batch_size: int = 2, shuffle: bool = True, **options) -> TextLoader:
    return TextLoader(torch.arange(size).byte(), T, batch_size=batch_size, shuffle=shuffle, **options)


def epoch(loader: TextLoader, number: int) -> Batches:
    loader.sampler.set_epoch(number)
    return list(loader)


def inputs(batches: Batches) -> list[int]:
    return torch.cat([tokens.flatten() for tokens, _ in batches]).tolist()


def same(left: Batches, right: Batches) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, b) for pairs in zip(left, right, strict=True) for a, b in zip(*pairs, strict=True)
    )


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_sample_is_a_block_of_the_text_and_its_targets_are_one_byte_later(shuffle):
    for tokens, targets in epoch(make(shuffle=shuffle), 3):
        assert tokens.dtype == targets.dtype == torch.int64
        assert torch.equal(tokens, tokens[:, :1] + torch.arange(T))
        assert torch.equal(targets, tokens + 1)


@pytest.mark.parametrize("size", range(T + 1, 3 * T + 2))
def test_evaluation_walks_the_text_from_its_first_byte_and_leaves_out_less_than_a_block(size):
    read = inputs(epoch(make(size, shuffle=False), 5))
    assert read == list(range(len(read)))
    assert 0 <= size - 1 - len(read) < T


@pytest.mark.parametrize("size", range(2 * T, 3 * T + 1))
def test_a_shuffled_epoch_has_each_byte_once_between_an_offset_of_its_own_and_the_last_whole_block(size):
    loader, offsets = make(size), set()
    for number in range(40):
        read = sorted(inputs(epoch(loader, number)))
        assert read == list(range(read[0], read[0] + len(read)))
        assert len(read) == size // T * T - T
        offsets.add(read[0])
    assert offsets == set(range(T))


def test_the_blocks_of_an_epoch_come_in_random_order():
    starts = [tokens[0, 0].item() for tokens, _ in epoch(make(200, batch_size=1), 0)]
    assert starts != sorted(starts)


def test_batches_are_a_function_of_seed_and_epoch_alone_and_reseed_counts_from_epoch0():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    expected = epoch(make(seed=3), 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(epoch(make(seed=3), 2), expected)
    assert inputs(epoch(make(seed=4), 2)) != inputs(expected)
    again = make(seed=0)
    again.reseed(3, epoch0=5)
    assert same(epoch(again, 7), expected)


def test_resuming_after_any_batch_continues_the_stream_bit_for_bit():
    loader = make()
    length = len(loader)
    assert length == 3
    stream = [batch for number in range(3) for batch in epoch(loader, number)]
    for done in range(2 * length + 1):
        interrupted, (number, rest) = make(), divmod(done, length)
        for past in range(number):
            epoch(interrupted, past)
        interrupted.sampler.set_epoch(number)
        list(itertools.islice(interrupted, rest))
        resumed = make()
        resumed.load_state_dict(interrupted.state_dict())
        tail = [batch for later in range(number, 3) for batch in epoch(resumed, later)]
        assert same(tail, stream[done:]), done


@pytest.mark.parametrize("shuffle", [False, True])
def test_ranks_share_the_blocks_of_one_process(shuffle):
    one = inputs(epoch(make(2 + 9 * T, batch_size=8, shuffle=shuffle), 1))
    ranks = [inputs(epoch(make(2 + 9 * T, shuffle=shuffle, rank=rank, world_size=2), 1)) for rank in (0, 1)]
    assert sorted(ranks[0] + ranks[1]) == sorted(one)


def test_texts_that_give_no_block_are_refused():
    with pytest.raises(ValueError, match=r"torch\.uint8 \(7,\) and context 4; .* at least 8"):
        make(7)
    with pytest.raises(ValueError, match=r"\(4,\) and context 4; .* at least 5"):
        make(4, shuffle=False)
    with pytest.raises(ValueError, match=r"torch\.int64 \(30,\)"):
        TextLoader(torch.arange(30), T, batch_size=1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_bytes(bytes(range(60)))
    return path


def test_the_end_of_the_file_is_test_and_what_is_before_it_val(path):
    data = TextFile(path, context=T, val_size=15, test_size=10)
    train, val, test, _ = data.splits
    parts = [part.tolist() for part in (train, val, test)]
    assert parts == [list(range(35)), list(range(35, 50)), list(range(50, 60))]
    assert inputs(list(data.val_dataloader())) == list(range(35, 47))
    assert inputs(list(data.test_dataloader())) == list(range(50, 58))
    assert set(inputs(list(data.train_dataloader()))) < set(range(35))
    tokens, _ = next(iter(data.train_dataloader()))
    assert (data.num_classes, data.input_shape, data.input_dtype) == (256, tokens.shape[1:], tokens.dtype)


def test_the_hash_names_the_text_and_its_split_but_not_the_seed(path):
    def digest(**options) -> str:
        return TextFile(path, **{"context": T, "val_size": 15, "test_size": 10, **options}).split_hash

    assert digest(seed=1) == digest(seed=2)
    assert len({digest(), digest(val_size=14), digest(test_size=11)}) == 3


def test_without_val_the_text_before_test_is_trained_on(path):
    data = TextFile(path, context=T, val_size=0, test_size=10)
    assert data.val_dataloader() == []
    assert len(data.splits.train) == 50


def test_a_missing_file_a_short_one_and_impossible_sizes_are_errors_with_the_limit(path, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone does not exist.* dataset\.path"):
        TextFile(tmp_path / "gone", val_size=0, test_size=300).setup("fit")
    with pytest.raises(ValueError, match=r"60 bytes, .* leave 7 to train on; context=4 needs at least 8"):
        TextFile(path, context=T, val_size=25, test_size=28).setup("fit")
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="has 0 bytes"):
        TextFile(path, context=T, val_size=0, test_size=5).setup("fit")
    for sizes in ({"context": 0}, {"test_size": T}, {"val_size": 1}):
        with pytest.raises(ValueError, match="context must be at least 1"):
            TextFile(path, **{"context": T, "val_size": 0, "test_size": 10, **sizes})


def test_tiny_shakespeare_is_downloaded_once_and_read_only_if_it_is_whole(tmp_path, monkeypatch):
    content = b"First Citizen:\nBefore we proceed any further, hear me speak.\n"
    source = tmp_path / "mirror.txt"
    source.write_bytes(content)
    monkeypatch.setattr(TinyShakespeare, "address", source.as_uri())
    monkeypatch.setattr(TinyShakespeare, "md5", hashlib.md5(content).hexdigest())
    monkeypatch.setattr(TinyShakespeare, "size_bytes", len(content))
    data = TinyShakespeare(tmp_path / "root", context=T, val_size=6, test_size=6)
    path = tmp_path / "root" / "tinyshakespeare" / "input.txt"
    with pytest.raises(FileNotFoundError, match=r"input\.txt is missing"):
        data.setup("fit")
    data.prepare_data()
    assert path.read_bytes() == content
    source.unlink()
    data.prepare_data()
    assert bytes(data.splits.test.tolist()) == content[-6:]

    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=rf"{path} holds 60 bytes where 61 are expected"):
        TinyShakespeare(tmp_path / "root", context=T, val_size=6, test_size=6).setup("fit")


def test_tiny_shakespeare_trains_on_the_first_nine_tenths():
    data = TinyShakespeare()
    assert data.size_bytes - data.val_size - data.test_size == int(0.9 * 1_115_394)
    assert data.val_size == data.test_size
