import pytest
import torch
from torch import Tensor

from sparsetrain.data import Flip, Shift
from sparsetrain.rng import generator


def images(count: int, height: int = 5, width: int = 7) -> Tensor:
    return torch.randint(1, 256, (count, 3, height, width), generator=generator(0, "images")).byte()


def moved(image: Tensor, down: int, right: int) -> Tensor:
    """One image [C, H, W] moved pixel by pixel."""
    out = torch.zeros_like(image)
    _, height, width = image.shape
    for y in range(height):
        for x in range(width):
            if 0 <= y - down < height and 0 <= x - right < width:
                out[:, y, x] = image[:, y - down, x - right]
    return out


@pytest.mark.parametrize("pixels", [0, 1, 3])
def test_shift_moves_each_image_by_one_offset_within_its_range_and_fills_with_zeros(pixels):
    batch = images(40)
    shifted = Shift(pixels)(batch, generator(1))
    offsets = range(-pixels, pixels + 1)
    found = []
    for before, after in zip(batch, shifted, strict=True):
        matches = [(d, r) for d in offsets for r in offsets if torch.equal(moved(before, d, r), after)]
        assert len(matches) == 1
        found += matches
    assert shifted.dtype == torch.uint8
    assert {abs(move) for offset in found for move in offset} == set(range(pixels + 1))


def test_every_shift_is_equally_likely():
    batch = images(1, 3, 3).expand(20_000, -1, -1, -1)
    shifted = Shift(1)(batch, generator(2))
    counts = torch.unique(shifted.flatten(1), dim=0, return_counts=True)[1]
    assert len(counts) == 9
    assert (counts / 20_000 - 1 / 9).abs().max() < 0.01


def test_flip_mirrors_about_half_of_the_images_left_to_right():
    batch = images(400)
    flipped = Flip()(batch, generator(1))
    mirrored = 0
    for before, after in zip(batch, flipped, strict=True):
        mirror = torch.stack([before[..., x] for x in reversed(range(before.shape[-1]))], dim=-1)
        assert torch.equal(after, before) or torch.equal(after, mirror)
        mirrored += torch.equal(after, mirror)
    assert 160 < mirrored < 240


@pytest.mark.parametrize("augmentation", [Shift(2), Flip()])
def test_augmentations_are_functions_of_images_and_generator_alone(augmentation):
    batch = images(20)
    before, state = batch.clone(), torch.get_rng_state()
    first, second = augmentation(batch, generator(3)), augmentation(batch, generator(3))
    assert torch.equal(first, second)
    assert torch.equal(batch, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(augmentation(batch, generator(4)), first)


def test_a_negative_shift_is_refused():
    with pytest.raises(ValueError, match=r"pixels=-1.*at least 0"):
        Shift(-1)
