"""The rules of the layout, read from the sources: who may import whom, and that importing does
nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STANDARD = set(sys.stdlib_module_names) | {"__future__"}
ALLOWED = {
    "kernels/fastssl_kernels": {"fastssl_kernels", "torch", "triton"},
    "pipelines/fastssl_pipelines": {
        "fastssl_pipelines",
        "torch",
        "triton",
        "numpy",
        "numba",
        "llvmlite",
        "PIL",
        "nvidia",
        "ffcv",
    },
    "fastssl": {
        *(
            "fastssl",
            "fastssl_kernels",
            "fastssl_pipelines",
            "torch",
            "numpy",
            "timm",
            "torchvision",
        ),
        *("safetensors", "sklearn", "tyro", "rich", "matplotlib", "PIL", "huggingface_hub"),
    },
}
# The layers of fastssl: a file or folder imports from those earlier in this list alone.
LAYERS = (
    {"config"},
    {"backbones", "device", "distributed", "optim", "schedule"},
    {"objectives", "weights"},
    {"data", "recipes", "runtime", "step"},
    {"evaluation"},
    {"train"},
    {"dry_run", "pretrain"},
    {"cli"},
    {"__init__", "__main__"},
)
ONLY_IN = {
    "nvidia": {"engines/dali.py", "engines/dali_operators.py"},
    "ffcv": {"sources/beton.py", "sources/convert.py"},
    "numba": {f"cpu/{name}.py" for name in ("kernels", "numba_ops", "intrinsics")},
    "llvmlite": {"cpu/intrinsics.py"},
}  # of the packages, not of the bench
TRITON_FOLDERS = ("kernels/fastssl_kernels/_triton", "pipelines/fastssl_pipelines/augment/cuda")
SOURCES = [(folder, path) for folder in ALLOWED for path in sorted((ROOT / folder).rglob("*.py"))]


def imported(path: Path, *, top_level_only: bool = False) -> set[str]:
    """First names of the absolute imports of a source file."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize(
    ("folder", "path"), SOURCES, ids=lambda value: getattr(value, "name", None)
)
def test_arrows(folder: str, path: Path) -> None:
    strangers = imported(path) - STANDARD - ALLOWED[folder]
    assert not strangers, f"{path.relative_to(ROOT)} imports {strangers}"
    for library, files in ONLY_IN.items():
        assert library not in imported(path) or "/".join(path.parts[-2:]) in files, (
            f"{library} belongs in {files} alone"
        )


def layer_imports(path: Path, root: Path) -> set[tuple[str, str]]:
    """(importer, imported) of the files and folders of fastssl that a source file imports."""
    importer = path.relative_to(root).parts[0].removesuffix(".py")
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            of_root = node.module == root.name
            names += [f"{node.module}.{a.name}" for a in node.names] if of_root else [node.module]
    found = {name.split(".")[1] for name in names if name.startswith(f"{root.name}.")}
    return {(importer, name) for name in found - {importer}}


def upward(edges: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The imports that do not go to a lower layer."""
    layer = {name: k for k, names in enumerate(LAYERS) for name in names}
    return {(a, b) for a, b in edges if layer[b] >= layer[a]}


def test_imports_of_fastssl_go_down_the_layers() -> None:
    root = ROOT / "fastssl"
    present = {path.name.removesuffix(".py") for path in root.iterdir() if path.name[0] not in "_."}
    assert present - {"py.typed"} | {"__init__", "__main__"} == set().union(*LAYERS)
    edges = set().union(*(layer_imports(path, root) for path in root.rglob("*.py")))
    assert not upward(edges) and len(edges) > 30


def test_the_layers_see_an_import_that_goes_up(tmp_path: Path) -> None:
    root = tmp_path / "fastssl"
    (root / "data").mkdir(parents=True)
    (root / "data" / "bad.py").write_text(
        "from fastssl import config\ndef f():\n    from fastssl.train import train\n"
    )
    edges = layer_imports(root / "data" / "bad.py", root)
    assert edges == {("data", "config"), ("data", "train")}
    assert upward(edges) == {("data", "train")}


def test_few_files_lie_beside_the_folders() -> None:
    assert len(list((ROOT / "fastssl").glob("*.py"))) <= 14


def test_triton_is_imported_in_its_folders_alone() -> None:
    importers = {path.parent for _, path in SOURCES if "triton" in imported(path)}
    assert importers == {ROOT / folder for folder in TRITON_FOLDERS}


def test_the_rule_sees_a_stranger(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    import fastssl.train\n    from lightly import loss\n")
    assert imported(bad) - ALLOWED["kernels/fastssl_kernels"] == {"fastssl", "lightly"}


def run_python(code: str) -> str:
    path = ":".join(str(ROOT / part) for part in (".", "kernels", "pipelines"))
    command = [sys.executable, "-c", code]
    env = {"PYTHONPATH": path, "PATH": "/usr/bin:/bin", "HOME": "/tmp"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd="/")
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


def test_kernels_import_with_torch_and_triton_alone() -> None:
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"fastssl", "fastssl_pipelines", "timm", "lightly", "sklearn"}:
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import fastssl_kernels, torch
print(torch.cuda.is_initialized(), fastssl_kernels.barlow_twins_loss.__name__)
"""
    assert run_python(code).split() == ["False", "barlow_twins_loss"]


def test_bench_and_pipelines_import_without_tyro_and_numba() -> None:
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"tyro", "numba", "nvidia", "ffcv", "lightly", "sklearn"}:
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import bench.__main__, fastssl_pipelines
from bench.suites import accuracy, covariance_losses, views
print([name for name in ("matplotlib.pyplot", "rich") if name in sys.modules])
"""
    run_python(code)


def test_nothing_happens_at_import() -> None:
    code = "import torch, fastssl.pretrain, fastssl.recipes; print(torch.cuda.is_initialized())"
    assert run_python(code).split() == ["False"]


def test_the_command_line_starts_without_torch() -> None:
    """Help and the list of recipes need neither torch nor matplotlib nor numba."""
    code = """
import sys
from fastssl.cli import run
assert run(["--help"]) == 0 and run(["recipes"]) == 0
print("heavy:", [name for name in ("torch", "matplotlib", "numba", "tyro") if name in sys.modules])
"""
    assert run_python(code).rstrip().endswith("heavy: []")


def test_no_clock_that_can_jump_is_read() -> None:
    """Times are differences of monotonic clocks; the wall clock may be set while a run goes on."""
    for package in ("fastssl", "kernels/fastssl_kernels", "pipelines/fastssl_pipelines"):
        for path in (ROOT / package).rglob("*.py"):
            text = path.read_text()
            assert "time.time(" not in text and "datetime.now" not in text, path
