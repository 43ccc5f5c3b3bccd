"""Who may import whom, read from the source with `ast` (function bodies too)."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ("train", "evaluate")
KERNELS = ("argmax", "cross_entropy", "depthwise", "layer_norm", "upsample_sum")

# a module may import modules of lower levels; within a level only what is named beside it
LEVELS = (
    {"launch", "secrets"},
    {"errors"},
    {"pixels", "labels", "files", "outputs", "bilinear"},
    {"kernels.cells"},
    {f"kernels.{name}" for name in KERNELS},
    {"kernels"},
    {"config", "metrics", "optim", "losses", "cityscapes"},
    {"bootstrap", "boundary"},
    {"namings"},
    {"checkpoints"},
    {"base"},
    {"model"},
    {"networks"},
    {"inference", "inputs", "processor", "visualize", "data", "counts", "page"},
    {"data.samples", "data.archives", "data.sampler", "data.transforms"},
    {"data.toy", "data.pairs", "data.coco", "data.hub", "data.cache", "corruptions", "submit"},
    {"data.sources", "data.dataset"},
    {"data.statistics"},
    {"data.loaders"},
    {"data.datamodule", "data.classification", "data.contract"},
    {"data.findings"},
    {"data.check"},
    {"provenance", "curves"},
    {"task", "states", "report", "predict", "compare"},
    {"classification", "resume", "memory", "stops", "evaluation"},
    {"callbacks", "loggers", "__main__", ""},
    {"kinds"},
    set(SCRIPTS),
)
WITHIN = {
    "labels": {"pixels"},  # a mask file is opened as an image file is
    "processor": {"inputs"},
}
# "one dependency, one room"
ROOMS = {
    "hydra": {"train", "evaluate", "__main__"},
    "omegaconf": {"train", "evaluate", "__main__"},
    "lightning": {
        *("task", "states", "stops", "memory", "resume", "callbacks", "loggers", "kinds", "evaluation"),
        *("data.datamodule", "data.loaders", *SCRIPTS),
    },
    "torchmetrics": {"task", "classification"},
    "albumentations": {"data.transforms"},
    "torchvision": {"data.classification"},
    "datasets": {"data.hub"},
    "pycocotools": {"data.coco"},
    "tifffile": {"pixels"},
    "jinja2": {"data.check", "page"},
    "wandb": set(),
    "tensorboard": set(),
    "mlflow": set(),
    "matplotlib": {"curves"},
    "huggingface_hub": {"files"},
    "h5py": {"checkpoints"},
    "imagecorruptions": {"corruptions"},
    "safetensors": {"checkpoints"},
    "transformers": set(),
    "triton": {f"kernels.{name}" for name in ("cells", *KERNELS)},
}


def files() -> dict[str, Path]:
    found = {script: ROOT / f"{script}.py" for script in SCRIPTS}
    for path in sorted((ROOT / "segformer").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT / "segformer").with_suffix("").parts)
        found[name.removesuffix(".__init__").removesuffix("__init__")] = path
    return found


FILES = files()


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, dotted name) of every import; `from a import b` gives a.b where that is a module of ours, else a."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: absolute imports only"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                ours = inner.removeprefix("segformer.") in FILES and inner.startswith("segformer.")
                found.append((node.lineno, inner if ours else str(node.module)))
    return found


def level(name: str) -> int:
    for index, modules in enumerate(LEVELS):
        if name in modules:
            return index
    raise AssertionError(f"{name}: this module has no level in tests/test_architecture.py")


@pytest.mark.parametrize("name", FILES)
def test_imports_point_down_the_levels(name: str) -> None:
    for line, dotted in imports(FILES[name]):
        if dotted.partition(".")[0] != "segformer":
            continue
        target = dotted.removeprefix("segformer").lstrip(".")
        assert target, f"{FILES[name].name}:{line}: import from the module that owns the name, not from the package"
        allowed = level(target) < level(name) or target in WITHIN.get(name, ())
        assert allowed, f"{FILES[name].name}:{line}: {name} may not import {target}"


@pytest.mark.parametrize("name", FILES)
def test_each_dependency_stays_in_its_rooms(name: str) -> None:
    for line, target in imports(FILES[name]):
        package = target.partition(".")[0]
        if package in ROOMS:
            assert name in ROOMS[package], f"{FILES[name].name}:{line}: {package} belongs in {sorted(ROOMS[package])}"


def test_there_is_no_cycle_and_no_room_without_a_file() -> None:
    graph = {
        name: {target.removeprefix("segformer.") for _, target in imports(path) if target.startswith("segformer.")}
        for name, path in FILES.items()
    }
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises on a cycle
    assert {module for modules in LEVELS for module in modules} == set(FILES)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_stay_a_page(script: str) -> None:
    assert len(FILES[script].read_text().splitlines()) <= 60


@pytest.mark.parametrize("name", FILES)
def test_no_room_grows_two_nouns(name: str) -> None:
    assert len(FILES[name].read_text().splitlines()) <= 500


def test_importing_the_package_costs_nothing() -> None:
    import subprocess
    import sys

    code = "import segformer, sys; print(sorted({'torch', 'numpy'} & set(sys.modules)), segformer.VARIANTS['b0'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.startswith("[] {'depths': [2, 2, 2, 2]")


def test_every_public_name_is_where_the_package_says() -> None:
    import segformer

    assert all(getattr(segformer, name) is not None for name in segformer.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        segformer.nothing  # noqa: B018
