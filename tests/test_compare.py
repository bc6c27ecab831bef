import itertools

import numpy as np
import pytest
import torch

from paperlib.compare import ERRORS, compare, random_baseline
from paperlib.data import sphere
from paperlib.sphere import to_sphere


def rows(n, d, seed=0):
    return sphere(n, d, seed, dtype=torch.float64).X


def errors_by_hand(x, s, d):
    return {
        "signed": (x - s).norm() / d**0.5,
        "up_to_sign": min((x - s).norm(), (x + s).norm()) / d**0.5,
        "published": (x.abs() - s.abs()).norm() / d**0.5,
    }


@pytest.mark.parametrize("error", ERRORS)
def test_matching_is_the_best_of_all_permutations(error):
    X, S = rows(5, 4), rows(5, 4, seed=1)
    cost = torch.tensor([[errors_by_hand(x, s, 4)[error] for s in S] for x in X])
    best = min(
        itertools.permutations(range(5)), key=lambda order: cost[range(5), list(order)].sum()
    )
    comparison = compare(X, S)
    values = getattr(comparison, error)
    np.testing.assert_allclose(values, cost[range(5), list(best)], rtol=1e-12)
    matching = (
        comparison.matching if error == "signed" else getattr(comparison, f"matching_{error}")
    )
    assert tuple(matching) == best
    mean = getattr(comparison, f"{error}_error")
    assert mean == pytest.approx(values.mean())


def test_a_shuffled_copy_is_recovered_exactly():
    X = rows(8, 30)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    comparison = compare(X, X[order])
    assert comparison.signed_error == comparison.published_error == 0
    assert comparison.recovered(1e-12) == 8
    assert torch.equal(comparison.matched, X) and torch.equal(
        order[comparison.matching], torch.arange(8)
    )


def test_small_errors_are_measured_exactly():
    X = rows(4, 50)
    S = X.clone()
    S[2] += (
        1e-9 * to_sphere(torch.randn(1, 50, generator=torch.Generator().manual_seed(0)).double())[0]
    )
    np.testing.assert_allclose(compare(X, S).signed, [0, 0, 1e-9, 0], atol=1e-13)


def test_flipped_samples_count_up_to_sign_only():
    X = rows(6, 30)
    S = X.clone()
    S[[1, 4]] *= -1
    comparison = compare(X, S)
    assert comparison.recovered() == comparison.recovered(error="signed") == 4
    assert comparison.recovered(error="up_to_sign") == comparison.recovered(error="published") == 6
    assert comparison.signed[[0, 2, 3, 5]].max() == 0 and comparison.signed[[1, 4]].min() > 0.5
    assert torch.equal(comparison.matched_up_to_sign, X)
    # Wrong signs of single coordinates are forgiven by the published error alone.
    S = X.clone()
    S[:, ::2] *= -1
    comparison = compare(X, S)
    assert comparison.recovered(error="published") == 6
    assert comparison.recovered(error="up_to_sign") == comparison.recovered() == 0
    assert comparison.published_error == 0 and comparison.up_to_sign_error > 0.3


def test_the_three_errors_are_ordered():
    comparison = compare(rows(20, 10), rows(20, 10, seed=1))
    assert comparison.published_error < comparison.up_to_sign_error < comparison.signed_error


def test_more_candidates_than_samples_leaves_the_worst_out():
    X = rows(5, 20)
    S = torch.cat([rows(3, 20, seed=1), X.flip(0), X[:1]])
    comparison = compare(X, S)
    assert comparison.recovered(1e-12) == 5 and comparison.candidates == 9
    assert comparison.matching.min() >= 3 and torch.equal(comparison.matched, X)


def test_fewer_candidates_than_samples_recovers_no_more_than_there_are():
    X = rows(5, 20)
    comparison = compare(X, X[[3, 1]])
    assert comparison.matching.tolist() == [-1, 1, -1, 0, -1]
    assert comparison.recovered() == 2
    others = [float(min((x - X[3]).norm(), (x - X[1]).norm())) / 20**0.5 for x in X[[0, 2, 4]]]
    np.testing.assert_allclose(comparison.signed[[0, 2, 4]], others, rtol=1e-12)
    np.testing.assert_array_equal(comparison.nearest, comparison.signed)
    # Two equal training samples and one candidate: both are near it, one is recovered.
    twice = compare(X[[0, 0]], X[:1])
    assert twice.signed.tolist() == [0, 0] and twice.recovered() == 1


def test_nearest_sees_candidates_that_belong_to_another_sample():
    X = rows(3, 20)
    comparison = compare(X, X[[1, 1, 1]])
    assert comparison.recovered() == 1 and comparison.nearest[1] == 0
    np.testing.assert_allclose(comparison.nearest, (X - X[1]).norm(dim=1) / 20**0.5, rtol=1e-12)


def test_the_inputs_are_left_alone_and_their_type_is_kept():
    X = rows(3, 6).float()
    S = X.clone().requires_grad_()
    comparison = compare(X, S)
    assert comparison.matched.dtype == torch.float32 and not comparison.matched.requires_grad
    assert comparison.matched_up_to_sign.dtype == torch.float32
    assert comparison.signed.dtype == np.float64
    assert compare(X, S.double()).matched.dtype == torch.float64


def test_tolerance_is_inclusive_and_checked():
    X = torch.tensor([[2.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    comparison = compare(X, X + torch.tensor([0.0, 0.5, 0.0, 0.0]))
    assert comparison.signed_error == 0.25
    assert comparison.recovered(0.25) == 1 and comparison.recovered(0.2499) == 0
    for bad in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="tolerance must be above 0"):
            comparison.recovered(bad)
    with pytest.raises(ValueError, match="error must be one of signed, up_to_sign, published"):
        comparison.recovered(error="honest")


@pytest.mark.parametrize(
    ("X", "samples", "error", "message"),
    [
        (np.ones((2, 3)), torch.ones(2, 3), TypeError, "X must be a torch tensor, got ndarray"),
        (torch.ones(2, 3), [[1.0]], TypeError, "samples must be a torch tensor, got list"),
        (torch.ones(3), torch.ones(2, 3), ValueError, r"X must have shape \(rows, d\), got \(3,\)"),
        (torch.ones(2, 3), torch.ones(0, 3), ValueError, "samples must have shape"),
        (torch.ones(2, 3), torch.ones(2, 4), ValueError, "d = 3, got 4"),
        (torch.ones(2, 3), torch.full((2, 3), torch.nan), ValueError, "samples must be finite"),
        (torch.full((2, 3), torch.inf), torch.ones(2, 3), ValueError, "X must be finite"),
    ],
)
def test_what_cannot_be_compared_is_refused(X, samples, error, message):
    with pytest.raises(error, match=message):
        compare(X, samples)


def test_summary_reads_as_a_table():
    X = rows(4, 20)
    S = X.clone()
    S[0] *= -1
    text = str(compare(X, S))
    assert text.splitlines()[0] == "4 training samples, 4 reconstructed"
    table = {line.split("  ")[0]: line for line in text.splitlines()[2:5]}
    assert table["signed"].endswith("3 of 4") and table["up to sign"].endswith("4 of 4")
    assert len({len(line) for line in text.splitlines()[1:5]}) == 1
    assert repr(compare(X, S)).startswith("Comparison(3 of 4 recovered, signed error 0.")


def test_random_candidates_score_what_is_known_of_them():
    # Without a choice (n = 1): E|x - s|^2 = 2 d, and E(|x| - |s|)^2 = 2 - 4 / pi by coordinate.
    one = random_baseline(1, 2000, draws=50)
    assert one.signed == pytest.approx(2**0.5, rel=0.01)
    assert one.published == pytest.approx((2 - 4 / np.pi) ** 0.5, rel=0.01)
    # With n to choose from the matching finds closer ones; the paper's small setting.
    ten = random_baseline(10, 50)
    assert 1.2 < ten.signed < 1.35 and 0.74 < ten.published < 0.84
    assert ten.published < ten.up_to_sign < ten.signed
    assert random_baseline(10, 50) == ten != random_baseline(10, 50, seed=1)


def test_random_candidates_against_given_data():
    X = torch.ones(3, 4000, dtype=torch.float64)  # |x_i| has no spread: 1 + E s^2 - 2 E|s|
    flat = random_baseline(3, 4000, X=X)
    assert flat.published == pytest.approx((2 - 2 * (2 / np.pi) ** 0.5) ** 0.5, rel=0.01)
    with pytest.raises(ValueError, match=r"X must have shape \(4, 4000\), got \(3, 4000\)"):
        random_baseline(4, 4000, X=X)
    with pytest.raises(ValueError, match="n must be at least 1"):
        random_baseline(0, 40)
