"""Staging as data: which stages the functions return, and what they refuse."""

import dataclasses
import doctest
import itertools
import math

import pytest

from tf_lowbit.training import stages
from tf_lowbit.training.stages import (
    Stage,
    progressive,
    split_epochs,
    stage_at,
    three_phase,
    two_stage,
    two_stage_progressive,
)


def pairs(schedule):
    return [(stage.weight_bits, stage.activation_bits) for stage in schedule]


def test_doctests():
    result = doctest.testmod(stages)
    assert result.failed == 0
    assert result.attempted >= 6


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (2, [(2, 32), (2, 2)]),
        ((1, 2), [(1, 32), (1, 2)]),
        ((3, 5), [(3, 32), (3, 5)]),
        ([4, 8], [(4, 32), (4, 8)]),
    ],
)
def test_two_stage_quantizes_weights_first(bits, expected):
    assert pairs(two_stage(bits, (10, 20))) == expected


def test_two_stage_hands_epochs_rates_and_decay_on():
    assert two_stage(2, (10, 20), (0.1, 0.01), "cosine") == [
        Stage(10, 2, 32, 0.1, "cosine"),
        Stage(20, 2, 2, 0.01, "cosine"),
    ]
    assert [s.learning_rate for s in two_stage(2, (1, 1), 0.5)] == [0.5, 0.5]
    assert [s.learning_rate for s in two_stage(2, (1, 1))] == [None, None]


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (2, [(32, 32), (16, 16), (8, 8), (4, 4), (2, 2)]),
        ((1, 2), [(32, 32), (16, 16), (8, 8), (4, 4), (2, 2), (1, 2)]),
        ((3, 5), [(32, 32), (16, 16), (8, 8), (4, 5), (3, 5)]),
        (8, [(32, 32), (16, 16), (8, 8)]),
        (32, [(32, 32)]),
    ],
)
def test_progressive_walks_down_the_default_ladder(bits, expected):
    assert pairs(progressive(bits, 5)) == expected


@pytest.mark.parametrize(
    ("bits", "ladder", "expected"),
    [
        (2, (8, 4, 2), [(8, 8), (4, 4), (2, 2)]),
        (3, (8, 4, 2), [(8, 8), (4, 4), (3, 3)]),
        (1, (8, 4, 2), [(8, 8), (4, 4), (2, 2), (1, 1)]),
        ((1, 2), (4,), [(4, 4), (1, 2)]),
        (2, (4, 4, 2), [(4, 4), (2, 2)]),
    ],
)
def test_progressive_with_a_shortened_ladder(bits, ladder, expected):
    assert pairs(progressive(bits, 5, ladder)) == expected


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (
            2,
            [
                *[(32, 32), (16, 32), (16, 16), (8, 16), (8, 8)],
                *[(4, 8), (4, 4), (2, 4), (2, 2)],
            ],
        ),
        (
            (1, 2),
            [
                *[(32, 32), (16, 32), (16, 16), (8, 16), (8, 8)],
                *[(4, 8), (4, 4), (2, 4), (2, 2), (1, 2)],
            ],
        ),
        (
            (3, 5),
            [
                *[(32, 32), (16, 32), (16, 16), (8, 16), (8, 8)],
                *[(4, 8), (4, 5), (3, 5)],
            ],
        ),
    ],
)
def test_two_stage_progressive_takes_weights_first_at_each_rung(bits, expected):
    assert pairs(two_stage_progressive(bits, 1)) == expected


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (2, [(8, 8), (4, 4), (2, 4), (2, 2)]),
        ((1, 2), [(8, 8), (4, 4), (2, 2), (1, 2)]),
        ((3, 5), [(8, 8), (4, 5), (3, 5)]),
    ],
)
def test_last_only_takes_weights_first_at_the_last_rung(bits, expected):
    schedule = two_stage_progressive(bits, 1, (8, 4, 2), last_only=True)
    assert pairs(schedule) == expected


def test_one_rung_of_two_stage_progressive_is_two_stage():
    assert two_stage_progressive(2, 7, (2,)) == two_stage(2, (7, 7))


@pytest.mark.parametrize("ladder", [(32, 16, 8, 4, 2), (8, 4, 2), (4, 2)])
@pytest.mark.parametrize("bits", [1, 2, (1, 2), (3, 5), (8, 4), 32])
def test_bits_never_rise_and_no_stage_repeats_the_last(bits, ladder):
    final = bits if isinstance(bits, tuple) else (bits, bits)
    for make in (progressive, two_stage_progressive):
        found = pairs(make(bits, 1, ladder))
        assert found[-1] == final
        for before, after in itertools.pairwise(found):
            assert before != after
            assert before[0] >= after[0]
            assert before[1] >= after[1]


def test_three_phases_differ_in_their_teacher():
    made = three_phase((2, 4), (5, 6, 7), (0.1, 0.2, 0.3), "cosine")
    assert pairs(made) == [(2, 4)] * 3
    assert [stage.teacher for stage in made] == ["absent", None, "frozen"]
    assert [stage.epochs for stage in made] == [5, 6, 7]
    assert [stage.learning_rate for stage in made] == [0.1, 0.2, 0.3]


def test_an_epoch_count_for_each_stage():
    assert [s.epochs for s in progressive(2, (1, 2, 3), (8, 4, 2))] == [1, 2, 3]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: two_stage(2, (10,)), "epochs must be one value or one for each of"),
        (lambda: progressive(2, (1, 2), (8, 4, 2)), "Received: epochs="),
        (lambda: two_stage(2, (1, 1), (0.1,)), "Received: learning_rate="),
        (lambda: two_stage((2, 2, 2), (1, 1)), r"Received: bits=\(2, 2, 2\)"),
        (lambda: two_stage(9, (1, 1)), "Received: bits=9"),
        (lambda: two_stage((2, 0), (1, 1)), "Received: bits=0"),
        (lambda: two_stage(2, (1, 0)), "Received: epochs=0"),
        (lambda: two_stage(2, "12"), "Received: epochs='12'"),
        (lambda: progressive(2, 1, (2, 4, 8)), "ladder must be falling"),
        (lambda: progressive(2, 1, ()), "ladder must be falling"),
        (lambda: progressive(2, 1, (12, 4)), "Received: ladder=12"),
        (lambda: progressive(2, 1, decay="cosine"), "needs a learning_rate"),
        (lambda: three_phase(2, (1, 1)), r"3 stages.*Received: epochs=\(1, 1\)"),
    ],
)
def test_schedules_refuse_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 0}, "Received: epochs=0"),
        ({"epochs": -3}, "Received: epochs=-3"),
        ({"epochs": 1.0}, "Received: epochs=1.0"),
        ({"epochs": True}, "Received: epochs=True"),
        ({"epochs": None}, "Received: epochs=None"),
        ({"epochs": 1, "weight_bits": 9}, "Received: weight_bits=9"),
        ({"epochs": 1, "weight_bits": "2"}, "Received: weight_bits='2'"),
        ({"epochs": 1, "activation_bits": 0}, "Received: activation_bits=0"),
        ({"epochs": 1, "activation_bits": True}, "Received: activation_bits=True"),
        ({"epochs": 1, "learning_rate": 0.0}, "Received: learning_rate=0.0"),
        ({"epochs": 1, "learning_rate": -1}, "Received: learning_rate=-1"),
        ({"epochs": 1, "learning_rate": math.nan}, "Received: learning_rate=nan"),
        ({"epochs": 1, "learning_rate": math.inf}, "Received: learning_rate=inf"),
        ({"epochs": 1, "learning_rate": True}, "Received: learning_rate=True"),
        ({"epochs": 1, "learning_rate": "0.1"}, "Received: learning_rate='0.1'"),
        ({"epochs": 1, "decay": "linear"}, "Received: decay='linear'"),
        ({"epochs": 1, "decay": "step"}, "Received: learning_rate=None"),
        ({"epochs": 1, "decay": "cosine"}, "Received: learning_rate=None"),
        ({"epochs": 1, "teacher": "joint"}, "Received: teacher='joint'"),
    ],
)
def test_a_stage_refuses_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Stage(**arguments)


MILESTONES = "milestones must be shares of the stage in"


@pytest.mark.parametrize(
    ("milestones", "message"),
    [
        ((), MILESTONES + r".*Received: milestones=\(\)"),
        ((0.0, 0.5), MILESTONES),
        ((0.5, 1.0), MILESTONES),
        ((0.6, 0.3), MILESTONES + r".*Received: milestones=\(0.6, 0.3\)"),
        ((0.3, 0.3), MILESTONES),
        ((math.nan,), MILESTONES),
        (("0.3",), MILESTONES),
        ("0.3", MILESTONES),
        (0.3, MILESTONES + ".*Received: milestones=0.3"),
        (None, MILESTONES),
    ],
)
def test_milestones_are_rising_shares(milestones, message):
    with pytest.raises(ValueError, match=message):
        Stage(1, learning_rate=0.1, decay="step", milestones=milestones)


@pytest.mark.parametrize("decay", ["constant", "cosine"])
def test_milestones_belong_to_the_step_decay(decay):
    with pytest.raises(ValueError, match=rf"\(0.5,\), decay='{decay}'"):
        Stage(1, learning_rate=0.1, decay=decay, milestones=(0.5,))
    # The default's values are no others.
    Stage(1, learning_rate=0.1, decay=decay, milestones=(0.3, 0.6))


def test_a_list_of_milestones_is_that_tuple():
    stage = Stage(1, learning_rate=0.1, decay="step", milestones=[0.5, 0.75])
    assert stage == Stage(1, None, None, 0.1, "step", (0.5, 0.75))
    assert hash(stage) == hash(dataclasses.replace(stage))


def test_a_stage_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Stage(1).epochs = 2


def test_constant_rate_and_no_rate_ignore_the_progress():
    assert Stage(1, learning_rate=0.3).learning_rate_at(0.7) == 0.3
    assert Stage(1).learning_rate_at(0.7) is None


@pytest.mark.parametrize(
    ("progress", "expected"),
    [(0.0, 0.2), (0.25, 0.17071068), (0.5, 0.1), (1.0, 0.0), (-1.0, 0.2), (2.0, 0.0)],
)
def test_cosine_falls_from_the_rate_to_zero(progress, expected):
    stage = Stage(1, learning_rate=0.2, decay="cosine")
    assert stage.learning_rate_at(progress) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize(
    ("progress", "expected"), [(0.0, 0.0), (0.1, 0.08), (0.25, 0.2), (0.9, 0.2)]
)
def test_a_constant_rate_rises_over_the_warmup(progress, expected):
    stage = Stage(1, learning_rate=0.2, warmup=0.25)
    assert stage.learning_rate_at(progress) == pytest.approx(expected)


@pytest.mark.parametrize("decay", ["cosine", "step"])
def test_a_warmup_is_a_factor_of_what_the_decay_gives(decay):
    warm = Stage(1, learning_rate=0.2, decay=decay, warmup=0.4)
    cold = dataclasses.replace(warm, warmup=0.0)
    for share, factor in ((0.0, 0.0), (0.1, 0.25), (0.35, 0.875), (0.4, 1), (0.8, 1)):
        assert warm.learning_rate_at(share) == pytest.approx(
            factor * cold.learning_rate_at(share)
        )


@pytest.mark.parametrize("warmup", [1.0, -0.1, float("nan"), "0.1", None])
def test_a_bad_warmup_is_refused(warmup):
    with pytest.raises(ValueError, match=r"at least 0 and below 1. Received: warmup="):
        Stage(1, learning_rate=0.1, warmup=warmup)


def test_a_warmup_needs_a_rate():
    with pytest.raises(ValueError, match=r"needs a learning_rate.*Received: .*None"):
        Stage(1, warmup=0.1)


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [(0, 0.1), (59, 0.1), (60, 0.01), (119, 0.01), (120, 0.001), (200, 0.001)],
)
def test_step_decay_is_the_recipe_of_200_epochs(epoch, expected):
    stage = Stage(200, learning_rate=0.1, decay="step")
    assert stage.learning_rate_at(epoch / 200) == pytest.approx(expected)


# Epochs and milestones in them, and the learning rate of some epochs.
@pytest.mark.parametrize(
    ("epochs", "milestones", "expected"),
    [
        (30, (15, 25), {0: 5e-3, 14: 5e-3, 15: 5e-4, 24: 5e-4, 25: 5e-5, 29: 5e-5}),
        (200, (80, 120), {79: 5e-3, 80: 5e-4, 119: 5e-4, 120: 5e-5, 199: 5e-5}),
        (90, (30, 60, 80), {29: 5e-3, 30: 5e-4, 60: 5e-5, 79: 5e-5, 80: 5e-6}),
        (3, (2,), {0: 5e-3, 1: 5e-3, 2: 5e-4}),
    ],
)
@pytest.mark.parametrize("steps", [1, 391, 5005])
def test_milestones_fall_on_the_first_step_of_their_epoch(
    epochs, milestones, expected, steps
):
    shares = tuple(milestone / epochs for milestone in milestones)
    stage = Stage(epochs, learning_rate=0.005, decay="step", milestones=shares)
    for epoch, rate in expected.items():
        for step in (0, steps - 1):
            # As the callback computes it.
            progress = (epoch + step / steps) / epochs
            assert stage.learning_rate_at(progress) == pytest.approx(rate, rel=1e-12)


def test_no_epochs_milestone_is_missed_by_rounding():
    """Each quotient is rounded correctly, so equal fractions are equal floats."""
    for epochs in range(2, 301):
        for milestone in range(1, epochs):
            share = milestone / epochs
            stage = Stage(epochs, learning_rate=1, decay="step", milestones=(share,))
            rates = [
                stage.learning_rate_at((milestone - 1 + 0.9998) / epochs),
                stage.learning_rate_at(milestone / epochs),
            ]
            assert rates == [1, 0.1]


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (lambda **kw: two_stage(2, (10, 20), **kw), 2),
        (lambda **kw: progressive(2, 10, (8, 4, 2), **kw), 3),
        (lambda **kw: two_stage_progressive(2, 10, (4, 2), **kw), 4),
        (lambda **kw: three_phase(2, 10, **kw), 3),
    ],
)
def test_every_stage_has_the_milestones_as_its_own_shares(make, count):
    rate = {"learning_rate": 0.1, "decay": "step"}
    made = make(**rate, milestones=(0.4, 0.7))
    assert [stage.milestones for stage in made] == [(0.4, 0.7)] * count
    assert [stage.milestones for stage in make(**rate)] == [(0.3, 0.6)] * count
    # A tenth at epoch 4 of 10, at epoch 8 of 20.
    for stage in made:
        edge = stage.epochs * 4 // 10
        rates = [stage.learning_rate_at(e / stage.epochs) for e in (edge - 1, edge)]
        assert rates == pytest.approx([0.1, 0.01])
    with pytest.raises(ValueError, match="Received: milestones="):
        make(learning_rate=0.1, milestones=(0.4,))


@pytest.mark.parametrize(
    ("total", "parts", "expected"),
    [(20, 1, (20,)), (20, 3, (6, 7, 7)), (3, 3, (1, 1, 1)), (9, 2, (4, 5))],
)
def test_split_epochs(total, parts, expected):
    assert split_epochs(total, parts) == expected


def test_split_epochs_keeps_the_total():
    for total in range(1, 30):
        for parts in range(1, total + 1):
            shares = split_epochs(total, parts)
            assert len(shares) == parts
            assert sum(shares) == total
            assert list(shares) == sorted(shares)
            assert shares[-1] - shares[0] <= 1


@pytest.mark.parametrize(
    ("total", "parts", "message"),
    [
        (2, 3, "Received: total=2"),
        (0, 1, "Received: total=0"),
        (2.0, 1, "Received: total=2.0"),
        (4, 0, "Received: parts=0"),
        (4, True, "Received: parts=True"),
    ],
)
def test_split_epochs_refuses(total, parts, message):
    with pytest.raises(ValueError, match=message):
        split_epochs(total, parts)


def test_stage_at_each_epoch():
    schedule = [Stage(3), Stage(1), Stage(2)]
    found = [stage_at(schedule, epoch) for epoch in range(6)]
    assert found == [(0, 0), (0, 0), (0, 0), (1, 3), (2, 4), (2, 4)]


@pytest.mark.parametrize(("schedule", "epoch"), [([Stage(3), Stage(2)], 5), ([], 0)])
def test_stage_at_refuses_an_epoch_behind_the_end(schedule, epoch):
    with pytest.raises(ValueError, match=f"Received: epoch={epoch}"):
        stage_at(schedule, epoch)
