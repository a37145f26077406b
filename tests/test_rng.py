import hashlib

import torch

from sparsetrain.rng import derive_seed, generator


def test_a_seed_is_a_fixed_function_of_its_names():
    digest = hashlib.sha256(b"(3, 'order', 5)").digest()
    assert derive_seed(3, "order", 5) == int.from_bytes(digest[:8], "big") // 2


def test_seeds_fit_a_generator_and_differ_between_streams():
    names = [(), ("a",), ("b",), ("a", "b"), ("ab",), (1,), ("1",), ("a", 1), (1, "a"), ("a", 11), ("a1", 1)]
    seeds = [derive_seed(seed, *tail) for seed in (0, 1, -1, 2**40) for tail in names]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_stream_does_not_depend_on_what_was_drawn_before_or_elsewhere():
    first = torch.rand(5, generator=generator(0, "masks", 7))
    torch.manual_seed(99)
    torch.rand(3, generator=generator(0, "other"))
    assert torch.equal(torch.rand(5, generator=generator(0, "masks", 7)), first)
    assert not torch.equal(torch.rand(5, generator=generator(0, "masks", 8)), first)


def test_the_global_stream_is_left_alone():
    before = torch.get_rng_state()
    torch.rand(100, generator=generator(0, "masks"))
    assert torch.equal(torch.get_rng_state(), before)
