import json

import pytest
import torch
from conformance.harness import PlainModule, TinyModule, assert_same, fit
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sparsetrain import FixedMasks, Ticket, load_masks, prune, save_masks
from sparsetrain.snapshot import Snapshot


def tickets(module: nn.Module, sparsity: float = 0.7) -> Ticket:
    weights = Snapshot.of(module)
    return Ticket(weights, dict(prune(module, sparsity)), Snapshot.of(module).digest)


@pytest.fixture
def ticket() -> Ticket:
    torch.manual_seed(0)
    return tickets(TinyModule())


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


class Odd(nn.Module):
    """Shapes that do not fill bytes, values that compare unequal to themselves, and every kind of number."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 5)
        self.small = nn.Conv2d(2, 3, 1).bfloat16().to(memory_format=torch.channels_last)
        self.register_buffer("count", torch.tensor(2**40 + 1))
        self.register_buffer("strange", torch.tensor([float("nan"), -0.0, 1e-45, float("inf")]))


@pytest.mark.parametrize("make", [TinyModule, Odd])
def test_a_ticket_is_read_back_bit_for_bit(tmp_path, make):
    ticket = tickets(make())
    ticket.save(tmp_path / "ticket.safetensors")
    again = Ticket.load(str(tmp_path / "ticket.safetensors"))
    assert again.origin == ticket.origin
    assert_same(dict(again.masks), dict(ticket.masks))
    assert again.weights.tensors.keys() == ticket.weights.tensors.keys()
    for name, tensor in ticket.weights.tensors.items():
        assert again.weights.tensors[name].dtype == tensor.dtype
        assert again.weights.tensors[name].shape == tensor.shape
        assert bits(again.weights.tensors[name]) == bits(tensor), name
    assert again.weights.digest == ticket.weights.digest


def test_the_weights_are_saved_unmasked(tmp_path, ticket):
    ticket.save(tmp_path / "ticket.safetensors")
    again = Ticket.load(tmp_path / "ticket.safetensors")
    for name, mask in again.masks.items():
        assert again.weights.tensors[name][~mask].any()


def test_masks_are_saved_at_one_bit_a_weight(tmp_path, ticket):
    ticket.save(tmp_path / "ticket.safetensors")
    with safe_open(tmp_path / "ticket.safetensors", framework="pt") as file:
        assert {name: file.get_tensor(name).numel() for name in ticket.masks} == {
            name: -(-mask.numel() // 8) for name, mask in ticket.masks.items()
        }


def test_load_masks_reads_a_ticket(tmp_path, ticket):
    ticket.save(tmp_path / "ticket.safetensors")
    assert_same(load_masks(tmp_path / "ticket.safetensors"), dict(ticket.masks))


def test_fixed_masks_reads_a_ticket(tmp_path, ticket):
    ticket.save(tmp_path / "ticket.safetensors")
    run = fit(FixedMasks(tmp_path / "ticket.safetensors"), make=PlainModule, max_epochs=1)
    assert_same(dict(run.callback.masks), dict(ticket.masks))


def test_saving_twice_replaces_the_file_and_leaves_nothing_beside_it(tmp_path, ticket):
    path = tmp_path / "ticket.safetensors"
    ticket.save(path)
    torch.manual_seed(1)
    other = tickets(TinyModule())
    other.save(path)
    assert_same(dict(Ticket.load(path).masks), dict(other.masks))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_save_that_fails_leaves_the_old_file_whole(tmp_path, ticket, monkeypatch):
    path = tmp_path / "ticket.safetensors"
    ticket.save(path)
    before = path.read_bytes()

    def half(tensors: dict[str, Tensor], target: object, metadata: dict[str, str]) -> None:
        save_file(tensors, target, metadata)
        raise OSError("no space left on device")

    monkeypatch.setattr("sparsetrain.snapshot.save_file", half)
    with pytest.raises(OSError, match="no space left"):
        Ticket(ticket.weights, ticket.masks, "another").save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_file_that_is_missing_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"ticket\.safetensors does not exist\. Give the ticket"):
        Ticket.load(tmp_path / "ticket.safetensors")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Ticket.load(tmp_path)


def test_a_file_that_is_another_thing_is_refused(tmp_path, ticket):
    save_masks(ticket.masks, tmp_path / "masks.safetensors")
    ticket.weights.save(tmp_path / "snapshot.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors")
    for kind in ("masks", "snapshot", "plain"):
        with pytest.raises(ValueError, match=rf"{kind}\.safetensors holds no ticket\. Give the ticket\.safetensors of"):
            Ticket.load(tmp_path / f"{kind}.safetensors")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_a_truncated_file_is_refused(tmp_path, ticket, share):
    path = tmp_path / "ticket.safetensors"
    ticket.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match=r"ticket\.safetensors is no whole safetensors file \(.*\)\. Give the ticket"):
        Ticket.load(path)


def test_the_metadata_tells_the_shapes_and_the_origin(tmp_path, ticket):
    ticket.save(tmp_path / "ticket.safetensors")
    with safe_open(tmp_path / "ticket.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["origin"] == ticket.origin
    assert json.loads(metadata["shapes"]) == {name: list(mask.shape) for name, mask in ticket.masks.items()}
