import copy
import hashlib
import struct

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sparsetrain.snapshot import Snapshot


class Everything(nn.Module):
    """Tied weights, channels_last, bfloat16, bool, int, scalar and empty tensors, and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5)
        self.head.weight = self.embed.weight
        self.conv = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(8)
        self.brain = nn.Parameter(torch.randn(3, 2).bfloat16())
        self.frozen = nn.Parameter(torch.randn(2), requires_grad=False)
        self.register_buffer("visible", torch.tensor([True, False, True]))
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("cache", torch.ones(2), persistent=False)
        self.inner = nn.Module()
        self.inner.register_buffer("cache", torch.ones(2), persistent=False)


@pytest.fixture
def module():
    torch.manual_seed(0)
    return Everything()


def bits(module):
    """The bytes of every tensor in the state dict."""
    return {name: t.contiguous().reshape(-1).view(torch.uint8).tolist() for name, t in module.state_dict().items()}


def scramble(module):
    with torch.no_grad():
        for tensor in module.state_dict(keep_vars=True).values():
            tensor.copy_(~tensor if tensor.dtype == torch.bool else tensor + 1)


def test_restore_brings_every_bit_back(module):
    module.conv.weight.data[0, 0, 0] = torch.tensor([float("nan"), -0.0, 1e-45])
    module.head.bias.data[0] = -float("inf")
    before, snapshot = bits(module), Snapshot.of(module)
    scramble(module)
    assert bits(module) != before
    snapshot.restore_(module)
    assert bits(module) == before


def test_restore_writes_into_the_same_storage_and_keeps_the_memory_format(module):
    snapshot = Snapshot.of(module)
    tensors = module.state_dict(keep_vars=True)
    places = {name: (id(t), t.data_ptr(), t.stride(), t.requires_grad) for name, t in tensors.items()}
    scramble(module)
    snapshot.restore_(module)
    after = module.state_dict(keep_vars=True)
    assert places == {name: (id(t), t.data_ptr(), t.stride(), t.requires_grad) for name, t in after.items()}
    assert module.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_snapshot_does_not_change_with_the_module(module):
    snapshot = Snapshot.of(module)
    held = {name: tensor.clone() for name, tensor in snapshot.tensors.items()}
    scramble(module)
    assert all(torch.equal(tensor, held[name]) for name, tensor in snapshot.tensors.items())


def test_tied_parameters_are_held_once_and_stay_tied(module):
    snapshot = Snapshot.of(module)
    assert "embed.weight" in snapshot.tensors
    assert "head.weight" not in snapshot.tensors
    snapshot.restore_(module)
    assert module.head.weight is module.embed.weight


def test_non_persistent_buffers_are_neither_held_nor_restored(module):
    snapshot = Snapshot.of(module)
    assert not [name for name in snapshot.tensors if "cache" in name]
    module.cache = torch.zeros(7)
    snapshot.restore_(module)
    assert module.cache.tolist() == [0.0] * 7


def test_a_snapshot_is_taken_and_restored_without_gradients(module):
    snapshot = Snapshot.of(module)
    assert not any(tensor.requires_grad for tensor in snapshot.tensors.values())
    snapshot.restore_(module)
    assert all(parameter.is_leaf and parameter.grad_fn is None for parameter in module.parameters())


@pytest.mark.parametrize(
    ("change", "name", "kind"),
    [
        (lambda m: m.register_parameter("extra", nn.Parameter(torch.zeros(1))), "extra", "missing in the snapshot"),
        (lambda m: m.register_buffer("extra", torch.zeros(1)), "extra", "missing in the snapshot"),
        (lambda m: delattr(m, "frozen"), "frozen", "missing in the module"),
        (lambda m: setattr(m, "brain", nn.Parameter(torch.zeros(2, 3).bfloat16())), "brain", r"\(3, 2\).*\(2, 3\)"),
        (lambda m: setattr(m, "brain", nn.Parameter(torch.zeros(3, 2))), "brain", "'bfloat16'.*'float32'"),
    ],
)
def test_a_mismatch_is_one_error_that_names_the_tensor_and_changes_nothing(module, change, name, kind):
    snapshot = Snapshot.of(module)
    scramble(module)
    change(module)
    before = bits(module)
    with pytest.raises(ValueError, match=f"another model: '{name}' .*{kind}.*Build the model"):
        snapshot.restore_(module)
    assert bits(module) == before


def test_many_mismatches_are_counted_in_one_error(module):
    with pytest.raises(ValueError, match="and 11 more"):
        Snapshot.of(module).restore_(nn.Linear(2, 2, bias=False))


def test_equal_modules_have_equal_digests_whatever_their_strides(module):
    other = copy.deepcopy(module)
    other.conv.to(memory_format=torch.contiguous_format)
    assert module.conv.weight.stride() != other.conv.weight.stride()
    assert Snapshot.of(module).digest == Snapshot.of(other).digest
    held = dict(Snapshot.of(module).tensors)
    held["conv.weight"] = held["conv.weight"].to(memory_format=torch.channels_last)
    held["brain"] = held["brain"].t().contiguous().t()
    assert Snapshot(dict(reversed(held.items()))).digest == Snapshot.of(module).digest


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": torch.tensor([0.0])}, {"a": torch.tensor([-0.0])}),
        ({"a": torch.zeros(4)}, {"a": torch.zeros(2, 2)}),
        ({"a": torch.zeros(4)}, {"b": torch.zeros(4)}),
        ({"a": torch.zeros(4)}, {"a": torch.zeros(4, dtype=torch.int32)}),
        ({"a": torch.zeros(2), "b": torch.zeros(0)}, {"a": torch.zeros(0), "b": torch.zeros(2)}),
        ({"a": torch.arange(4).view(2, 2)}, {"a": torch.arange(4).view(2, 2).t()}),
    ],
)
def test_one_flipped_bit_shape_name_or_type_changes_the_digest(one, other):
    assert Snapshot(one).digest != Snapshot(other).digest


def test_the_digest_is_a_plain_hash_of_headers_and_bytes():
    expected = hashlib.sha256(
        b"('a', 'torch.int16', (2,))" + struct.pack("<2h", 1, -2) + b"('b', 'torch.bool', ())" + b"\1"
    ).hexdigest()
    tensors = {"b": torch.tensor(True), "a": torch.tensor([1, -2], dtype=torch.int16)}
    assert Snapshot(tensors).digest == expected


def test_save_and_load_keep_every_bit(module, tmp_path):
    snapshot = Snapshot.of(module)
    before = bits(module)
    snapshot.save(tmp_path / "start.safetensors")
    scramble(module)
    loaded = Snapshot.load(tmp_path / "start.safetensors")
    assert loaded.digest == snapshot.digest
    loaded.restore_(module)
    assert bits(module) == before
    assert [file.name for file in tmp_path.iterdir()] == ["start.safetensors"]


def test_a_tensor_that_is_not_contiguous_is_saved(tmp_path):
    snapshot = Snapshot({"a": torch.arange(6.0).view(2, 3).t()})
    snapshot.save(tmp_path / "a.safetensors")
    assert torch.equal(Snapshot.load(tmp_path / "a.safetensors").tensors["a"], snapshot.tensors["a"])


def test_a_save_that_fails_leaves_the_old_file_and_no_other(module, tmp_path, monkeypatch):
    path = tmp_path / "start.safetensors"
    Snapshot.of(module).save(path)
    digest = Snapshot.load(path).digest
    scramble(module)

    def full_disk(tensors, target, metadata):
        target.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("sparsetrain.snapshot.save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        Snapshot.of(module).save(path)
    assert Snapshot.load(path).digest == digest
    assert list(tmp_path.iterdir()) == [path]


def test_a_truncated_a_damaged_and_a_foreign_file_are_refused(module, tmp_path):
    path = tmp_path / "start.safetensors"
    Snapshot.of(module).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        Snapshot.load(path)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="is damaged"):
        Snapshot.load(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="holds no snapshot"):
        Snapshot.load(path)
