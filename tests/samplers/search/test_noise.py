import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from samplers.predictions import renoise
from samplers.search.noise import cosine_between, gaussian, key, neighbour, rotate


def test_neighbour_is_the_formula_in_double_precision():
    x, z = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    a, b = x.numpy().ravel(), z.numpy().ravel()
    u = a / np.sqrt((a * a).sum())
    w = b - (b * u).sum() * u
    w = w / np.sqrt((w * w).sum())
    expected = np.sqrt((a * a).sum()) * (0.95 * u + np.sqrt(1 - 0.95**2) * w)
    assert np.abs(neighbour(x, z, 0.95).numpy().ravel() - expected).max() <= 1e-12


@given(st.floats(-0.999, 0.999), st.integers(0, 2**62))
def test_neighbours_keep_norm_and_cosine(cosine, seed):
    x, fresh = gaussian(seed, (4, 8, 8)), gaussian(seed + 1, (4, 8, 8))
    y = neighbour(x.double(), fresh, cosine)
    assert abs(float(y.norm() / x.double().norm()) - 1) < 1e-12
    assert abs(cosine_between(x, y) - cosine) < 1e-9


def test_draws_depend_on_their_key_alone():
    torch.manual_seed(3)
    first = gaussian(7, (5,))
    torch.randn(9)
    assert torch.equal(first, gaussian(7, (5,)))
    assert not torch.equal(first, gaussian(8, (5,)))


def test_keys_tell_parts_and_their_order_apart():
    keys = [key(1, 2), key(2, 1), key(12), key(1, "2"), key(1, [2]), key(1, 2, 0)]
    assert len(set(keys)) == len(keys)
    assert key(1, 2) == keys[0]
    assert all(0 <= k < 2**63 for k in keys)


def test_renoising_in_two_steps_has_the_variance_of_one():
    """x0 -> a -> b is distributed as x0 -> b; 1e5 draws, five standard errors."""
    n = 100_000
    for table in (((0.8, 0.6), (0.6, 0.8)), ((0.7, 0.3), (0.4, 0.6)), ((1.0, 2.0), (1.0, 5.0))):
        (a0, s0), (a1, s1) = table
        x = a0 * 2.0 + s0 * gaussian(1, (n,)).double()
        y = renoise(x, table[0], table[1], gaussian(2, (n,)).double())
        assert abs(float(y.mean()) - a1 * 2) < 5 * s1 / n**0.5
        assert abs(float(y.var()) / s1**2 - 1) < 5 * (2 / n) ** 0.5


def test_a_rotated_sample_stays_on_its_level():
    n = 100_000
    clean, level = torch.full((n,), 0.5), (0.6, 0.8)
    x = level[0] * clean + level[1] * gaussian(1, (n,))
    y = rotate(x, clean, level, gaussian(2, (n,)), 0.3)
    assert abs(float((y - level[0] * clean).var()) / level[1] ** 2 - 1) < 5 * (2 / n) ** 0.5
    assert torch.allclose(rotate(x, clean, level, gaussian(2, (n,)), 0.0), x, atol=1e-6)
