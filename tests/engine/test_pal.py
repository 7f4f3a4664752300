"""PAL's losses on a graph against their formulas, and against the methods they generalise.

Shapes: N batch, D embedding, V views, n = V N rows.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastssl.config import Config
from fastssl.knobs import OracleKnobs
from fastssl.objectives import METHODS, build_objective, configured
from fastssl.objectives.base import GraphObjective
from fastssl.objectives.oracles import LabelOracle, Oracle, build_oracle
from fastssl.objectives.pal import PAL, neighbours
from fastssl.train import train
from fastssl_kernels import nt_xent_loss, vicreg_loss
from fastssl_pipelines import open_pipeline, policies

SIZES = {"features": 4, "num_samples": 9}
ORACLE_METHODS = [n for n, method in METHODS.items() if issubclass(method.Knobs, OracleKnobs)]
GRAPH = torch.tensor([[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 1.0]])


def embeddings(views: int = 2, n: int = 3, d: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(views, n, d, generator=generator, dtype=torch.float64))


def graph_loss(method: str, z: list[Tensor], p: Tensor, **knobs: float) -> Tensor:
    """The method's loss of embeddings on a graph."""
    objective = build_objective(configured(Config(), method=method, **knobs), **SIZES)
    assert isinstance(objective, GraphObjective)
    return objective.graph_loss(z, p)


def test_neighbours_by_hand() -> None:
    p = neighbours(GRAPH, 2)  # rows: views of image 0, 1, 2, then again
    third, half = 1 / 4, 0.5 / 2
    expected = [
        [0, half / 1, 0, 0.5, half / 1, 0],  # the other view weighs 1, image 1's two 0.5 each
        [third, 0, 0, third, 0.5, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    torch.testing.assert_close(p[:3], torch.tensor(expected, dtype=torch.float32))
    torch.testing.assert_close(p.sum(1), torch.ones(6))
    with pytest.raises(ValueError, match="got 1 views; it takes at least 2"):
        neighbours(GRAPH, 1)


def test_simclr_on_a_graph_is_its_formula() -> None:
    """- sum_j P_ij log softmax_j(z_i . z_j / t), averaged over i."""
    z, p = embeddings(), neighbours(GRAPH, 2)
    rows = F.normalize(torch.cat(z), dim=1)
    total = 0.0
    for i in range(6):
        e = {j: math.exp(float(rows[i] @ rows[j]) / 0.3) for j in range(6) if j != i}
        total -= sum(float(p[i, j]) * math.log(e[j] / sum(e.values())) for j in e) / 6
    assert graph_loss("simclr", z, p, temperature=0.3).item() == pytest.approx(total, rel=1e-6)


def test_vicreg_on_a_graph_is_its_formula() -> None:
    z, p = embeddings(), neighbours(GRAPH, 2)
    rows, invariance = torch.cat(z), 0.0
    for i in range(6):
        for j in range(6):
            invariance += float(p[i, j] * (rows[i] - rows[j]).square().sum()) / (6 * 4)
    spread = vicreg_loss(z, sim_coeff=0.0, std_coeff=2.0, cov_coeff=5.0).item()
    found = graph_loss("vicreg", z, p, sim_coeff=3.0, std_coeff=2.0, cov_coeff=5.0).item()
    assert found == pytest.approx(3 * invariance + spread, rel=1e-6)


def test_spectral_on_a_graph_factors_it() -> None:
    """|Z Z^T / n - P|^2, up to the constant D - |P|^2, for a symmetric P."""
    z, p = embeddings(), neighbours(GRAPH, 2).double()
    rows = torch.cat(z)
    square = (rows @ rows.T / 6 - p).square().sum() - p.square().sum() + 4
    found = graph_loss("spectral", z, p, orthogonality=1.0).item()
    assert found == pytest.approx(square.item(), rel=1e-12)


def test_barlow_twins_on_a_graph_is_its_formula() -> None:
    z, p = embeddings(), neighbours(GRAPH, 2).double()
    h = torch.cat([(v - v.mean(0)) / (v.var(0, unbiased=False) + 1e-5).sqrt() for v in z])
    c = sum(p[i, j] * torch.outer(h[i], h[j]) for i in range(6) for j in range(6)) / 6
    off = c - torch.diag(c.diagonal())  # type: ignore[union-attr]
    expected = (c.diagonal() - 1).square().sum() + 0.2 * off.square().sum()  # type: ignore[union-attr]
    assert graph_loss("barlow", z, p, lambd=0.2).item() == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("method", ["simclr", "vicreg", "spectral"])
@pytest.mark.parametrize("views", [2, 4])
def test_without_knowledge_it_is_the_method_itself(method: str, views: int) -> None:
    plain, graph = (build(method, oracle, views) for oracle in (None, Oracle(9)))
    graph.projector = plain.projector
    x, index = embeddings(views, 5, 6), torch.tensor([3, 0, 8, 4, 1])
    found, expected = graph(x, index), plain(x, index)["loss"]
    assert found["loss"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert found["known_pairs"] == 0


def build(method: str, oracle: Oracle | None, views: int = 2, **knobs: Any) -> Any:
    small = {"projector_width": 16, "projector_layers": 2, "views": views}
    name = "labels" if oracle else "none"
    config = configured(Config(), method=method, oracle=name, **small, **knobs)
    count = oracle.num_samples if oracle else 9
    return build_objective(config, features=6, num_samples=count, oracle=oracle).double()


def test_all_labels_make_simclr_the_supervised_contrastive_loss() -> None:
    """arXiv:2004.11362, eq. 2: the mean over positives outside the logarithm."""
    labels = [0, 1, 0, 1, 1]
    z, index = embeddings(n=5), torch.tensor([4, 0, 3, 2, 1])
    p = neighbours(LabelOracle(labels).block(index), 2)
    rows, total = F.normalize(torch.cat(z), dim=1), 0.0
    classes = [labels[i] for i in index] * 2
    for i in range(10):
        others = [j for j in range(10) if j != i]
        scale = sum(math.exp(float(rows[i] @ rows[j]) / 0.5) for j in others)
        alike = [j for j in others if classes[j] == classes[i]]
        terms = [float(rows[i] @ rows[j]) / 0.5 - math.log(scale) for j in alike]
        total -= sum(terms) / len(alike) / 10
    assert graph_loss("simclr", z, p, temperature=0.5).item() == pytest.approx(total, rel=1e-6)
    assert total != pytest.approx(nt_xent_loss(z, temperature=0.5).item(), rel=1e-2)


@pytest.mark.parametrize("method", ORACLE_METHODS)
def test_the_graph_of_the_classes_favours_embeddings_of_the_classes(method: str) -> None:
    """Eight images of four classes: knowing the classes lowers the loss of one direction a class by
    more than that of one direction an image."""
    labels = [0, 0, 1, 1, 2, 2, 3, 3]
    by_class = torch.eye(4, dtype=torch.float64)[labels].repeat(1, 2)[:, :7]
    by_image = torch.eye(8, dtype=torch.float64)[:, :7]
    scores = {}
    for name, oracle in (("none", Oracle(8)), ("all", LabelOracle(labels))):
        weight = {"lambd": 0.01} if method == "barlow" else {}
        objective = build(method, oracle, **weight)
        objective.projector = nn.Identity()
        z = [4 * (e - e.mean(0)) for e in (by_class, by_image)]
        scores[name] = [objective([e, e], torch.arange(8))["loss"].item() for e in z]
    gain = [scores["none"][k] - scores["all"][k] for k in (0, 1)]
    assert gain[0] > gain[1] + 1e-3, scores
    if method == "simclr":  # it alone has no term that asks for more dimensions than classes
        assert scores["all"][0] < scores["all"][1], scores


def test_a_weighted_graph_serves_any_loss() -> None:
    block = torch.eye(5)
    block[0, 1] = block[1, 0] = 0.5
    block[0, 2] = block[2, 0] = 2.0

    class Weighted(Oracle):
        def block(self, index: Tensor) -> Tensor:
            return block.clone()

    objective = build("simclr", Weighted(9))
    x, index = embeddings(2, 5, 6), torch.tensor([1, 0, 2, 5, 7])
    out = objective(x, index)
    assert out["known_pairs"] == 2
    z = [objective.projector(f) for f in x]
    expected = graph_loss("simclr", z, neighbours(block, 2), temperature=0.15)
    assert out["loss"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_run_with_queries_spends_them_and_saves_the_answers(tmp_path: Path) -> None:
    """The real loop: the oracle queries in the first half, and the checkpoint has its answers."""
    images = np.random.default_rng(0).integers(0, 256, (32, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(32) % 3
    config = configured(
        Config(batch_size=8, epochs=4),
        method="simclr",
        projector_width=16,
        projector_layers=2,
        oracle="queries",
        oracle_queries=30,
    )
    oracle = build_oracle(config, labels)
    objective = build_objective(config, features=4, num_samples=32, oracle=oracle)
    views = policies.digits(2, 8)
    pipeline = open_pipeline("resident", images, views=views, batch_size=8, seed=0, device="cpu")
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    backbone.num_features = 4  # type: ignore[assignment]
    train(config, pipeline, backbone, objective, tmp_path, lambda line: None)
    log = oracle.log()
    assert log["queries"] == 30 and 0 < log["yes"] < 30
    assert all((labels[i] == labels[j]) == alike for i, j, alike in log["pairs"])
    again = build_objective(config, features=4, num_samples=32, oracle=build_oracle(config, labels))
    again.load_state_dict(objective.state_dict())
    assert isinstance(again, PAL) and again.oracle.log() == log
    assert not any(value is labels for value in vars(oracle).values())
    assert {name for name, _ in oracle.named_buffers()} == {"group", "answers", "asked"}


def test_an_oracle_is_given_exactly_where_the_config_names_one() -> None:
    config = configured(Config(), method="simclr", oracle="labels")
    with pytest.raises(ValueError, match="--oracle is labels, but none is given"):
        build_objective(config, features=4, num_samples=9)
    with pytest.raises(ValueError, match="--oracle is none, but one is given"):
        build_objective(
            configured(config, oracle="none"), features=4, num_samples=9, oracle=Oracle(9)
        )
    with pytest.raises(ValueError, match="the oracle covers 8 images, the data set has 9"):
        build_objective(config, features=4, num_samples=9, oracle=Oracle(8))
