"""Every method: gradient, invariances, collapse, its paper's formula, and no access to labels.

Shapes: N batch, F features, D embedding, V views.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastssl.cli.parsing import parse_config
from fastssl.config import Config, knob_names
from fastssl.data.datasets import load_array
from fastssl.knobs import OracleKnobs, ProjectorKnobs
from fastssl.objectives import METHODS, build_objective, configured
from fastssl.objectives.base import Objective, ProjectedObjective
from fastssl.objectives.default_weights import default_cov_coeff, default_lambd
from fastssl.objectives.oracles import LabelOracle, Oracle
from fastssl.objectives.pal import PAL
from fastssl.objectives.sdiet import BatchHead
from fastssl.optim import build_optimizer
from fastssl.train import train
from fastssl_pipelines import open_pipeline, policies

NAMES = tuple(METHODS)
ORACLE_METHODS = [n for n, method in METHODS.items() if issubclass(method.Knobs, OracleKnobs)]
SAMPLES = 12
BASE = Config(views=3, batch_size=4)
SMALL = {"projector_width": 16, "projector_layers": 1}


def build(method: str, features: int = 3, oracle: Oracle | None = None, **knobs: Any) -> Any:
    """The objective in fp64, in evaluation mode: no dropout of state between two calls."""
    torch.manual_seed(0)
    if issubclass(METHODS[method].Knobs, ProjectorKnobs):
        knobs = SMALL | knobs
    if oracle:
        knobs["oracle"] = "labels"
    config = configured(BASE, method=method, **knobs)
    objective = build_objective(config, features=features, num_samples=SAMPLES, oracle=oracle)
    return objective.double().eval()


def on_embeddings(method: str, width: int, **knobs: Any) -> Any:
    """The objective whose projector passes its input on, so that features are embeddings."""
    objective = build(method, features=width, **knobs)
    if method == "diet":
        return objective
    objective.projector = nn.Identity()
    if method == "sdiet":
        objective.head = BatchHead(SAMPLES, width).double().eval()
    return objective


def inputs(views: int = 3, n: int = 4, width: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(views, n, width, generator=generator, dtype=torch.float64)
    return x, torch.randperm(SAMPLES, generator=generator)[:n]


def every_kind() -> list[Any]:
    """Each method, and each with a graph, as something that builds it."""
    labels = [i % 4 for i in range(SAMPLES)]
    plain = [pytest.param(partial(build, name), id=name) for name in NAMES]
    return plain + [
        pytest.param(lambda name=name: build(name, oracle=LabelOracle(labels)), id=f"{name}-pal")
        for name in ORACLE_METHODS
    ]


@pytest.mark.parametrize("make", every_kind())
def test_gradient_is_that_of_finite_differences(make: Callable[[], Objective]) -> None:
    objective, (x, index) = make(), inputs()
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: objective(x.unbind(0), index)["loss"], x)


@pytest.mark.parametrize("make", every_kind())
def test_order_of_images_and_of_views_does_not_matter(make: Callable[[], Objective]) -> None:
    objective, (x, index) = make(), inputs()
    loss = objective(x.unbind(0), index)["loss"].item()
    order = torch.tensor([2, 0, 3, 1])
    assert objective(x[:, order].unbind(0), index[order])["loss"].item() == pytest.approx(loss)
    assert objective(x[[2, 0, 1]].unbind(0), index)["loss"].item() == pytest.approx(loss)
    other = objective((x + torch.randn_like(x)).unbind(0), index)["loss"].item()
    assert other != pytest.approx(loss)


def hadamard() -> Tensor:
    """Eight embeddings (8, 7): columns of mean 0, orthogonal, of variance 1."""
    h = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(3):
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h[:, 1:]


@pytest.mark.parametrize("method", NAMES)
def test_collapse_scores_worse_than_good_features(method: str) -> None:
    good = hadamard()
    index = torch.arange(8)
    objective = on_embeddings(method, width=7)
    if method in ("diet", "sdiet"):  # good where the head's rows match, with smoothing
        with torch.no_grad():
            objective.head.weight[:8] = 0.15 * good
    constant = torch.ones(8, 7, dtype=torch.float64)
    line = torch.linspace(-1, 1, 8, dtype=torch.float64)[:, None] * constant
    scores = [objective([z, z, z], index)["loss"].item() for z in (good, constant, line)]
    assert scores[0] < scores[1] - 1e-3 and scores[0] < scores[2] - 1e-3, scores


def barlow_formula(x: Tensor, lambd: float, pairing: str) -> Tensor:
    h = [(z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt() for z in x]
    n, total = len(h[0]), torch.zeros((), dtype=x.dtype)
    if pairing == "pairs":
        for a, b in combinations(h, 2):
            c = a.T @ b / n
            for i in range(len(c)):
                for j in range(len(c)):
                    total = total + ((c[i, i] - 1) ** 2 if i == j else lambd * c[i, j] ** 2)
        return total / 3
    m = sum(h) / 3
    for z in h:
        total = total + sum(((z * m).mean(0)[i] - 1) ** 2 for i in range(x.shape[2])) / 3
    c = m.T @ m / n
    return total + lambd * sum(c[i, j] ** 2 for i in range(len(c)) for j in range(len(c)) if i != j)


@pytest.mark.parametrize("pairing", ["pairs", "mean"])
def test_barlow_twins_is_its_formula(pairing: str) -> None:
    x, index = inputs()
    objective = on_embeddings("barlow", 3, lambd=0.3, pairing=pairing)
    found = objective(x.unbind(0), index)["loss"].item()
    assert found == pytest.approx(barlow_formula(x, 0.3, pairing).item(), rel=1e-9)


def vicreg_two(a: Tensor, b: Tensor) -> Tensor:
    """The official loss of two views with weights 3, 2, 5."""

    def variance(z: Tensor) -> Tensor:
        return F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean()

    def covariance(z: Tensor) -> Tensor:
        cov = torch.cov(z.T)
        return (cov - torch.diag(cov.diagonal())).square().sum() / len(cov)

    spread = (variance(a) + variance(b)) / 2
    return 3 * F.mse_loss(a, b) + 2 * spread + 5 * (covariance(a) + covariance(b))


@pytest.mark.parametrize("pairing", ["pairs", "mean"])
def test_vicreg_is_its_formula(pairing: str) -> None:
    x, index = inputs()
    weights = {"sim_coeff": 3.0, "std_coeff": 2.0, "cov_coeff": 5.0}
    found = on_embeddings("vicreg", 3, **weights, pairing=pairing)(x.unbind(0), index)["loss"]
    if pairing == "pairs":
        expected = sum(vicreg_two(a, b) for a, b in combinations(x, 2)) / 3
    else:  # each view and the mean of the other two
        expected = sum(vicreg_two(x[v], (x.sum(0) - x[v]) / 2) for v in range(3)) / 3
    assert found.item() == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize(
    ("method", "shape"),
    [("simclr", lambda c: c), ("simclr_abs", abs), ("simclr_sq", lambda c: c**2)],
)
def test_simclr_is_its_formula(method: str, shape: Callable[[float], float]) -> None:
    x, index = inputs()
    rows, t, total = x.reshape(12, 3), 0.15, 0.0
    for i in range(12):
        similarity = [
            shape(F.cosine_similarity(rows[i], rows[j], dim=0).item()) / t for j in range(12)
        ]
        others = math.log(sum(math.exp(similarity[j]) for j in range(12) if j != i))
        positive = [j for j in range(12) if j != i and j % 4 == i % 4]
        total += (others - sum(similarity[j] for j in positive) / len(positive)) / 12
    found = on_embeddings(method, 3)(x.unbind(0), index)["loss"].item()
    assert found == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize("method", ["vicreg_exp", "vicreg_ctr"])
def test_vicreg_exp_and_ctr_are_their_formulas(method: str) -> None:
    """Eq. 11 to 13 of arXiv:2206.02574 for two views."""
    x, index = inputs(views=2)
    t, spread = 0.15, 0.0
    for z in x if method == "vicreg_exp" else x.mT:  # columns: dimensions, or samples
        cov = torch.cov(z.T)
        hinge = [max(0.0, 1 - math.sqrt(cov[i, i] + 1e-4)) for i in range(len(cov))]
        spread += 25 * sum(hinge) / len(hinge) / 2
        for i in range(len(cov)):
            terms = [math.exp(cov[i, j] / t) for j in range(len(cov)) if j != i]
            spread += math.log(sum(terms)) / len(cov)
    found = on_embeddings(method, 3)(x.unbind(0), index)["loss"].item()
    assert found == pytest.approx(25 * F.mse_loss(x[0], x[1]).item() + spread, rel=1e-9)


def test_spectral_is_its_formula_and_the_spectral_contrastive_loss() -> None:
    x, index = inputs()
    c = torch.einsum("vni,vnj->ij", x, x) / 12
    distance = sum((a - b).square().sum(1).mean() for a, b in combinations(x, 2)) / 3
    eye = torch.eye(3, dtype=torch.float64)
    found = on_embeddings("spectral", 3, orthogonality=0.7)(x.unbind(0), index)["loss"].item()
    assert found == pytest.approx(float(distance + 0.7 * (c - eye).square().sum()), rel=1e-12)
    # arXiv:2106.04156: -2 E f(x)^T f(x+) + E (f(x)^T f(x'))^2 over all rows
    rows = x.reshape(12, 3)
    attract = sum((a * b).sum(1).mean() for a, b in combinations(x, 2)) / 3
    contrastive = -2 * attract + (rows @ rows.T).square().mean()
    found = on_embeddings("spectral", 3)(x.unbind(0), index)["loss"].item()
    assert found == pytest.approx(float(contrastive) + 3, rel=1e-12)


def test_emp_ssl_is_its_formula() -> None:
    """eq. 2, as the repository computes it: logdet of a D x D matrix for each patch."""
    x, index = inputs()
    z = x / x.norm(dim=2, keepdim=True)
    eye = torch.eye(3, dtype=torch.float64)
    rate = sum(torch.logdet(eye + 3 / (4 * 0.2) * v.T @ v) / 2 for v in z) / 3
    mean = z.mean(0)
    cosine = sum((v * mean).sum(1).div(v.norm(dim=1) * mean.norm(dim=1)).mean() for v in z) / 3
    out = on_embeddings("emp_ssl", 3)(x.unbind(0), index)
    assert out["loss"].item() == pytest.approx(float(-rate - 200 * cosine), rel=1e-9)


def test_emp_ssl_projects_all_patches_in_one_batch() -> None:
    """4096, 4096 and 1024 wide in the paper, here 16, 16 and 4; one batch norm over all patches."""
    objective = build("emp_ssl", projector_layers=3).train()
    widths = [m.out_features for m in objective.projector if isinstance(m, nn.Linear)]
    assert widths == [16, 16, 4]
    x, index = inputs()
    objective(x.unbind(0), index)
    hidden = objective.projector[0](x.reshape(12, 3))
    expected = 0.1 * hidden.mean(0)  # from 0, with momentum 0.1, of all 12 rows at once
    torch.testing.assert_close(objective.projector[1].running_mean, expected.detach())


def test_diet_is_its_formula() -> None:
    """logsumexp(z) - (1 - e) z_y - (e / M) sum_k z_k, each view a sample."""
    x, index = inputs()
    objective = build("diet")
    total = 0.0
    for view in x:
        for row, y in zip(view @ objective.head.weight.detach().T, index, strict=True):
            total += float(row.logsumexp(0) - 0.2 * row[y] - 0.8 / SAMPLES * row.sum()) / 12
    assert objective(x.unbind(0), index)["loss"].item() == pytest.approx(total, rel=1e-9)


def test_sdiet_is_its_formula() -> None:
    x, index = inputs()
    objective = on_embeddings("sdiet", 3)
    z = (x / x.norm(dim=2, keepdim=True)).reshape(12, 3) * math.sqrt(3)
    logits = z @ objective.head.weight[index].T
    expected = F.cross_entropy(logits, torch.arange(4).repeat(3), label_smoothing=0.8)
    found = objective(x.unbind(0), index)["loss"].item()
    assert found == pytest.approx(expected.item(), rel=1e-9)


def test_sdiet_applies_missed_steps_as_adamw_would() -> None:
    """40 steps of 3 of 10 rows: what dense AdamW gives where absent rows have gradient 0."""
    torch.manual_seed(0)
    head = BatchHead(10, 4, lr=0.02, weight_decay=0.3).double()
    dense = nn.Parameter(head.weight.clone())
    optimizer = torch.optim.AdamW([dense], lr=0.02, weight_decay=0.3)
    for _ in range(40):
        z, index = 100 * torch.randn(2, 3, 4, dtype=torch.float64), torch.randperm(10)[:3]
        head(z, index).backward()
        logits = z.flatten(0, 1) @ dense[index].T
        optimizer.zero_grad()
        F.cross_entropy(logits, torch.arange(3).repeat(2), label_smoothing=0.8).backward()
        optimizer.step()
    weight, _, _ = head.caught_up(torch.arange(10))
    assert not torch.allclose(weight, head.weight)  # some rows are behind until they are read
    # Adam adds its 1e-8 to every step's sqrt(v), we to that of the last gradient: 1e-5 of a rate
    torch.testing.assert_close(weight, dense.detach(), rtol=0, atol=1e-5 * 0.02)


def test_sdiet_does_not_update_its_rows_in_evaluation() -> None:
    objective, (x, index) = build("sdiet"), inputs()
    before = objective.head.weight.clone()
    x.requires_grad_()
    objective(x.unbind(0), index)["loss"].backward()
    assert torch.equal(before, objective.head.weight) and objective.head.step == 0
    objective.train()(x.unbind(0), index)["loss"].backward()
    changed = (before != objective.head.weight).any(1).nonzero().flatten()
    assert sorted(changed.tolist()) == sorted(index.tolist()) and objective.head.step == 1


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_fused_head_takes_the_steps_of_a_plain_one(optimizer: str) -> None:
    """Three steps at three rates; its weight is in no group of the optimizer."""
    ends = []
    for fused in (False, True):
        torch.manual_seed(0)
        config = configured(BASE, method="diet", fused_head=fused, optimizer=optimizer, lr=0.1)  # type: ignore[arg-type]
        objective = build_objective(config, features=3, num_samples=SAMPLES)
        optimizer_ = build_optimizer(config, [nn.Linear(1, 1), objective])
        optimized = [p for group in optimizer_.param_groups for p in group["params"]]
        assert any(p is objective.head.weight for p in optimized) != fused  # type: ignore[union-attr]
        for lr in (0.1, 0.05, 0.2):
            x, index = inputs()
            objective.set_lr(lr)
            for group in optimizer_.param_groups:
                group["lr"] = lr
            optimizer_.zero_grad()
            objective(x.float().unbind(0), index)["loss"].backward()
            optimizer_.step()
        ends.append(objective.head.weight.detach())  # type: ignore[union-attr]
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-5, atol=1e-6)


def test_tuned_weights_are_those_of_the_published_runs() -> None:
    """arXiv:2312.10725's configs; between them a power law, outside 1 / width."""
    found = {v: (default_lambd(256, v), default_lambd(8192, v)) for v in (2, 4, 8)}
    assert found == {2: (0.02, 0.0008), 4: (0.01, 0.0004), 8: (0.01, 0.0004)}
    sweep = [default_lambd(2**k, 2) for k in range(6, 14)]
    assert sweep == [0.04, 0.04, 0.02, 0.01, 0.002, 0.001, 0.0004, 0.0008]
    assert default_lambd(256, 3) == 0.02 and default_lambd(256, 16) == 0.01
    between = default_lambd(1448, 4) / math.sqrt(0.01 * 0.0004)  # 1448 = sqrt(256 * 8192)
    assert between == pytest.approx(1, rel=1e-3)
    assert default_lambd(16, 2) == pytest.approx(0.16) and default_lambd(64, 4) == pytest.approx(
        0.04
    )
    assert [25 / default_cov_coeff(d, 25.0) for d in (256, 8192)] == pytest.approx([25, 750])
    widths = [64, 300, 1000, 5000, 8192]
    weights = [default_cov_coeff(d, 25.0) for d in widths]
    assert weights == sorted(weights, reverse=True) and weights[0] == pytest.approx(4)


def test_weights_follow_width_and_views_unless_they_are_set() -> None:
    wide = {"projector_width": 256}
    assert build("barlow", **wide).lambd == 0.02  # three views take the table of two
    assert build("barlow", **wide, views=4).lambd == 0.01
    assert build("barlow", **wide, projector_out=512, views=2).lambd == 0.01
    assert build("barlow", **wide, lambd=0.5).lambd == 0.5
    assert build("vicreg", **wide).weights["cov_coeff"] == pytest.approx(1)
    assert build("vicreg", **wide, sim_coeff=50.0).weights["cov_coeff"] == pytest.approx(2)
    assert build("vicreg", **wide, cov_coeff=3.0).weights["cov_coeff"] == 3
    assert build("vicreg_exp").weights["cov_coeff"] == 1


class Poisoned:
    """Labels that raise on whatever is done with them."""

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(f"training touched a label: {name}")

    def __len__(self) -> int:
        raise AssertionError("training counted labels")

    def __getitem__(self, index: object) -> Any:
        raise AssertionError("training read a label")


@pytest.mark.parametrize("method", NAMES)
def test_no_method_can_reach_a_label(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of the real loop, where every access to a label of the data is poisoned."""
    images = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), dtype=np.uint8)
    poison = np.array([object()], dtype=object)  # numpy refuses to unpickle it
    np.savez(tmp_path / "data.npz", x_train=images, x_test=images, y_train=poison, y_test=poison)
    monkeypatch.setattr("fastssl.data.datasets.load_labels", Poisoned())
    monkeypatch.setattr("fastssl.data.splits.load_labels", Poisoned())
    changes: dict[str, Any] = {"views": 2, "batch_size": 8, "epochs": 1}
    if issubclass(METHODS[method].Knobs, ProjectorKnobs):
        changes |= SMALL
    config = configured(BASE, method=method, data=str(tmp_path / "data.npz"), **changes)
    loaded = load_array(config.data, "train", holdout=0.2)
    views = policies.digits(2, 8)
    pipeline = open_pipeline("resident", loaded, views=views, batch_size=8, seed=0, device="cpu")
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    backbone.num_features = 4  # type: ignore[assignment]
    before = backbone[1].weight.detach().clone()
    objective = build_objective(config, features=4, num_samples=16)
    train(config, pipeline, backbone, objective, tmp_path, lambda line: None)
    assert not torch.equal(before, backbone[1].weight)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"method": "simclr", "views": 1}, "--views is 1: simclr compares views"),
        ({"method": "emp_ssl", "views": 201}, "--views is 201: emp_ssl takes at most 200"),
        ({"method": "barlow", "views": 17}, "--views is 17: barlow takes at most 16"),
        ({"batch_size": 1}, "--batch-size is 1: batch statistics and every loss need at least 2"),
        ({"projector_width": 8}, "--projector-width is 8: it must lie between 16 and 16384"),
        ({"projector_out": 20000}, "--projector-out is 20000: it must lie between"),
        ({"lambd": -0.1}, "--lambd is -0.1: it must be 0 or more"),
        ({"method": "vicreg", "cov_coeff": math.nan}, "--cov-coeff is nan: it must be 0 or more"),
        ({"method": "simclr", "temperature": 0.0}, "--temperature is 0.0: it must be positive"),
        ({"method": "emp_ssl", "eps_sq": -1.0}, "--eps-sq is -1.0: it must be positive"),
        ({"method": "diet", "sample_rate": 0.5}, "only with --fused-head"),
        ({"method": "diet", "sample_rate": 0.0}, r"--sample-rate is 0.0: it must lie in \(0, 1\]"),
        ({"method": "vicreg", "fused_head": True}, "vicreg has no knob fused_head"),
        ({"method": "diet", "fused_head": True, "optimizer": "lars"}, "lars cannot be used"),
        ({"nesterov": True, "momentum": 0.0}, "--nesterov needs --momentum above 0"),
        ({"lars_eta": 0.0}, "--lars-eta is 0.0: it must be positive"),
        ({"momentum": 1.0}, r"--momentum is 1.0: it must lie in \[0, 1\)"),
        ({"train_images": -1}, "--train-images is -1"),
        ({"method": "diet", "oracle": "labels"}, "diet has no knob oracle"),
        ({"method": "simsiam"}, "unknown --method 'simsiam'; there are barlow, diet"),
        ({"oracle": "labels", "oracle_share": 0.0}, "--oracle-share is 0.0"),
        ({"oracle": "queries", "oracle_queries": 0}, "--oracle-queries is 0"),
    ],
)
def test_knobs_out_of_range_are_named(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configured(Config(), **knobs)


def test_knobs_of_another_method_are_refused() -> None:
    config = Config(method="vicreg", objective=METHODS["barlow"].Knobs())
    with pytest.raises(ValueError, match="the knobs are BarlowTwinsKnobs, --method vicreg has"):
        build_objective(config, features=4, num_samples=9)


def test_a_method_is_its_class_and_its_knobs() -> None:
    """What the commands print and derive flags from; Config knows no knob of a method."""
    common = knob_names(Config)
    for name, method in METHODS.items():
        assert "arXiv:" in method.paper or "TMLR" in method.paper, name
        assert method.formula and "\n" not in method.formula
        knobs = knob_names(method.Knobs)
        assert knobs and not knobs & common and set(method.anti_collapse) <= knobs
    assert PAL.paper and PAL.formula


def test_a_new_method_is_a_class_and_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that the repository does not have trains, is configured and listed by name."""

    @dataclass(frozen=True)
    class CustomKnobs(ProjectorKnobs):
        """Of the test's method."""

        attraction: float = 2.0
        """Weight of the distance."""

    class Custom(ProjectedObjective):
        paper, formula, Knobs = "none, arXiv:0000.00000", "attraction |z_a - z_b|^2", CustomKnobs

        def __init__(self, features: int, knobs: CustomKnobs):
            super().__init__(features, knobs)
            self.attraction = knobs.attraction

        def loss(self, embeddings: Sequence[Tensor]) -> Tensor:
            return self.attraction * (embeddings[0] - embeddings[1]).square().mean()

    monkeypatch.setitem(METHODS, "custom", Custom)
    config = configured(Config(), method="custom", attraction=3.0, projector_width=16)
    objective = build_objective(config, features=4, num_samples=9)
    x = torch.randn(2, 5, 4)
    loss = objective(list(x), torch.arange(5))["loss"]
    a, b = (objective.projector(view) for view in x)  # type: ignore[operator]
    torch.testing.assert_close(loss, 3 * (a - b).square().mean())
    parsed = parse_config("digits-barlow", ["--method", "custom", "--attraction", "0.5"])
    assert parsed.objective == CustomKnobs(projector_width=256, projector_layers=2, attraction=0.5)
