"""Gradients that a method sees at length one, or over their losses."""

import balance_cases as cases
import golden
import numpy as np
import pytest

from mtl_jax.balance.balance_config import BalanceConfig
from mtl_jax.balance.balancer import make_balancer
from mtl_jax.errors import UserError

SCALES = np.array([[1e-2], [1.0], [30.0], [1e3]])


def update(jacobians, losses=None, present=None, method="MGDA", **values):
    """The update of each group, and the weights [K, N]."""
    cfg = BalanceConfig(method=method, **values)
    seen = cases.observe(*jacobians, losses=losses, present=present)
    made = make_balancer(cfg, None, seen.names, golden.config("1.1"))
    weights_KN = np.asarray(made.weights(made.init(), seen)[0], np.float64)
    return np.stack([w @ j for w, j in zip(weights_KN, jacobians, strict=True)]), weights_KN


@pytest.mark.parametrize("method", [*cases.DETERMINISTIC, "PCGrad"])
def test_at_length_one_scales_do_not_count(method):
    """Equal to the method on unit vectors, whatever the length; 1e-3 as for float32 Gramians."""
    rows = cases.gradients("normal", 4, 0)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    wanted, _ = update([unit], method=method)
    for scale in (1.0, SCALES):
        found, _ = update([scale * rows], method=method, pre_normalize="l2")
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-3 * np.abs(wanted).max())
    if method == "NashMTL":
        return  # scales never count
    plain, _ = update([SCALES * rows], method=method)
    assert np.abs(plain - wanted).max() > 0.1 * np.abs(wanted).max(), "without it they count"


def test_over_the_loss_the_unit_of_a_loss_does_not_count():
    rows, losses = cases.gradients("conflict", 4, 1), np.array([0.5, 1.0, 2.0, 4.0])
    wanted, _ = update([rows / losses[:, None]])
    for unit in (1.0, SCALES[:, 0]):
        found, _ = update([rows * np.reshape(unit, (-1, 1))], losses * unit, pre_normalize="loss")
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-3 * np.abs(wanted).max())


def test_each_group_has_its_own_lengths_and_who_is_absent_has_no_weight():
    groups = [scale * cases.gradients("normal", 4, n) for n, scale in enumerate((1.0, 50.0, 1e-3))]
    present = [True, False, True, True]
    found, weights_KN = update(groups, present=present, groups="enc_dec", pre_normalize="l2")
    assert (weights_KN[:, 1] == 0).all()
    for k, rows in enumerate(groups):
        alone, _ = update([rows], present=present, pre_normalize="l2")
        np.testing.assert_allclose(found[k], alone[0], rtol=1e-5)


def test_the_update_can_still_be_as_long_as_the_plain_one():
    rows = SCALES * cases.gradients("normal", 4, 2)
    found, _ = update([rows], pre_normalize="l2", rescale="mean_norm")
    np.testing.assert_allclose(np.linalg.norm(found), np.linalg.norm(rows.mean(axis=0)), rtol=1e-5)


@pytest.mark.parametrize("method", ["", "FAMO"])
def test_without_gradients_there_is_nothing_to_normalise(method):
    with pytest.raises(UserError, match=r"Balance\.pre_normalize is for methods that need grad"):
        BalanceConfig(method=method, pre_normalize="l2")
    with pytest.raises(UserError, match=r"must be one of none, l2, loss, got 'l1'\."):
        BalanceConfig(method="MGDA", pre_normalize="l1")
