"""Gradient-side methods against TorchJD, another implementation of the same papers.

Not compared: MGDA, whose solver there is up to 3 % off (tests/test_balance_gradient.py has an exact
one), and GradNorm, which TorchJD does not have.
"""

import balance_cases as cases
import jax
import numpy as np
import pytest

from mtl_jax.balance.surgery import GradVac, PCGrad, visiting_order

pytestmark = pytest.mark.torch

SEEDS = range(5)
FAMILIES = ("normal", "mild", "conflict")
# TorchJD has float64 and the gradients, we float32 and their inner products. Clarabel, the solver
# of its CAGrad, stops at 1e-8 of the objective, that is 1e-4 of a direction; its UPGrad adds
# `reg_eps` (here 1e-9) to G; its Nash-MTL (FairGrad) stops where least squares does. Norms twelve
# orders apart are left to tests/test_balance_gradient.py: TorchJD's solvers drop the small ones.
TOLERANCES = {"CAGrad": 3e-4, "UPGrad": 1e-5, "NashMTL": 1e-5, "IMTLG": 1e-5, "AlignedMTL": 1e-5}


def aggregators():
    from torchjd import aggregation, linalg

    return {
        "CAGrad": aggregation.CAGrad(c=0.5, norm_eps=1e-12),
        "UPGrad": aggregation.UPGrad(
            projector=linalg.QuadprogProjector(norm_eps=1e-12, reg_eps=1e-9)
        ),
        "NashMTL": aggregation.FairGrad(alpha=1.0),
        "IMTLG": aggregation.IMTLG(),
        "AlignedMTL": aggregation.AlignedMTL(),
    }


@pytest.mark.parametrize("tasks", [2, 3, 4, 8])
@pytest.mark.parametrize("name", TOLERANCES)
def test_equals_torchjd(name, tasks):
    import torch

    aggregator = aggregators()[name]
    # AlignedMTL depends on the smallest eigenvalue, 1e-4 of the largest in "mild".
    families = [f for f in FAMILIES if (name, f) != ("AlignedMTL", "mild")]
    jacobians = [cases.gradients(family, tasks, seed) for family in families for seed in SEEDS]
    weights_KN, _, fallen = cases.solve(name, cases.observe(*jacobians))
    assert fallen == 0
    for jacobian, weights_N in zip(jacobians, weights_KN, strict=True):
        expected = aggregator(torch.from_numpy(jacobian)).numpy()
        assert cases.far(weights_N @ jacobian, expected, jacobian) < TOLERANCES[name]


@pytest.fixture
def given_orders(monkeypatch):
    """Makes TorchJD visit tasks in orders given, one list for each task."""
    import torch

    def give(order_NN, others):
        rows = []
        for i, row in enumerate(np.asarray(order_NN).tolist()):
            # GradVac permutes the list of other tasks, PCGrad all.
            rows.append([j - (j > i) for j in row if j != i] if others else row)
        permutations = iter(rows)
        monkeypatch.setattr(torch, "randperm", lambda size: torch.tensor(next(permutations)))

    return give


@pytest.mark.parametrize("family", [*FAMILIES, "scaled"])
def test_pcgrad_equals_torchjd_in_the_same_order(family, given_orders):
    import torch
    from torchjd.aggregation import PCGrad as TorchPCGrad

    for tasks in (2, 3, 4, 8):
        jacobian = cases.gradients(family, tasks, 0)
        seen = cases.observe(jacobian, seed=tasks)
        rng = jax.random.fold_in(jax.random.fold_in(seen.rng, 0), 0)
        given_orders(visiting_order(rng, seen.present), others=False)
        expected = TorchPCGrad()(torch.from_numpy(jacobian)).numpy()
        found = cases.solve(PCGrad(), seen)[0][0] @ jacobian
        assert cases.far(found, expected, jacobian) < 1e-5


def test_gradvac_equals_torchjd_over_steps(given_orders):
    import torch
    from torchjd.aggregation import GradVac as TorchGradVac

    method, theirs = GradVac(beta=0.5), TorchGradVac(beta=0.5, eps=0.0)
    state = method.init(4, 1)
    for number in range(6):
        jacobian = cases.gradients(("normal", "mild", "conflict")[number % 3], 4, number)
        seen = cases.observe(jacobian, seed=number)
        order_NN = visiting_order(jax.random.fold_in(seen.rng, 0), seen.present)
        given_orders(order_NN, others=True)
        expected = theirs(torch.from_numpy(jacobian)).numpy()
        weights_KN, state, _ = cases.solve(method, seen, state)
        assert cases.far(weights_KN[0] @ jacobian, expected, jacobian) < 1e-5
