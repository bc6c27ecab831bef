"""The estimate of the number of samples, and the experiments on a wrong guess of it."""

import pytest
import torch

from paperlib import (
    RandomFeatures,
    compare,
    fit_min_norm,
    projection_loss,
    sample_count,
    sphere,
)
from paperlib.experiments.sample_count import (
    check_guess_cell,
    describe_candidates,
    run_estimate_cell,
    run_guess_cell,
)
from paperlib.sample_count import estimate_sample_count, fewest_that_explain


@pytest.fixture(scope="module")
def trained():
    data = sphere(4, 20, seed=0)
    model = RandomFeatures(20, 800, "relu", seed=0)
    return data, model, fit_min_norm(model, data.X, data.y)


@pytest.mark.parametrize("most", [4, 7])
def test_the_number_of_samples_is_read_from_the_parameters(trained, most):
    data, model, theta = trained
    count = estimate_sample_count(model, theta, most=most, progress=False)
    assert count.n == 4 and count.explained and count.jump > 1e4
    assert len(count.losses) == most + 1 and len(count.ended) == most
    assert count.losses[0] == 1 and count.losses[3] > 1e-4 > 1e-9 > count.losses[4]
    assert sorted(count.losses, reverse=True) == count.losses
    assert compare(data.X, count.samples).recovered() == 4
    assert float(projection_loss(model, theta, count.samples)) == pytest.approx(count.loss)
    assert "4 samples" in str(count)


def test_too_few_candidates_explain_nothing_and_say_so(trained):
    _, model, theta = trained
    count = estimate_sample_count(model, theta, most=2, progress=False)
    assert not count.explained and count.n <= 2
    assert "do not explain" in str(count)


def test_one_sample():
    data = sphere(1, 12, seed=3)
    model = RandomFeatures(12, 200, "relu+tanh", seed=3)
    theta = fit_min_norm(model, data.X, data.y)
    assert estimate_sample_count(model, theta, most=3, progress=False).n == 1


def test_a_sample_with_a_tiny_coefficient_counts():
    data = sphere(6, 64, seed=1)
    model = RandomFeatures(64, 1920, "relu+tanh", seed=1)
    theta = fit_min_norm(model, data.X, data.y)
    count = estimate_sample_count(model, theta, most=9, seed=1, progress=False)
    assert count.n == 6 and count.losses[5] < 1e-7


def test_fewest_that_explain():
    assert fewest_that_explain([1, 0.5, 1e-3, 1e-12, 1e-13], 1e-10) == (3, pytest.approx(1e7))
    # None explains: where the fall is largest.
    assert fewest_that_explain([1, 0.5, 1e-3, 9e-4], 1e-10) == (2, pytest.approx(500))


def test_bad_input(trained):
    _, model, theta = trained
    with pytest.raises(ValueError, match="most must be at least 1"):
        estimate_sample_count(model, theta, most=0)
    with pytest.raises(ValueError, match="p must be at least n"):
        estimate_sample_count(model, theta, most=801)
    with pytest.raises(ValueError, match="theta is zero"):
        estimate_sample_count(model, 0 * theta, most=3)


def test_candidates_are_described():
    X = sphere(3, 50, seed=0).X
    near = X[0] + 1e-3 * X[1]
    table = describe_candidates(X, torch.stack([near, X[0], -X[2], X[1]]))
    assert list(table["sample"]) == [0, 0, 2, 1]
    assert list(table.kind) == ["duplicate", "sample", "other", "sample"]
    assert table.cosine[2] == pytest.approx(-1)
    assert table.mixed_with[0] == 1 and table.mixed_weight[0] == pytest.approx(1e-3, rel=1e-2)
    mixed = describe_candidates(X, (0.8 * X[2] - 0.5 * X[1])[None])
    assert (mixed["sample"][0], mixed.mixed_with[0]) == (2, 1)
    assert mixed.weight[0] == pytest.approx(0.8) and mixed.mixed_weight[0] == pytest.approx(-0.5)
    assert describe_candidates(X[:1], X).mixed_with.eq(-1).all()


def test_cells():
    fewer = run_guess_cell(4, 2, d=16, p_over_dn=8.0)
    assert not fewer["explained"] and fewer["signed_error"] > 0.2
    more = run_guess_cell(4, 6, d=16, p_over_dn=8.0)
    assert more["explained"] and more["recovered"] + more["duplicates"] + more["others"] == 6
    assert run_estimate_cell(3, 5, d=16, p_over_dn=8.0)["right"]
    with pytest.raises(ValueError, match="p must be at least"):
        check_guess_cell(2, 200, 10, 5.0, "relu", 0, 10)


def test_an_estimate_that_is_stopped_goes_on(trained, tmp_path, monkeypatch):
    data, model, theta = trained
    whole = estimate_sample_count(model, theta, most=6, progress=False)
    real, numbers = sample_count.descend, []

    def descend(*arguments, **options):
        numbers.append(len(arguments[2]))
        if numbers[-1] == 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(sample_count, "descend", descend)
        with pytest.raises(KeyboardInterrupt):
            estimate_sample_count(model, theta, most=6, resume=tmp_path, progress=False)
        assert numbers[0] == 6
        numbers.clear()
        with pytest.raises(KeyboardInterrupt):
            estimate_sample_count(model, theta, most=6, resume=tmp_path, progress=False)
        assert numbers == [3]  # those with 6, 5 and 4 candidates were done
    kept, linearize = [], sample_count.Linearization

    def watched(*arguments, lift, keep="features and slopes", **options):
        if lift is not None:  # as while candidates are removed
            kept.append(keep)
        return linearize(*arguments, lift=lift, keep=keep, **options)

    with monkeypatch.context() as patch:
        patch.setattr(sample_count, "Linearization", watched)
        patch.setattr(sample_count, "choose_kept", lambda *problem, **_: "nothing")
        on = estimate_sample_count(model, theta, most=6, resume=tmp_path, progress=False)
        assert set(kept) == {"nothing"}
        kept.clear()
        estimate_sample_count(model, theta, most=6, resume=tmp_path, progress=False)
        assert not kept  # nothing is left to remove
    assert on.n == whole.n and on.ended == whole.ended
    assert on.losses == pytest.approx(whole.losses, rel=1e-3, abs=1e-10)
    assert compare(data.X, on.samples).recovered() == 4
    # Another tolerance is another estimate.
    monkeypatch.setattr(sample_count, "descend", descend)
    with pytest.raises(KeyboardInterrupt):
        numbers.clear()
        estimate_sample_count(model, theta, most=6, resume=tmp_path, progress=False, tolerance=1e-9)
    assert numbers[0] == 6
