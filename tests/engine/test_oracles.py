"""Oracles: their graphs, the labels they read, the pairs they query, and contradictions."""

import json
from typing import Any

import pytest
import torch

from fastssl.config import Config
from fastssl.objectives import configured
from fastssl.objectives.oracles import LabelOracle, Oracle, QueryOracle, build_oracle


class Guarded:
    """Labels of which only some may be read."""

    def __init__(self, labels: list[int], allowed: set[int]):
        self._labels, self._allowed = labels, allowed

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> int:
        assert index in self._allowed, f"label {index} was read"
        return self._labels[index]


def test_without_knowledge_every_image_is_alike_only_to_itself() -> None:
    index = torch.tensor([3, 0, 2])
    torch.testing.assert_close(Oracle(5).block(index), torch.eye(3))
    assert Oracle(5).log() == {"oracle": "Oracle", "groups": 0, "in_groups": 0}


def test_all_labels_give_the_graph_of_classes() -> None:
    labels = torch.tensor([2, 0, 2, 1, 0, 2])
    oracle = LabelOracle(labels)
    index = torch.tensor([5, 1, 3, 0])
    expected = (labels[index][:, None] == labels[index]).float()
    torch.testing.assert_close(oracle.block(index), expected)
    assert oracle.log() == {
        "oracle": "LabelOracle",
        "groups": 2,
        "in_groups": 5,
        "labels_asked": 6,
        "images": [0, 1, 2, 3, 4, 5],
    }


def test_a_share_of_the_labels_reads_no_other() -> None:
    labels = [i % 5 for i in range(200)]
    asked = LabelOracle(labels, share=0.1, seed=3).asked
    assert len(asked) == 20 and asked == LabelOracle(labels, share=0.1, seed=3).asked
    assert asked != LabelOracle(labels, share=0.1, seed=4).asked
    oracle = LabelOracle(Guarded(labels, set(asked)), share=0.1, seed=3)
    known = set(asked)
    block = oracle.block(torch.arange(200))
    for i in range(200):
        for j in range(i + 1, 200):
            alike = i in known and j in known and labels[i] == labels[j]
            assert bool(block[i, j]) == alike


def open_oracle(count: int = 8, queries: int = 20) -> QueryOracle:
    def refuse(i: int, j: int) -> bool:
        raise AssertionError("a query without need")

    return QueryOracle(count, refuse, queries)


def test_answers_imply_others() -> None:
    oracle = open_oracle()
    assert oracle.known(4, 4) is True and oracle.known(1, 2) is None
    for i, j, alike in [(5, 1, True), (2, 1, True), (6, 7, True), (2, 6, False)]:
        oracle.record(i, j, alike)
    assert oracle.known(5, 2) is True
    assert oracle.known(7, 5) is False and oracle.known(5, 7) is False
    assert oracle.known(0, 5) is None
    oracle.record(0, 7, True)
    assert oracle.known(0, 1) is False
    alike = {(a, b) for a, b in oracle.block(torch.arange(8)).nonzero().tolist() if a < b}
    assert alike == {(1, 2), (1, 5), (2, 5), (0, 6), (0, 7), (6, 7)}


@pytest.mark.parametrize(
    ("earlier", "last", "message"),
    [
        ([(0, 1, True), (1, 2, True)], (0, 2, False), "images 0 and 2 are not alike, but from"),
        ([(0, 1, True), (1, 2, False)], (2, 0, True), "images 2 and 0 are alike, but from"),
        ([(0, 1, False)], (1, 0, True), "from its earlier answers they are not alike"),
        ([], (3, 3, False), "images 3 and 3 are not alike"),
    ],
)
def test_an_oracle_that_contradicts_itself_is_one_clear_error(
    earlier: list[tuple[int, int, bool]], last: tuple[int, int, bool], message: str
) -> None:
    oracle = open_oracle()
    for answer in earlier:
        oracle.record(*answer)
    with pytest.raises(ValueError, match=message) as raised:
        oracle.record(*last)
    assert "contradicts itself" in str(raised.value) and "\n" not in str(raised.value)
    assert int(oracle.asked) == len(earlier)  # a refused answer leaves no trace


def query_oracle(queries: int, seed: int = 0) -> tuple[QueryOracle, list[int], torch.Tensor]:
    """An oracle over 300 images of 6 classes, with noisy embeddings around those of the classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(6, (300,), generator=generator).tolist()
    noise = torch.randn(300, 8, generator=generator)
    embeddings = 2 * torch.eye(8)[labels] + 0.7 * noise
    oracle = QueryOracle(300, lambda i, j: labels[i] == labels[j], queries, per_batch=5)
    return oracle, labels, embeddings


def test_queries_have_the_highest_gain() -> None:
    """Sixty batches of 5 queries: no pair whose answer follows, many more yes than by chance, and
    far more pairs known than asked."""
    oracle, labels, embeddings = query_oracle(300)
    generator = torch.Generator().manual_seed(1)
    open_before = []
    record = oracle.record

    def checked(i: int, j: int, alike: bool) -> None:
        open_before.append(oracle.known(i, j))
        record(i, j, alike)

    oracle.record = checked  # type: ignore[method-assign]
    for _ in range(60):
        index = torch.randperm(300, generator=generator)[:64]
        oracle.ask(index, embeddings[index])
    assert open_before == [None] * 300
    log = oracle.log()
    assert log["queries"] == 300 and log["yes"] > 2 * 300 / 6  # a sixth are alike by chance
    block = oracle.block(torch.arange(300))
    truth = (torch.tensor(labels)[:, None] == torch.tensor(labels)).float()
    assert bool((block <= truth).all())
    assert (block.sum() - 300) / 2 > 10 * log["yes"]


def test_no_query_exceeds_the_budget() -> None:
    oracle, _, embeddings = query_oracle(12)
    index = torch.arange(64)
    for asked in (5, 10, 12, 12):
        oracle.ask(index, embeddings[index])
        assert int(oracle.asked) == asked
    with pytest.raises(ValueError, match="all 12 queries are spent; raise --oracle-queries"):
        oracle.record(0, 1, True)


def test_a_batch_without_open_pairs_has_no_query() -> None:
    oracle = open_oracle(3)
    for answer in [(0, 1, True), (1, 2, False)]:
        oracle.record(*answer)
    oracle.ask(torch.arange(3), torch.randn(3, 4))
    assert int(oracle.asked) == 2


def test_its_state_restores_what_it_knows_and_its_log_is_json() -> None:
    oracle, _, embeddings = query_oracle(20)
    for start in (0, 64):
        index = torch.arange(start, start + 64)
        oracle.ask(index, embeddings[index])
    other, _, _ = query_oracle(20)
    other.load_state_dict(oracle.state_dict())
    assert other.log() == oracle.log() == json.loads(json.dumps(oracle.log()))
    assert torch.equal(other.block(torch.arange(300)), oracle.block(torch.arange(300)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LabelOracle([0, 1], share=0.0), r"share is 0.0; it must lie in \(0, 1\]"),
        (lambda: QueryOracle(4, lambda i, j: True, 0), "got 0 queries, 8 per batch"),
        (lambda: open_oracle(4).record(0, 4, True), r"the pair \(0, 4\) lies outside the 4 images"),
    ],
)
def test_bad_input_is_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_config_names_the_oracle() -> None:
    labels = [i % 3 for i in range(64)]
    small = Config(batch_size=16, epochs=4)
    config = configured(small, method="simclr", oracle="labels", oracle_share=0.25)
    assert len(build_oracle(config, labels).log()["images"]) == 16
    queries = configured(small, method="vicreg", oracle="queries", oracle_queries=41)
    oracle = build_oracle(queries, labels)
    assert isinstance(oracle, QueryOracle)
    assert oracle.per_batch == 6  # 16 batches, spent in the first half
    assert oracle.answer(0, 3) is True and oracle.answer(0, 1) is False
    with pytest.raises(ValueError, match="--oracle labels needs labels to answer from"):
        build_oracle(config, None)
    with pytest.raises(ValueError, match="there is no oracle to build"):
        build_oracle(configured(small), labels)
