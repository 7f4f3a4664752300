"""kNN and linear probes against scikit-learn, on real digits; features against the network."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from fastssl.evaluation.features import extract_features, raw_pixels
from fastssl.evaluation.probes import (
    PROBES,
    Probe,
    SGDSettings,
    evaluate_features,
    knn_accuracy,
    linear_probe,
    linear_probe_accuracy,
    ridge_probe,
    sample_labels,
    sgd_probe,
)

Split = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def digits() -> Split:
    x, y = load_digits(return_X_y=True)
    features, labels = torch.from_numpy(x).float() / 16, torch.from_numpy(y)
    return features[:1200], labels[:1200], features[1200:], labels[1200:]


@pytest.mark.parametrize(("count", "k"), [(1200, 20), (1200, 1), (37, 20), (10, 20)])
def test_knn_is_scikit_learns(digits: Split, count: int, k: int) -> None:
    train, train_labels, test, test_labels = digits
    train, train_labels = train[:count], train_labels[:count]
    oracle = KNeighborsClassifier(
        min(k, count), metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
    )
    expected = oracle.fit(train.numpy(), train_labels.numpy()).score(
        test.numpy(), test_labels.numpy()
    )
    got = knn_accuracy(train, train_labels, test, test_labels, k=k)
    assert got == pytest.approx(expected, abs=1.01 / len(test))  # one near-tie may fall either way


def test_knn_weighs_by_similarity() -> None:
    train = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.05, 1.0]])
    labels = torch.tensor([0, 1, 1])
    near_first = torch.tensor([[1.0, 0.1]])
    assert knn_accuracy(train, labels, near_first, torch.tensor([0]), k=3) == 1.0
    assert knn_accuracy(train, labels, near_first, torch.tensor([0]), k=3, temperature=1e6) == 0.0


def test_linear_probe_is_scikit_learns(digits: Split) -> None:
    train, train_labels, test, test_labels = digits
    weight, bias = linear_probe(train.double(), train_labels, c=1.0)
    oracle = LogisticRegression(C=1.0, tol=1e-8, max_iter=5000).fit(
        train.double().numpy(), train_labels.numpy()
    )
    np.testing.assert_allclose(weight.numpy(), oracle.coef_, atol=2e-3)
    got = ((test.double() @ weight.T + bias).argmax(1) == test_labels).double().mean()
    assert float(got) == oracle.score(test.double().numpy(), test_labels.numpy())


def test_label_samples_are_balanced_repeatable_and_different() -> None:
    labels = torch.tensor([0] * 50 + [1] * 50 + [2] * 3)
    chosen = sample_labels(labels, 5, seed=0)
    assert labels[chosen].bincount().tolist() == [5, 5, 3]
    assert torch.equal(chosen, sample_labels(labels, 5, seed=0))
    assert not torch.equal(chosen, sample_labels(labels, 5, seed=1))


def test_table_of_digits(digits: Split) -> None:
    table = evaluate_features(*digits, draws=3)
    assert list(table) == [f"{p}_{n}" for n in ("all", 10, 5, 1) for p in ("linear", "knn")]
    assert table["linear_all"].std == 0.0 and table["linear_1"].std > 0
    assert table["knn_all"].mean > table["knn_10"].mean > table["knn_1"].mean > 0.4
    chosen = sample_labels(digits[1], 10, 0)
    assert table["knn_10"].mean == pytest.approx(
        np.mean(
            [
                knn_accuracy(digits[0][i], digits[1][i], *digits[2:])
                for i in (sample_labels(digits[1], 10, d) for d in range(3))
            ]
        )
    )
    assert len(chosen) == 100


def test_a_constant_feature_changes_nothing(digits: Split) -> None:
    train, train_labels, test, test_labels = digits
    wider = [torch.cat([x, torch.full((len(x), 1), 7.0)], 1) for x in (train, test)]
    plain = evaluate_features(*digits, draws=1)
    padded = evaluate_features(wider[0], train_labels, wider[1], test_labels, draws=1)
    assert padded["linear_10"] == plain["linear_10"]


def test_features_are_the_networks_in_evaluation_mode() -> None:
    images = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    net(torch.randn(64, 3, 8, 8))  # running statistics that are not the defaults
    options = {
        "image_size": 8,
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.3, 0.4),
        "device": torch.device("cpu"),
    }
    got = extract_features(net, images, batch_size=3, **options)
    assert net.training
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(
        3, 1, 1
    )
    with torch.no_grad():
        torch.testing.assert_close(got, net.eval()(x))


def test_raw_pixels_are_the_image_or_a_small_copy() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    torch.testing.assert_close(
        raw_pixels(images), torch.from_numpy(images).permute(0, 3, 1, 2).flatten(1) / 255
    )
    large = np.full((2, 64, 64, 3), 51, dtype=np.uint8)
    torch.testing.assert_close(raw_pixels(large), torch.full((2, 3 * 32 * 32), 0.2))


def test_probe_accuracy_of_separable_classes_is_one() -> None:
    x = torch.eye(3).repeat(5, 1)
    y = torch.arange(3).repeat(5)
    assert linear_probe_accuracy(x, y, x, y) == 1.0


@pytest.mark.parametrize(("rows", "alpha"), [(1200, 1.0), (40, 1.0), (300, 0.01)])
def test_ridge_probe_is_scikit_learns(digits: Split, rows: int, alpha: float) -> None:
    """With more rows than the 64 dimensions, and with fewer."""
    train, labels, test, _ = digits
    train, labels = train[:rows].double(), labels[:rows]
    weight, bias = ridge_probe(train, labels, alpha=alpha)
    oracle = RidgeClassifier(alpha=alpha).fit(train.numpy(), labels.numpy())
    np.testing.assert_allclose(weight.numpy(), oracle.coef_, atol=1e-8)
    np.testing.assert_allclose(bias.numpy(), oracle.intercept_, atol=1e-8)
    scores = test.double() @ weight.T + bias
    np.testing.assert_array_equal(scores.argmax(1).numpy(), oracle.predict(test.double().numpy()))


def test_sgd_probe_converges_to_the_minimum(digits: Split) -> None:
    """Where the gradient of cross-entropy plus decay is a thousandth of what it began with."""
    x, y = digits[0][:200].double(), digits[1][:200]
    settings = SGDSettings(lr=0.5, epochs=400, batch_size=200, weight_decay=0.01, cosine=True)

    def gradient(weight: Tensor, bias: Tensor) -> Tensor:
        weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
        decay = 0.005 * (weight.square().sum() + bias.square().sum())
        (nn.functional.cross_entropy(x @ weight.T + bias, y) + decay).backward()
        assert weight.grad is not None and bias.grad is not None
        return torch.cat([weight.grad.flatten(), bias.grad]).norm()

    start = gradient(x.new_zeros(10, 64), x.new_zeros(10))
    assert gradient(*sgd_probe(x, y, settings=settings)) < 1e-3 * start


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_sgd_probe_takes_the_steps_of_torch(digits: Split, optimizer: str) -> None:
    """Two epochs in batches of 60 of 100, against a linear layer trained in plain PyTorch."""
    x, y = digits[0][:100], digits[1][:100]
    settings = SGDSettings(
        optimizer=optimizer,  # type: ignore[arg-type]
        lr=0.03,
        epochs=2,
        batch_size=60,
        weight_decay=5e-3,
        label_smoothing=0.1,
    )
    weight, bias = sgd_probe(x, y, settings=settings, seed=3)
    layer = nn.Linear(64, 10)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    torch_optimizer = (
        torch.optim.Adam(layer.parameters(), lr=0.03, weight_decay=5e-3)
        if optimizer == "adam"
        else torch.optim.SGD(layer.parameters(), lr=0.03, momentum=0.9, weight_decay=5e-3)
    )
    generator = torch.Generator().manual_seed(3)
    for _ in range(2):
        order = torch.randperm(100, generator=generator)
        for rows in (order[:60], order[60:]):
            torch_optimizer.zero_grad()
            nn.functional.cross_entropy(layer(x[rows]), y[rows], label_smoothing=0.1).backward()
            torch_optimizer.step()
    torch.testing.assert_close(weight, layer.weight.detach())
    torch.testing.assert_close(bias, layer.bias.detach())


def test_a_share_of_the_labels_is_a_share_of_each_class() -> None:
    labels = torch.tensor([0] * 500 + [1] * 100 + [2] * 3)
    assert labels[sample_labels(labels, "10%", seed=0)].bincount().tolist() == [50, 10, 1]
    assert labels[sample_labels(labels, "1%", seed=1)].bincount().tolist() == [5, 1, 1]
    assert torch.equal(sample_labels(labels, "1%", 1), sample_labels(labels, "1%", 1))


def test_every_probe_shares_the_features(digits: Split) -> None:
    quick = Probe(partial(sgd_probe, settings=SGDSettings(lr=0.1, epochs=5, batch_size=50)))
    probes = {"linear": PROBES["lbfgs"], "ridge": PROBES["ridge"], "sgd": quick}
    table = evaluate_features(*digits, draws=2, probes=probes, labels=(None, "10%", 1))
    assert list(table) == [f"{p}_{c}" for c in ("all", "10%", 1) for p in (*probes, "knn")]
    for probe in probes:
        assert table[f"{probe}_all"].mean > 0.85 > 0.7 > table[f"{probe}_1"].mean > 0.3, table
    assert table["linear_all"].std == 0 < table["linear_10%"].std


def test_a_probe_may_use_raw_features(digits: Split) -> None:
    seen: list[Tensor] = []

    def fit(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(x)
        return ridge_probe(x, y)

    probes = {"unit": Probe(fit), "plain": Probe(fit, standardised=False)}
    evaluate_features(*digits, probes=probes, labels=(None,))
    assert torch.equal(seen[1], digits[0])
    varying = digits[0].std(0) > 0
    torch.testing.assert_close(seen[0][:, varying].std(0), torch.ones(int(varying.sum())))


@pytest.mark.parametrize("probe", ["lbfgs", "sgd"])
def test_small_fits_use_one_thread(probe: str, digits: Split) -> None:
    """As many as before otherwise, and afterwards, even after an error."""
    seen: list[int] = []

    class Watched(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is nn.functional.cross_entropy:
                seen.append(torch.get_num_threads())
                if len(seen) == 20:
                    raise KeyboardInterrupt
            return func(*args, **(kwargs or {}))

    threads = torch.get_num_threads()
    fit = {"lbfgs": linear_probe, "sgd": sgd_probe}[probe]
    try:
        torch.set_num_threads(3)
        with pytest.raises(KeyboardInterrupt), Watched():
            fit(digits[0], digits[1])
        assert seen == [1] * 20 and torch.get_num_threads() == 3
        wide = torch.zeros(256, 7000)
        seen.clear()
        with Watched():  # one iteration is enough
            if probe == "lbfgs":
                linear_probe(wide, digits[1][:256], iterations=1)
            else:
                sgd_probe(
                    wide, digits[1][:256], settings=SGDSettings(lr=1, epochs=1, batch_size=256)
                )
        assert set(seen) == {3} == {torch.get_num_threads()}
    finally:
        torch.set_num_threads(threads)
