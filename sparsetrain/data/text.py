"""Text as a stream of bytes: its split, and blocks of it that are exactly resumable."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from sparsetrain.data.files import fetch, read_exactly
from sparsetrain.data.loader import ResumableLoader
from sparsetrain.data.module import Place, SplitDataModule, Splits
from sparsetrain.data.split import split_digest
from sparsetrain.rng import generator


class TextLoader(ResumableLoader):
    """Batches (inputs, targets) of bytes, int64 [B, T] both: a target is the byte that follows its input.

    An epoch cuts the text into blocks of T inputs, one after the other. Without shuffling they begin at the first byte,
    and up to T - 1 inputs at the end are left out. With it they come in random order and begin at a byte in [0, T) that
    is f(seed, epoch): up to 2T - 2 inputs at the two ends are left out, as many in each epoch, but not the same ones.

    Args:
        text: uint8 [N]; N > T, and if shuffled, N >= 2T. Moved to `device` once.
        context: T, at least 1.
        batch_size: blocks in a batch; see `ResumableLoader`, as for the other arguments.

    Raises:
        ValueError: a text that is not uint8 [N] or too short, or what `ResumableLoader` refuses.
    """

    def __init__(
        self,
        text: Tensor,
        context: int,
        *,
        batch_size: int,
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        needed = 2 * context if shuffle else context + 1
        if text.dtype != torch.uint8 or text.ndim != 1 or context < 1 or len(text) < needed:
            raise ValueError(
                f"The text is {text.dtype} {tuple(text.shape)} and context {context}; it must be torch.uint8 [N] with "
                f"N at least {needed}, and context at least 1."
            )
        super().__init__(
            (len(text) - (context if shuffle else 1)) // context,
            batch_size=batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            seed=seed,
            rank=rank,
            world_size=world_size,
            device=device,
        )
        self.text, self.context = text.to(device), context

    def batches(self, share: Tensor, start: int, *, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        offset = int(torch.randint(self.context, (), generator=generator(seed, "offset", epoch))) if self.shuffle else 0
        first = share.to(self.device) * self.context + offset
        places = torch.arange(self.context + 1, device=self.device)
        for index in range(start, len(self)):
            blocks = self.text[self.part(first, index)[:, None] + places]
            yield blocks[:, :-1].long(), blocks[:, 1:].long()


class TextFile(SplitDataModule[Tensor]):
    """Any file as a text: its last `test_size` bytes are test, the `val_size` before them val, and the rest is train.

    A token is a byte: there are 256, for any language and encoding, and in ASCII each is a character.

    Args:
        path: of the file.
        context: bytes in a block, at least 1; see `TextLoader`.
        val_size: bytes of val, more than `context`; with 0 they are trained on, see `SplitDataModule`.
        test_size: bytes of test, more than `context`.
        batch_size: blocks in a batch; see `SplitDataModule`, as for the other arguments.

    Raises:
        FileNotFoundError, ValueError: an argument outside its range; when the text is first asked for, a file that is
            missing, or too short to be split so.
    """

    num_classes = 256
    input_dtype = torch.int64

    def __init__(
        self,
        path: str | Path,
        *,
        context: int = 256,
        val_size: int,
        test_size: int,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        drop_last: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            val_size=val_size,
            drop_last=drop_last,
            seed=seed,
        )
        if context < 1 or test_size <= context or 0 < val_size <= context:
            raise ValueError(
                f"context is {context}, test_size {test_size} and val_size {val_size}; context must be at least 1, "
                "test_size more than that, and val_size too unless it is 0."
            )
        self.path, self.context, self.test_size = Path(path), context, test_size
        self.input_shape = (context,)

    def read(self) -> bytes:
        """The whole file."""
        if not self.path.is_file():
            raise FileNotFoundError(f"The text {self.path} does not exist. Choose another by dataset.path=...")
        return self.path.read_bytes()

    def split(self) -> Splits[Tensor]:
        """Read the text and cut it in three."""
        content = bytearray(self.read())
        train_size, needed = len(content) - self.val_size - self.test_size, 2 * self.context
        if train_size < needed:
            raise ValueError(
                f"{self.path} has {len(content):,} bytes, of which val_size={self.val_size} and "
                f"test_size={self.test_size} leave {train_size:,} to train on; context={self.context} needs at least "
                f"{needed:,}. Hold fewer out, or take a longer text."
            )
        text = torch.frombuffer(content, dtype=torch.uint8)
        train, val, test = torch.split(text, [train_size, self.val_size, self.test_size])
        return Splits(train, val, test, split_digest(train, val, test))

    def loader(
        self, samples: Tensor, place: Place, *, batch_size: int, train: bool, shuffle: bool, drop_last: bool
    ) -> TextLoader:
        return TextLoader(
            samples,
            self.context,
            batch_size=batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            seed=self.seed,
            rank=place.rank,
            world_size=place.world_size,
            device=place.device,
        )


class TinyShakespeare(TextFile):
    """1,115,394 characters of Shakespeare's plays: the first 90 % train, the next 5 % val, the last 5 % test.

    The text is read from `root`/tinyshakespeare/input.txt, and downloaded there if it is missing.

    Args:
        root: folder above tinyshakespeare/.
        context: see `TextFile`, as for the other arguments.

    Raises:
        FileNotFoundError, ValueError, ConnectionError: the file is missing, of another size or out of reach.

    Source: Karpathy 2015, "The unreasonable effectiveness of recurrent neural networks", and its code, char-rnn.

    Differs: nanoGPT (github.com/karpathy/nanoGPT) validates on the last 10 %, our val and test together.
    """

    address = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
    size_bytes = 1_115_394
    md5 = "6fb458f1232090904fb40fe944165e91"

    def __init__(
        self,
        root: str | Path = "data",
        *,
        context: int = 256,
        val_size: int = 55_770,
        test_size: int = 55_770,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        drop_last: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            Path(root) / "tinyshakespeare" / "input.txt",
            context=context,
            val_size=val_size,
            test_size=test_size,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            drop_last=drop_last,
            seed=seed,
        )

    def prepare_data(self) -> None:
        """Download the text if it is not there."""
        if not self.path.exists():
            fetch(self.address, self.path, self.md5)

    def read(self) -> bytes:
        return bytes(read_exactly(self.path, self.size_bytes))
