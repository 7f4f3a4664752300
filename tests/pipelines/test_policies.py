"""The published numbers, and policies by name."""

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
        if callable(f) and getattr(f, "__module__", "") == policies.__name__ and n[0] != "_"
    }
    assert public - {policies.policy_views} == set(ALL) == set(policies.POLICIES.values())


# By name, 4 views of 64 px: the sides, and one field that tells policies apart.
BY_NAME = {
    "simclr": ([64] * 4, {"jitter": (0.8, 0.8, 0.8, 0.2)}),
    "simclr_cifar": ([64] * 4, {"jitter": (0.4, 0.4, 0.4, 0.1), "scale": (0.08, 1.0)}),
    "mocov2": ([64] * 4, {"scale": (0.2, 1.0), "blur": 0.5}),
    "swav": ([64, 64, 27, 27], {"scale": (0.05, 0.14)}),
    "dino": ([64, 64, 27, 27], {"scale": (0.05, 0.4)}),
    "dinov2": ([64, 64, 28, 28], {"scale": (0.05, 0.32)}),
    "emp_ssl": ([64] * 4, {"patch": 16}),
    "diet_cifar": ([64] * 4, {"erase": 0.25}),
    "multiview_cifar": ([64] * 4, {"jitter": (0.4, 0.4, 0.4, 0.0)}),
    "multiview_stl": ([64] * 4, {"gray": 0.1}),
    "digits": ([64] * 4, {"flip": 0.0}),
}
FIXED = {"byol": 2, "barlow_twins": 2, "vicreg": 2, "mae": 1}


@pytest.mark.parametrize("name", BY_NAME)
def test_a_named_policy_has_the_views_and_sizes_asked_for(name):
    sizes, fields = BY_NAME[name]
    views = policies.policy_views(name, 4, 64)
    assert [view.size for view in views] == sizes
    assert {field: getattr(views[-1], field) for field in fields} == fields


@pytest.mark.parametrize("policy", ALL, ids=lambda p: p.__name__)
def test_a_named_policy_at_its_published_counts_and_sizes_is_the_published_one(policy):
    published = policy()
    named = policies.policy_views(policy.__name__, len(published), published[0].size)
    assert named == published


@pytest.mark.parametrize("name", FIXED)
def test_policies_that_fix_their_number_of_views(name):
    count = FIXED[name]
    assert [view.size for view in policies.policy_views(name, count, 40)] == [40] * count
    message = f"--policy {name} has {count} views, --views is 4; make them equal"
    with pytest.raises(ValueError, match=message):
        policies.policy_views(name, 4, 40)


def test_names_are_all_tested():
    assert set(policies.POLICIES) == set(BY_NAME) | set(FIXED)


@pytest.mark.parametrize("name", ["swav", "dino", "dinov2"])
def test_multi_crop(name):
    big = policies.policy_views(name, 2, 96)
    assert [view.size for view in big] == [96, 96]
    with pytest.raises(ValueError, match=f"--policy {name} has 2 global views, --views is 1"):
        policies.policy_views(name, 1, 96)
    assert [v.size for v in policies.policy_views(name, 3, 1)] == [1, 1, 1]
    local = {"swav": 96, "dino": 96, "dinov2": 98}[name]
    assert policies.policy_views(name, 10, 224)[2:] == policies.POLICIES[name](local=8)[2:]
    assert policies.policy_views(name, 3, 224)[2].size == local
    assert policies.policy_views(name, 3, 448)[2].size == 2 * local


def test_dinov2_takes_a_local_size():
    assert [v.size for v in policies.dinov2(1, 70)] == [224, 224, 70]


def test_unknown_policies_list_those_there_are():
    with pytest.raises(ValueError, match=r"unknown --policy 'rand'; there are simclr, .*, digits"):
        policies.policy_views("rand", 2, 32)


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
