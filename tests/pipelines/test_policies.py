"""The published numbers, and the traps in them."""

import pytest

from fastssl_pipelines import View, policies

ALL = {
    policies.simclr: 2,
    policies.simclr_cifar: 2,
    policies.mocov2: 2,
    policies.byol: 2,
    policies.barlow_twins: 2,
    policies.vicreg: 2,
    policies.swav: 8,
    policies.dino: 10,
    policies.dinov2: 10,
    policies.emp_ssl: 20,
    policies.diet_cifar: 1,
    policies.multiview_cifar: 8,
    policies.multiview_stl: 8,
    policies.mae: 1,
    policies.digits: 2,
}


@pytest.mark.parametrize("policy", ALL, ids=lambda p: p.__name__)
def test_each_policy_is_a_tuple_of_views_with_a_source(policy):
    views = policy()
    assert isinstance(views, tuple) and len(views) == ALL[policy]
    assert all(isinstance(view, View) for view in views)
    assert (
        "arXiv" in policy.__doc__ or "Ours" in policy.__doc__ or "views of BYOL" in policy.__doc__
    )


def test_every_public_policy_is_tested():
    public = {
        f
        for n, f in vars(policies).items()
        if callable(f) and getattr(f, "__module__", "") == policies.__name__
    }
    assert public == set(ALL)


def test_number_of_views_is_the_callers():
    assert len(policies.simclr_cifar(5)) == 5
    assert len(policies.emp_ssl(200)) == 200
    assert len(policies.dino(local=3)) == 5
    assert [v.size for v in policies.swav()] == [224] * 2 + [96] * 6


def test_byol_is_asymmetric():
    one, two = policies.byol()
    assert (one.blur, two.blur) == (1.0, 0.1)
    assert (one.solarize, two.solarize) == (0.0, 0.2)
    assert one.jitter == two.jitter == (0.4, 0.4, 0.2, 0.1)


def test_dinov2_blurs_as_it_ran():
    one, two, *local = policies.dinov2()
    assert (one.blur, two.blur, local[0].blur) == (0.0, 0.9, 0.5)


def test_emp_ssl_takes_patches_of_fixed_size():
    view = policies.emp_ssl()[0]
    assert view.patch == 16 and view.size == 32
    assert view.mean == view.std == (0.5, 0.5, 0.5)


def test_diet_jitters_seldom_and_erases():
    (view,) = policies.diet_cifar()
    assert (view.jitter_p, view.erase, view.jitter[3]) == (0.3, 0.25, 0.2)


def test_multiview_has_no_hue():
    assert policies.multiview_cifar()[0].jitter == (0.4, 0.4, 0.4, 0.0)
    assert policies.multiview_stl()[0].gray == 0.1
