"""benchmarks/gpu.py runs from end to end without a GPU, with what can run there; what it times is for a GPU."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from segformer.config import VARIANTS
from tests.conftest import ROOT

pytest.importorskip("transformers", reason="the base of the comparison is transformers' network")

SMALL = ["--device", "cpu", "--models", "b0", "--sizes", "64", "--batch", "1", "--inference-batches", "1", "2"]
SMALL += ["--rounds", "1", "--no-compile", "--tiny"]
KERNELS = {
    "upsample_cross_entropy",
    "upsample_argmax",
    "depthwise_gelu",
    "upsample_sum",
    "layer_norm",
    "add_layer_norm",
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module; `--tiny` puts a tiny network in the place of a published one."""
    monkeypatch.setitem(VARIANTS, "b0", VARIANTS["b0"])
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu
    import gpu_bench

    gpu_bench.networks.cache_clear()
    return gpu


def test_everything_that_a_cpu_can_do_is_checked_and_timed(tmp_path: Path) -> None:
    target = tmp_path / "gpu.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *SMALL, "--json", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(target.read_text())
    assert not found["left_out"] and {"torch", "transformers", "python", "date"} <= found["environment"].keys()

    checks = {row["of"]: row["found"] for row in found["checks"]}
    assert checks.keys() == {"b0"} | KERNELS
    judged = [check["passed"] for check in checks["b0"]]
    assert judged == [True, True, None, None, True, True]  # the label maps in bf16 are told, not judged
    assert [check["check"] for check in checks["layer_norm"]] == ["no kernels on this device"]

    (training,), inference = found["training"], found["inference"]
    assert [*training["variants"]] == ["transformers", "segformer", "segformer twins", "segformer every kernel"]
    assert [row["batch"] for row in inference] == [1, 2]
    assert all([*row["variants"]] == ["transformers", "segformer", "segformer every kernel"] for row in inference)
    assert [*found["decode"][0]["variants"]] == ["merged", "literal"]
    assert {row["kernel"] for row in found["kernels"]} == KERNELS and len(found["kernels"]) == 2 * len(KERNELS) - 1
    for row in [training, *inference, *found["decode"], *found["kernels"]]:
        for figures in row["variants"].values():
            time = figures["us" if "kernel" in row else "ms"]
            assert "error" not in figures and time["min"] > 0 and figures["ratio"]["median"] > 0
    (ceilings,) = found["roofline"]
    for row in [training, *inference]:
        assert 0 < row["segformer GFLOP"] < row["transformers GFLOP"]
        for figures in row["variants"].values():
            assert figures["images/s"] == pytest.approx(row["batch"] * 1e3 / figures["ms"]["median"])
            assert figures["share of memory roofline"] > 0
    share = 1e3 * training["transformers eager GB"] / ceilings["copy GB/s"]["median"]
    peer = training["variants"]["transformers"]
    assert peer["share of memory roofline"] == pytest.approx(share / peer["ms"]["median"])
    assert inference[1]["transformers eager GB"] > 1.5 * inference[0]["transformers eager GB"]

    for row in found["profiles"]:
        tops = [value for value in row.values() if isinstance(value, list)]
        assert len(tops) == 2 and all(len(top) == 10 and top[0]["share"] > 0 for top in tops)
    aims = {row["aim"]: row for row in found["headline"]}
    assert len(aims) == 3 * 4 + 2 and all(row["met"] is None for row in aims.values())  # no GPU, no verdict
    assert aims["training b0, times transformers"]["measured"]["median"] > 0
    assert aims["training b5, times transformers"]["measured"] is None
    headings = ("Checks", "Roofline", "Training", "Inference", "Kernels", "Decode", "Top kernels, training, b0", "Aims")
    assert all(f"## {heading}" in done.stdout for heading in headings)


def test_a_spent_budget_starts_nothing_and_is_no_failure(gpu: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main([*SMALL, "--budget", "0", "--json", str(tmp_path / "gpu.json")])
    import gpu_bench

    found = json.loads((tmp_path / "gpu.json").read_text())
    assert ended.value.code == 0 and found["environment"]["torch"] in torch.__version__
    assert not any(found[section] for section in gpu_bench.SECTIONS)
    assert found["left_out"][:2] == ["checks b0", "checks upsample_cross_entropy"]


def test_wrong_numbers_fail_the_run(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight of ours is off by a hundredth."""
    import gpu_networks

    exact = gpu_networks.drawn

    def off(*arguments: Any) -> Any:
        theirs, ours = exact(*arguments)
        with torch.no_grad():
            ours.segformer.stages[0].blocks[0].mlp.fc1.weight.mul_(1.01)
        return theirs, ours

    monkeypatch.setattr(gpu_networks, "drawn", off)
    with pytest.raises(SystemExit) as ended:
        gpu.main([*SMALL, "--only", "checks", "--json", str(tmp_path / "gpu.json")])
    assert ended.value.code == 1
    found = json.loads((tmp_path / "gpu.json").read_text())["checks"][0]["found"]
    passed = {check["check"].split(",")[0]: check["passed"] for check in found}
    assert passed["gradients"] is False and passed["logits"] is False
    nothing = {"checks": [], "training": [], "inference": []}
    for section in nothing:
        odd = [{"found": [gpu_networks.judged("not a number", float("nan"), 1.0)]}]
        assert gpu.wrong(nothing | {section: odd}) and not gpu.wrong(nothing)


def test_a_timed_variant_that_gives_something_else_fails_the_run(gpu: Any, tmp_path: Path, monkeypatch: Any) -> None:
    import gpu_networks

    target = tmp_path / "gpu.json"
    monkeypatch.setattr(gpu_networks, "segment", lambda _, images: torch.zeros_like(images[:, 0]))
    with pytest.raises(SystemExit) as ended:
        gpu.main([*SMALL, "--only", "inference", "--json", str(target)])
    assert ended.value.code == 1 and not json.loads(target.read_text())["inference"][0]["found"][0]["passed"]


def test_a_check_that_raises_fails_the_run(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_networks

    monkeypatch.delattr(gpu_networks, "gradients")
    with pytest.raises(SystemExit) as ended:
        gpu.main([*SMALL, "--only", "checks", "--json", str(tmp_path / "gpu.json")])
    assert ended.value.code == 1


def test_what_fails_is_recorded_and_the_rest_goes_on(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_networks

    build = gpu_networks.STEPS["training"]

    def fail(bench: Any, variant: str, row: Any) -> Any:
        if variant == "segformer":
            raise torch.OutOfMemoryError("no memory\nleft")
        return build(bench, variant, row)

    monkeypatch.setitem(gpu_networks.STEPS, "training", fail)
    with pytest.raises(SystemExit) as ended:
        gpu.main([*SMALL, "--only", "training", "--json", str(tmp_path / "gpu.json")])
    found = json.loads((tmp_path / "gpu.json").read_text())
    variants = found["training"][0]["variants"]
    assert ended.value.code == 0 and variants["segformer"]["error"] == "OutOfMemoryError: no memory"
    assert variants["transformers"]["ms"] and variants["segformer twins"]["ms"]
    assert found["headline"][0]["variant"] in ("segformer twins", "segformer every kernel")


def test_aims_are_judged_on_a_gpu_at_their_size(gpu: Any) -> None:
    def timed(speed: float, ratio: float, peak: float) -> dict[str, Any]:
        ratios = {"median": ratio, "min": ratio, "max": ratio}
        return {"ms": {"median": 1e3 / speed}, "images/s": speed, "ratio": ratios, "peak MiB": peak}

    def row(batch: int, **variants: Any) -> dict[str, Any]:
        return {"model": "b0", "size": 512, "batch": batch, "variants": variants}

    slow, fast = timed(10, 1, 100), timed(35, 3.5, 30)
    results = {
        "options": {"device": "cuda"},
        "training": [row(16, transformers=slow, segformer=timed(20, 2, 50), **{"segformer compiled": fast})],
        "inference": [
            row(1, transformers=slow, **{"segformer graphs": timed(39, 3.9, 5)}),
            row(16, transformers=timed(50, 1, 5), **{"segformer graphs": timed(200, 4, 5)}),
        ],
        "kernels": [
            {"kernel": "upsample_cross_entropy", "pass": "forward", "variants": {"kernel": {"times the floor": 1.4}}}
        ],
    }
    aims = {line["aim"]: line for line in gpu.headline(results, 512)}
    found = {aim: line["met"] for aim, line in aims.items() if line["measured"] is not None}
    assert found == {
        "training b0, times transformers": "met",
        "training b0, peak memory, share of transformers'": "met",
        "inference b0, batch 1, times transformers": "not",
        "inference b0, best batch, times transformers": "met",
        "loss kernel, forward, times its byte floor": "met",
    }
    assert aims["training b0, times transformers"]["variant"] == "segformer compiled"
    best = aims["inference b0, best batch, times transformers"]
    assert best["measured"] == 4 and best["variant"] == "segformer graphs, batch 16 to transformers, batch 16"


def test_traffic_is_counted_on_any_machine() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "traffic.py"), "--models", "b0", "--sizes", "512"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| b0")]
    for row in rows:
        theirs, _, ours = (list(map(int, row[first : first + 2])) for first in (3, 5, 7))
        assert 2 * ours[0] < theirs[0] and ours[1] < theirs[1]
        assert float(row[9]) == pytest.approx(theirs[0] / ours[0], rel=1e-3)
    # the network's share of it by hand: a 128 x 128 map of 256 channels in bf16 is 8.4 MB, and theirs has over 40 such
    assert len(rows) == 2 and 500 < int(rows[0][3]) < 800 and int(rows[1][7]) > 2 * int(rows[0][7])
