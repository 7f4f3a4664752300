"""The tables and the plots in kernels/README.md are the measured ones."""

from pathlib import Path

from bench.report import ratio_table, read_results

ROOT = Path(__file__).parents[2]


def test_the_readme_s_tables_are_the_measured_ones() -> None:
    _, rows = read_results(ROOT / "bench" / "results" / "cpu-2-cores" / "losses.jsonl")
    readme = (ROOT / "kernels" / "README.md").read_text()
    covariance = [row for row in rows if row["case"].startswith(("barlow", "vicreg", "coding"))]
    softmax = [row for row in rows if row not in covariance]
    for part in (covariance, softmax):
        table = ratio_table(part)
        assert table.count("\n") > 6 and table in readme
    for plot in ("barlow-against-d", "diet-against-k"):
        path = f"bench/results/cpu-2-cores/{plot}.png"
        assert f"](../{path})" in readme and (ROOT / path).exists()
