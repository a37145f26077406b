import pytest

from sparsetrain.steps import RunLength, check_steps, parse_steps

RUN = RunLength(steps_per_epoch=7, total_steps=70)
ENDLESS = RunLength(steps_per_epoch=None, total_steps=None)


@pytest.mark.parametrize(
    ("length", "steps"),
    [
        (0, 0),
        (12, 12),
        ("12it", 12),
        ("12.0it", 12),
        (" 3 ep ", 21),
        ("3ep", 21),
        ("0ep", 0),
        ("0.5run", 35),
        ("0run", 0),
        ("1run", 70),
        ("1.0run", 70),
        ("99ep", 693),
    ],
)
def test_every_notation_gives_its_number_of_steps(length, steps):
    assert parse_steps(length, RUN) == steps
    assert isinstance(parse_steps(length, RUN), int)


def test_fractions_are_rounded_half_up():
    assert [parse_steps(f"{e}ep", RUN) for e in (0.07, 0.0715, 0.5, 1.5)] == [0, 1, 4, 11]
    assert [parse_steps("0.5run", RunLength(None, n)) for n in (1, 3, 5, 7)] == [1, 2, 3, 4]


def test_steps_need_no_run():
    assert parse_steps("500it", ENDLESS) == 500


@pytest.mark.parametrize(
    "length", ["", "ep", "5", "5 steps", "-1it", -1, "1e3it", "5epochs", "3ep2it", 3.0, None, True, False, b"3ep", [3]]
)
def test_another_notation_is_an_error_that_shows_the_right_ones(length):
    with pytest.raises(ValueError, match=r"is no length. Write '3ep', '500it', '0.5run'"):
        parse_steps(length, RUN)


def test_a_part_of_a_step_is_an_error_that_names_the_nearest_whole_one():
    with pytest.raises(ValueError, match=r"'2.5it' is not a whole number of steps. Write '3it'"):
        parse_steps("2.5it", RUN)


def test_more_than_the_run_is_an_error():
    with pytest.raises(ValueError, match=r"'1.01run' is more than the run"):
        parse_steps("1.01run", RUN)


def test_epochs_of_unknown_length_are_an_error_that_asks_for_steps():
    with pytest.raises(ValueError, match=r"'3ep' counts epochs.*Give steps instead"):
        parse_steps("3ep", RunLength(steps_per_epoch=None, total_steps=70))


def test_a_share_of_an_endless_run_is_an_error_that_asks_for_an_end():
    with pytest.raises(ValueError, match=r"'0.5run'.*no fixed end. Set max_epochs or max_steps"):
        parse_steps("0.5run", RunLength(steps_per_epoch=7, total_steps=None))


def test_a_check_names_the_argument_and_needs_no_run():
    check_steps("3ep", "begin")
    with pytest.raises(ValueError, match=r"^begin: '3eq' is no length"):
        check_steps("3eq", "begin")
