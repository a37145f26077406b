"""Rounds against a walk over every place of the run, lengths and sparsities against their definitions."""

import itertools
import math

import pytest

from sparsetrain.rounds import Rounds, sparsities, whole_lengths


def walk(count: int, length: int, dense: int, rewind_to: int) -> list[tuple[int, int]]:
    """(round, place of a schedule of `length`) of every place of the run, one after the other."""
    places = [(0, place) for place in range(dense)]
    for number in range(1, count + 1):
        place = rewind_to
        while place < length:
            places.append((number, place))
            place += 1
    return places


SHAPES = [
    (count, length, dense, rewind_to)
    for count, length, dense in itertools.product((1, 2, 5), (1, 2, 7), (0, 1, 4, 7))
    for rewind_to in range(length)
]


def test_every_place_of_the_run_belongs_to_the_round_that_a_walk_finds():
    for shape in SHAPES:
        rounds, places = Rounds(*shape), walk(*shape)
        assert rounds.total == len(places), shape
        assert [rounds.at(place) for place in range(rounds.total)] == [number for number, _ in places], shape


def test_rounds_start_where_a_walk_first_meets_them_and_the_one_after_the_last_at_the_end():
    for shape in SHAPES:
        rounds, places = Rounds(*shape), walk(*shape)
        for number in range(1, rounds.count + 1):
            assert rounds.start(number) == min(i for i, (found, _) in enumerate(places) if found == number), shape
            assert rounds.trained == sum(found == number for found, _ in places), shape
        assert rounds.start(0) == 0
        assert rounds.start(rounds.count + 1) == rounds.total


def test_a_round_replays_the_places_of_the_schedule_from_the_one_rewound_to():
    for shape in [shape for shape in SHAPES if shape[2] in (0, shape[1])]:
        rounds, places = Rounds(*shape), walk(*shape)
        assert rounds.schedule == rounds.length
        for number in range(1, rounds.count + 1):
            mine = [place for found, place in places if found == number]
            assert mine == list(range(rounds.replay_from, rounds.schedule)), shape


def test_with_a_dense_phase_of_another_length_a_round_replays_the_tail_of_its_schedule():
    for shape in [shape for shape in SHAPES if shape[2] not in (0, shape[1])]:
        rounds = Rounds(*shape)
        assert rounds.schedule == rounds.dense
        assert rounds.schedule - rounds.replay_from == rounds.trained, shape
        assert (rounds.replay_from < 0) == (rounds.trained > rounds.dense), shape


def test_in_steps_every_epoch_is_as_many_places():
    for shape, factor in itertools.product(SHAPES, (1, 3)):
        epochs, steps = Rounds(*shape), Rounds(*shape).in_steps(factor)
        assert steps.total == epochs.total * factor
        assert all(steps.at(place) == epochs.at(place // factor) for place in range(steps.total)), (shape, factor)
        assert steps.replay_from == epochs.replay_from * factor


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((0, 4, 4, 0), r"^rounds is 0; there must be at least 1\.$"),
        ((-2, 4, 4, 0), r"^rounds is -2; there must be at least 1\.$"),
        ((1, 0, 4, 0), r"^round_length is 0; a round trains at least one step\.$"),
        ((1, 4, 4, 4), r"^rewind_to is 4, but a round is over after 4\. Rewind to an earlier place\.$"),
        ((1, 4, 4, 9), r"^rewind_to is 9, but a round is over after 4\. Rewind to an earlier place\.$"),
        ((1, 4, 4, -1), r"^rewind_to is -1, "),
    ],
)
def test_numbers_out_of_range_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        Rounds(*shape)


@pytest.mark.parametrize(
    ("lengths", "numbers", "unit"),
    [
        ({"a": "40ep", "b": "3ep"}, (40, 3), "ep"),
        ({"a": "40it", "b": 7}, (40, 7), "it"),
        ({"a": "40ep", "b": "0it"}, (40, 0), "ep"),
        ({"a": "40ep", "b": 0}, (40, 0), "ep"),
        ({"a": "40it", "b": "0ep"}, (40, 0), "it"),
        ({"a": "2.0ep", "b": " 3 ep "}, (2, 3), "ep"),
        ({"a": "0ep", "b": 0}, (0, 0), "it"),
    ],
)
def test_whole_lengths_are_numbers_of_the_one_unit_and_zero_goes_with_either(lengths, numbers, unit):
    assert whole_lengths(**lengths) == (numbers, unit)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ({"round_length": "1.5ep"}, r"^round_length='1\.5ep' must be whole epochs such as '40ep' or whole steps"),
        ({"round_length": "0.5run"}, r"^round_length='0\.5run' must be whole epochs .* such as '500it'\.$"),
        ({"round_length": "1run"}, r"^round_length='1run' must be whole epochs"),
        ({"a": "4ep", "b": "20it"}, r"^a='4ep', b='20it' are in two units\. Give all in epochs, or all in steps\.$"),
        ({"a": "4ep", "zero": 0, "b": 20}, r"^a='4ep', b=20 are in two units\."),
        ({"dense_length": "four"}, r"^dense_length: 'four' is no length\. Write '3ep'"),
        ({"dense_length": "2.5it"}, r"^dense_length: '2\.5it' is not a whole number of steps\. Write '3it'\.$"),
        ({"dense_length": -1}, r"^dense_length: '-1it' is no length\."),
        ({"dense_length": True}, r"^dense_length: True is no length\."),
        ({"dense_length": 2.0}, r"^dense_length: 2\.0 is no length\."),
    ],
)
def test_lengths_that_are_not_whole_or_in_two_units_are_refused(lengths, message):
    with pytest.raises(ValueError, match=message):
        whole_lengths(**lengths)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.99])
@pytest.mark.parametrize("rounds", [1, 3, 20])
def test_after_r_rounds_of_a_share_p_the_sparsity_is_one_minus_one_minus_p_to_the_r(share, rounds):
    found = sparsities(rounds, sparsity=None, per_round=share)
    assert found == tuple(1 - (1 - share) ** r for r in range(1, rounds + 1))


@pytest.mark.parametrize("final", [0.0, 0.5, 0.9, 0.977])
@pytest.mark.parametrize("rounds", [1, 2, 7, 20])
def test_to_a_final_sparsity_each_round_prunes_the_same_share_and_the_last_ends_on_it_exactly(final, rounds):
    found = sparsities(rounds, sparsity=final, per_round=None)
    assert len(found) == rounds
    assert found[-1] == final
    kept = [1.0, *(1 - s for s in found)]
    shares = [1 - after / before for before, after in itertools.pairwise(kept)]
    assert shares == pytest.approx([1 - (1 - final) ** (1 / rounds)] * rounds, abs=1e-12)


def test_rounding_does_not_compound():
    """Rounding up in each round what is left of the one before, as open_lth does, ends elsewhere."""
    weights, share, rounds = 1017, 0.2, 20
    compounded = weights
    for _ in range(rounds):
        compounded -= math.ceil(share * compounded)
    final = sparsities(rounds, sparsity=None, per_round=share)[-1]
    assert weights - math.floor(final * weights + 0.5) == round(weights * (1 - share) ** rounds) == 12
    assert compounded == 9


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((None, None), r"^sparsity=None and per_round=None: give exactly one, the final sparsity or the share"),
        ((0.9, 0.2), r"^sparsity=0\.9 and per_round=0\.2: give exactly one"),
        ((1.0, None), r"^sparsity=1\.0 is no sparsity"),
        ((-0.1, None), r"^sparsity=-0\.1 is no sparsity"),
        ((None, 1.0), r"^per_round=1\.0 is no sparsity"),
        ((None, -0.1), r"^per_round=-0\.1 is no sparsity"),
        ((None, math.nan), r"^per_round=nan is no sparsity"),
    ],
)
def test_not_exactly_one_sparsity_or_one_out_of_range_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        sparsities(3, sparsity=given[0], per_round=given[1])
