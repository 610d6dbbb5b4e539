"""Comparison of tensors that differ by rounding only: the same sums, taken in another order or on another processor."""

import numpy as np

ROUNDING = 1e-5
"""Bound on the largest deviation of sums in fp32, as a share of the expected tensor's largest element.

An element near zero is often a difference of large terms and keeps their rounding, so a bound on each element's own
relative error would depend on the processor. A wrong index, mask or factor changes results by more than 1e-2 of it.
"""


def deviation(actual, expected):
    """Return the largest absolute difference divided by the largest expected element; inf unless both are finite."""
    ours, theirs = (np.asarray(_as_numpy(values), np.float64) for values in (actual, expected))
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return np.inf
    difference = np.abs(ours - theirs).max(initial=0.0)
    return float(difference and difference / np.abs(theirs).max(initial=np.finfo(np.float64).tiny))


def assert_same_sums(actual, expected, name="", limit=ROUNDING):
    """Assert that two arrays, tensors or numbers are equal up to the rounding of sums in fp32, or up to `limit`."""
    found = deviation(actual, expected)
    assert found <= limit, f"{name or 'a tensor'} deviates by {found:.1e} of its largest element"


def _as_numpy(values):
    return values.detach().double().numpy() if hasattr(values, "detach") else values
