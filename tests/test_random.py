"""Counter-based random numbers: distributions, independence, and that a draw is a function of its key alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from vitrail.data.random import Draw, beta, choice, normal, normal_at, sample_keys, uniform

COUNT = 100_000
STREAMS = [0, 1, int(Draw.MIXUP)]


@pytest.fixture(scope="module")
def keys() -> torch.Tensor:
    return sample_keys(7, 3, torch.arange(COUNT))


def test_the_hash_is_splitmix64() -> None:
    # First three outputs of the published generator from state 0.
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    zero = torch.zeros(1, dtype=torch.int64)
    for stream, word in enumerate(expected):
        assert uniform(zero, stream).item() == (word >> 40) * 2.0**-24
        assert choice(zero, stream, 2**31).item() == word >> 33


@pytest.mark.parametrize("stream", STREAMS)
def test_uniform_draws_are_uniform(keys: torch.Tensor, stream: int) -> None:
    draws = uniform(keys, stream)
    assert draws.dtype == torch.float32
    assert draws.min() >= 0.0 and draws.max() < 1.0
    assert stats.kstest(draws.numpy(), "uniform").pvalue > 1e-3


def test_noise_of_one_picture_is_uniform_and_without_structure(keys: torch.Tensor) -> None:
    noise = uniform(keys[:50], Draw.ERASE_NOISE, (3, 16, 16)).numpy()
    assert noise.shape == (50, 3, 16, 16)
    assert stats.kstest(noise.ravel(), "uniform").pvalue > 1e-3
    assert _joint_pvalue(noise[..., :-1], noise[..., 1:]) > 1e-3
    assert _joint_pvalue(noise[:, :-1], noise[:, 1:]) > 1e-3
    assert _joint_pvalue(noise[:-1], noise[1:]) > 1e-3


def test_normal_draws_are_normal(keys: torch.Tensor) -> None:
    draws = normal(keys, 1)
    assert stats.kstest(draws.numpy(), "norm").pvalue > 1e-3
    assert torch.isfinite(normal(keys[:100], 1, (1000,))).all()


def test_normal_noise_at_some_places_is_the_noise_of_the_whole_picture(keys: torch.Tensor) -> None:
    noise = normal(keys[:4], 5, (3, 7, 9))
    places = torch.tensor([0, 188, 17, 17])
    assert torch.equal(normal_at(keys[:4], 5, places), noise.flatten(1).gather(1, places[:, None])[:, 0])


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 3.0])
def test_beta_draws_follow_the_beta_distribution(keys: torch.Tensor, alpha: float) -> None:
    draws = beta(keys, Draw.MIXUP, alpha).numpy()
    assert draws.min() >= 0 and draws.max() <= 1
    # float32 has no room for small alphas' crowd just below 1, so the two halves are looked at one by one.
    low, high = draws[draws < 0.5], 1 - draws[draws >= 0.5]
    assert stats.binomtest(len(low), COUNT).pvalue > 1e-3
    assert stats.kstest(low, lambda x: 2 * stats.beta(alpha, alpha).cdf(x)).pvalue > 1e-3
    assert stats.kstest(high[high > 1e-3], lambda x: _above(x, alpha)).pvalue > 1e-3


@pytest.mark.parametrize("n", [1, 2, 9, 1000])
def test_choices_are_uniform_and_in_range(keys: torch.Tensor, n: int) -> None:
    counts = torch.bincount(choice(keys, 2, n), minlength=n).numpy()
    assert len(counts) == n
    assert n == 1 or stats.chisquare(counts).pvalue > 1e-3


def test_choices_may_have_a_range_per_picture(keys: torch.Tensor) -> None:
    n = torch.arange(1, 1001)
    draws = choice(keys[:1000], 2, n, (50,))
    assert draws.shape == (1000, 50)
    assert (draws >= 0).all() and (draws < n[:, None]).all()
    assert torch.equal(draws[999], choice(keys[999:1000], 2, 1000, (50,))[0])


@pytest.mark.parametrize("step", ["stream", "index", "seed", "epoch"])
def test_neighbouring_streams_pictures_seeds_and_epochs_are_independent(step: str) -> None:
    index = torch.arange(COUNT)
    first = uniform(sample_keys(0, 0, index), 0).numpy()
    second = {
        "stream": lambda: uniform(sample_keys(0, 0, index), 1),
        "index": lambda: uniform(sample_keys(0, 0, index + 1), 0),
        "seed": lambda: uniform(sample_keys(1, 0, index), 0),
        "epoch": lambda: uniform(sample_keys(0, 1, index), 0),
    }[step]().numpy()
    assert not np.array_equal(first, second)
    assert _joint_pvalue(first, second) > 1e-3
    assert _joint_pvalue(first % 2**-12, second % 2**-12) > 1e-3  # the low bits as well


def test_keys_of_different_seeds_epochs_and_pictures_do_not_collide() -> None:
    keys = [sample_keys(seed, epoch, torch.arange(20_000)) for seed in (-1, 0, 1, 2**32, 2**63) for epoch in (0, 1)]
    assert len(torch.cat(keys).unique()) == 200_000


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(12)), st.integers(1, 12))
def test_a_draw_depends_on_its_own_key_alone(order: list[int], count: int) -> None:
    keys = sample_keys(5, 2, torch.arange(12))
    some = torch.tensor(order[:count])
    for draw in (
        lambda k: uniform(k, 3),
        lambda k: uniform(k, 3, (2, 3)),
        lambda k: normal(k, 3, (4,)),
        lambda k: choice(k, 3, 10),
        lambda k: beta(k, 3, 0.4),
    ):
        assert torch.equal(draw(keys[some]), draw(keys)[some])


def test_an_empty_shape_gives_no_draws(keys: torch.Tensor) -> None:
    assert choice(keys[:3], 0, 5, (0,)).shape == (3, 0)


def _above(x: np.ndarray, alpha: float) -> np.ndarray:
    """Return the distribution function of Beta(alpha, alpha) between 0.001 and 0.5."""
    start, end, here = (stats.beta(alpha, alpha).cdf(value) for value in (1e-3, 0.5, x))
    return (here - start) / (end - start)


def _joint_pvalue(first: np.ndarray, second: np.ndarray) -> float:
    """Return the p-value of the hypothesis that pairs fill a 16 x 16 grid evenly."""
    pairs = [(np.ravel(x) - np.min(x)) / (np.ptp(x) * (1 + 1e-6)) * 16 for x in (first, second)]
    cells = pairs[0].astype(int) * 16 + pairs[1].astype(int)
    return float(stats.chisquare(np.bincount(cells, minlength=256)).pvalue)
