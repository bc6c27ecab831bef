import math

import pytest

from paperlib.parameters import (
    between,
    boolean,
    check_parameters,
    list_of,
    non_negative_int,
    one_of,
    optional,
    positive,
    positive_int,
    text,
)


@pytest.mark.parametrize(
    ("spec", "good", "bad"),
    [
        (positive_int, [1, 10**9], [0, -1, 1.0, True, "1", None, [1]]),
        (non_negative_int, [0, 7], [-1, 0.0, False, "0"]),
        (positive, [1, 1e-12], [0, -1.0, math.nan, math.inf, True, "1e-3", None]),
        (between(0, 1), [0, 0.5, 1], [-0.1, 1.1, math.nan, "0.5", True]),
        (boolean, [True, False], [0, 1, "true", None]),
        (text, ["", "relu"], [1, None, b"relu"]),
        (one_of("relu", "tanh"), ["relu", "tanh"], ["Relu", "", None, 1]),
        (one_of(1, 2), [1, 2], [True, 1.0, "1", 3]),
        (list_of(positive), [[1, 0.5], (2,)], [[], [1, 0], [1, "1e-3"], 1, "12", None]),
        (list_of(list_of(positive_int)), [[[1], [2, 3]]], [[1], [[0]], [[]]]),
        (optional(positive_int), [None, 1], [0, "None", 1.5]),
    ],
)
def test_spec_accepts_what_it_says(spec, good, bad):
    for value in good:
        check_parameters({"value": value}, value=spec)
    for value in bad:
        with pytest.raises(ValueError, match=r"value: expected .*got "):
            check_parameters({"value": value}, value=spec)


def test_error_names_parameter_expected_and_got():
    with pytest.raises(ValueError) as error:
        check_parameters({"activation": "rellu"}, activation=one_of("relu", "tanh"))
    assert "activation: expected one of 'relu', 'tanh', got 'rellu' (str)" in str(error.value)


def test_all_problems_are_reported_at_once():
    with pytest.raises(ValueError) as error:
        check_parameters(
            {"n": 0, "seed": -1, "d": 5}, n=positive_int, seed=non_negative_int, p=text
        )
    message = str(error.value)
    assert all(f"{name}: expected" in message for name in ("n", "seed", "p"))
    assert "it is not set" in message


@pytest.mark.parametrize("value", ["1e-3", [0.1, "1e-3"]])
def test_number_that_yaml_took_for_text_gets_a_hint(value):
    with pytest.raises(ValueError, match=r"1\.0e-03, and without quotes"):
        check_parameters({"rate": value}, rate=optional(positive))


def test_no_hint_for_text_that_is_no_number():
    with pytest.raises(ValueError) as error:
        check_parameters({"rate": "fast"}, rate=positive)
    assert "YAML" not in str(error.value)


def test_unknown_injected_name_is_an_error():
    cells = ["", "n = 3", "# Parameters\nn = 4\nlearnin_rate = 0.1\n"]
    with pytest.raises(ValueError, match="learnin_rate: no such parameter; there are n"):
        check_parameters({"n": 4, "learnin_rate": 0.1, "In": cells}, n=positive_int)


def test_variables_of_later_cells_are_no_parameters():
    cells = ["", "# Parameters\nn = 4", "found = 3", "check_parameters(globals(), n=positive_int)"]
    check_parameters({"n": 4, "found": 3, "In": cells}, n=positive_int)


def test_a_parameter_may_be_called_namespace():
    check_parameters({"namespace": "a"}, namespace=text)


def test_something_that_is_no_spec_is_a_type_error():
    with pytest.raises(TypeError, match="'n': expected a Spec .* got <class 'int'>"):
        check_parameters({"n": 1}, n=int)
