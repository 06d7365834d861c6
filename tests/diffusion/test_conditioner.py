"""Named conditions: their slices against closed forms, dropping, statistics, errors, and a model that learns them."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from ldm.config import ConditionConfig, ConfigError
from ldm.diffusion.conditioner import FREQUENCIES, HIGHEST, LOWEST, Conditioner

CONFIGS = (
    ConditionConfig("digit", "class"),
    ConditionConfig("ink", "scalar", column="darkness"),
    ConditionConfig("place", "vector", dropout=0.2),
)
ROWS = [
    {"digit": i % 4, "darkness": 3.0 + 0.5 * (i % 7), "place": [float(i % 5), -2.0 * (i % 3)], "other": "x"}
    for i in range(40)
]


@pytest.fixture(scope="module")
def conditioner() -> Conditioner:
    return Conditioner.measured(CONFIGS, ROWS)


def test_widths_and_statistics_are_those_of_the_columns(conditioner: Conditioner) -> None:
    classes, number, numbers = conditioner.slices
    assert classes.classes == (0, 1, 2, 3)
    darkness, places = np.array([r["darkness"] for r in ROWS]), np.array([r["place"] for r in ROWS])
    assert (number.mean, number.std) == pytest.approx((darkness.mean(), darkness.std()))
    assert numbers.mean == pytest.approx(places.mean(0)) and numbers.std == pytest.approx(places.std(0))
    assert conditioner.width == 4 + (1 + 2 * FREQUENCIES) + 3


def test_slices_are_their_formulas(conditioner: Conditioner) -> None:
    vector = conditioner({"digit": 2, "ink": 4.7, "place": [1.5, -3.0]}, 1).vector[0].double()
    digit, ink, place = vector.split([4, 1 + 2 * FREQUENCIES, 3])
    assert digit.tolist() == [0, 0, 2.0, 0]  # √4, so that the mean square is 1
    _, number, numbers = conditioner.slices
    z = (4.7 - number.mean) / number.std
    omega = np.geomspace(LOWEST, HIGHEST, FREQUENCIES)
    np.testing.assert_allclose(ink, [1, *np.cos(omega * z), *np.sin(omega * z)], atol=1e-6)
    expected = [(v - m) / s for v, m, s in zip((1.5, -3.0), numbers.mean, numbers.std, strict=True)]
    np.testing.assert_allclose(place, [1, *expected], atol=1e-6)


def test_a_linear_map_of_a_class_is_a_learned_vector(conditioner: Conditioner) -> None:
    """What nn.Embedding would hold are the columns of the map."""
    linear = nn.Linear(conditioner.width, 5, bias=False)
    table = nn.Embedding.from_pretrained(linear.weight[:, :4].T.detach() * math.sqrt(4))
    digits = [3, 0, 1, 1]
    torch.testing.assert_close(linear(conditioner({"digit": digits}, 4).vector), table(torch.tensor(digits)))


def test_each_condition_is_dropped_alone(conditioner: Conditioner) -> None:
    whole = conditioner({"digit": [0, 1, 2], "ink": 4.0, "place": [[1, 2], [3, 4], [5, 6]]}, 3).vector
    which = torch.tensor([True, False, True])
    slices = dict(zip(("digit", "ink", "place"), whole.split([4, 33, 3], 1), strict=True))
    for name in slices:
        found = conditioner.dropping(whole, {name: which}).split([4, 33, 3], 1)
        for other, part in zip(slices, found, strict=True):
            expected = slices[other].clone()
            if other == name:
                expected[which] = 0
            assert torch.equal(part, expected)
    assert bool((whole.reshape(3, -1) != 0).any(1).all())
    everything = dict.fromkeys(slices, torch.ones(3, dtype=torch.bool))
    assert torch.equal(conditioner.dropping(whole, everything), conditioner({}, 3).vector)
    assert not conditioner({}, 3).vector.any()


def test_no_value_is_encoded_as_none(conditioner: Conditioner) -> None:
    """The null of a number is not its mean, nor that of a vector."""
    _, number, numbers = conditioner.slices
    vector = conditioner({"ink": number.mean, "place": list(numbers.mean)}, 1).vector[0]
    _, ink, place = vector.split([4, 33, 3])
    assert ink[0] == place[0] == 1
    missing = conditioner.row({"digit": 1, "darkness": None, "place": [0, 0]})
    assert not missing[4:37].any() and missing[:4].any() and missing[37:].any()


def test_units_do_not_matter() -> None:
    """A column in other units, measured in them, gives the same features."""
    metres, feet = ([{"x": scale * i + shift} for i in range(9)] for scale, shift in ((1.0, 0.0), (3.28, 100.0)))
    a, b = (Conditioner.measured([ConditionConfig("x", "scalar")], rows) for rows in (metres, feet))
    torch.testing.assert_close(a({"x": 2.5}, 1).vector, b({"x": 3.28 * 2.5 + 100}, 1).vector)


def test_it_is_made_again_from_json(conditioner: Conditioner) -> None:
    again = Conditioner.from_dict(json.loads(json.dumps(conditioner.to_dict())))
    assert again == conditioner
    values = {"digit": [3, 1], "ink": [4.0, 5.5], "place": [1.0, 2.0]}
    assert torch.equal(again(values, 2).vector, conditioner(values, 2).vector)


def test_text_classes_and_numbers_of_numpy() -> None:
    rows = [{"kind": kind, "size": np.float32(i), "count": np.int64(i % 2)} for i, kind in enumerate("bcab")]
    configs = [ConditionConfig("kind", "class"), ConditionConfig("size", "scalar"), ConditionConfig("count", "class")]
    conditioner = Conditioner.measured(configs, rows)
    assert conditioner.slices[0].classes == ("a", "b", "c") and conditioner.slices[2].classes == (0, 1)
    assert conditioner({"count": np.int64(1)}, 2).vector.shape == (2, conditioner.width)


@pytest.mark.parametrize(
    ("configs", "rows", "message"),
    [
        ([("a", "class")], [{"b": 1}, {"c": 1}], "a: there is no column a, the columns are: b, c"),
        ([("a", "class")], [{"a": None}], "a: no sample has a value in column a"),
        ([("a", "class")], [{"a": 1.5}], "a: a class must be text, an integer, true or false, got 1.5"),
        (
            [("a", "class")],
            [{"a": 1}, {"a": "1"}],
            "a: classes must all be text, or all integers, or all true or false",
        ),
        ([("a", "class")], [{"a": 1}, {"a": True}], "a: classes must all be text, or all integers"),
        ([("a", "scalar")], [{"a": "one"}], "a: a finite number is needed, got 'one'"),
        ([("a", "scalar")], [{"a": "NaN"}], "a: a finite number is needed, got nan"),
        ([("a", "vector")], [{"a": "[1, 2"}], "a: a list of numbers is needed, got '[1, 2'"),
        ([("a", "scalar")], [{"a": math.nan}], "a: a finite number is needed, got nan"),
        ([("a", "scalar")], [{"a": 2}] * 3, "a: it is [2.0] in every sample, so there is nothing to learn of it"),
        ([("a", "vector")], [{"a": [1, 2]}, {"a": [1]}], "a: vectors must have the same number of components"),
        ([("a", "vector")], [{"a": 3}], "a: a list of numbers is needed, got 3"),
        ([("a", "class"), ("a", "scalar")], [{"a": 1}], "conditions: two are called a"),
    ],
)
def test_columns_that_cannot_be_conditions(configs: list, rows: list, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Conditioner.measured([ConditionConfig(*config) for config in configs], rows)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"colour": 1}, "no condition colour, the conditions are: digit, ink, place"),
        ({"digit": 7}, "digit: 7 is not one of its 4 classes: 0, 1, 2, 3"),
        ({"digit": [1, 2, 3]}, "digit: 3 values for 2 samples: give one for all, or for each"),
        ({"ink": "dark"}, "ink: a finite number is needed, got 'dark'"),
        ({"place": [1, 2, 3]}, "place: it has 2 components, got 3"),
    ],
)
def test_values_that_do_not_fit(conditioner: Conditioner, values: dict, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        conditioner(values, 2)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("a b", "class"), "name must be a word"),
        (("caption", "class"), "name must not be one of caption, all"),
        (("a", "colour"), "kind must be one of class, scalar, vector"),
        (("a", "class", None, 1.5), "dropout must lie between"),
    ],
)
def test_settings_out_of_range(settings: tuple, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ConditionConfig(*settings)


def test_a_network_learns_both_and_interpolates_the_number() -> None:
    """Regression of f(class, number) through the U-Net's embedding; the middle third of the numbers is never seen."""
    from ldm.models.layers import TimestepMLP

    torch.manual_seed(0)
    conditioner = Conditioner.measured(CONFIGS[:2], ROWS)
    mlp = nn.Sequential(TimestepMLP(conditioner.width, 64), nn.Linear(64, 1))
    truth = lambda digit, ink: math.sin(ink) + 0.5 * digit  # noqa: E731
    inks = [3.0 + 0.01 * i for i in range(300) if not 100 <= i < 200]
    seen = [(digit, ink) for digit in range(4) for ink in inks]
    unseen = [(digit, 4.0 + 0.05 * i) for digit in range(4) for i in range(20)]

    def encode(pairs: list[tuple[int, float]]) -> torch.Tensor:
        digits, numbers = zip(*pairs, strict=True)
        return conditioner({"digit": digits, "ink": numbers}, len(pairs)).vector

    x, y = encode(seen), torch.tensor([[truth(*pair)] for pair in seen])
    optimizer = torch.optim.AdamW(mlp.parameters(), lr=3e-3, weight_decay=1e-2)
    for _ in range(400):
        loss = (mlp(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        guessed = mlp(encode(unseen))[:, 0]
    expected = torch.tensor([truth(*pair) for pair in unseen])
    assert float(torch.corrcoef(torch.stack([guessed, expected]))[0, 1]) > 0.97
