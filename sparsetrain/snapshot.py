"""A bit-exact copy of a module's weights and buffers, to go back to later and to recognise by its digest."""

import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The parameters and buffers of a module at one moment.

    Tied parameters are held once, under their first name. Non-persistent buffers are left out, as from a checkpoint:
    the module declares them to be no part of its state (caches, tables), and often resizes them.

    Args:
        tensors: by name, on the CPU; taken as they are, so the caller must not change them.
    """

    tensors: Mapping[str, Tensor]

    @classmethod
    def of(cls, module: nn.Module) -> Self:
        """A copy of what `module` holds now, on the CPU."""
        return cls({name: _copy(tensor) for name, tensor in _state(module)})

    @torch.no_grad()
    def restore_(self, module: nn.Module) -> None:
        """Write the values back into the tensors of `module`; their storage, device and memory format stay.

        Raises:
            ValueError: a tensor that is missing on either side or differs in shape or type; nothing is changed then.
        """
        state = dict(_state(module))
        wrong = [f"{name!r} is missing in the module" for name in self.tensors.keys() - state.keys()]
        wrong += [f"{name!r} is missing in the snapshot" for name in state.keys() - self.tensors.keys()]
        wrong += [
            f"{name!r} is {_kind(held)} in the snapshot and {_kind(state[name])} in the module"
            for name, held in self.tensors.items()
            if name in state and _kind(held) != _kind(state[name])
        ]
        if wrong:
            more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise ValueError(
                f"The snapshot belongs to another model: {'; '.join(sorted(wrong)[:3])}{more}. "
                "Build the model with which it was taken."
            )
        for name, tensor in state.items():
            tensor.copy_(self.tensors[name])

    def packed(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """For a checkpoint: the tensors, and of those that have a mask the kept places [kept]."""
        return {name: t[masks[name].cpu()] if name in masks else t for name, t in self.tensors.items()}

    @classmethod
    def unpacked(cls, packed: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> Self:
        """What `packed` returned under the same masks, with zeros at the pruned places."""
        return cls({name: spread(t, masks[name].cpu()) if name in masks else t for name, t in packed.items()})

    def cast_like(self, module: nn.Module) -> Self:
        """The same with each tensor in the type that it has in `module`, which may train in another precision."""
        types = {name: tensor.dtype for name, tensor in _state(module)}
        return type(self)({name: tensor.to(types.get(name, tensor.dtype)) for name, tensor in self.tensors.items()})

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hex, of all names, types, shapes and bytes; the order of names and the strides do not matter."""
        sha = hashlib.sha256()
        for name in sorted(self.tensors):
            tensor = self.tensors[name]
            sha.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
            sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return sha.hexdigest()

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with the digest in its metadata; at `path` is the old file or the whole new one."""
        write_tensors(path, self.tensors, {"digest": self.digest})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            ValueError: another kind of file, or one that is damaged.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                snapshot = cls({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118  # no mapping
        except SafetensorError as error:
            raise ValueError(f"{path} is no whole safetensors file ({error}). Write it with Snapshot.save.") from None
        if "digest" not in metadata:
            raise ValueError(f"{path} holds no snapshot. Write it with Snapshot.save.")
        if metadata["digest"] != snapshot.digest:
            raise ValueError(
                f"{path} is damaged: its tensors have digest {snapshot.digest}, {metadata['digest']} was written."
            )
        return snapshot


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file; at `path` is the old file or the whole new one."""
    path = Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        unfinished = Path(folder) / path.name
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished, metadata)
        unfinished.replace(path)


def _state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each parameter and persistent buffer once, under its first name."""
    yield from module.named_parameters()
    transient = {
        f"{path}.{name}" if path else name
        for path, owner in module.named_modules()
        for name in owner._non_persistent_buffers_set
    }
    yield from ((name, buffer) for name, buffer in module.named_buffers() if name not in transient)


def _copy(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())


def _kind(tensor: Tensor) -> tuple[tuple[int, ...], str]:
    return tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")


def spread(kept: Tensor, mask: Tensor) -> Tensor:
    """The tensor of which `kept` lay where `mask` is True, 0 elsewhere."""
    whole = torch.zeros(mask.shape, dtype=kept.dtype)
    whole[mask] = kept
    return whole
