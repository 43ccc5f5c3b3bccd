"""What the GPU benchmark found, against what it was to find: the aims, and tables of all of it."""

from typing import Any

import pairs
from gpu_bench import PASSES, Row

AIMS = {"training": {"b0": 3.0, "b2": 2.5, "b5": 2.0}, "memory": 0.35, "latency": 4.0, "throughput": 3.0, "loss": 1.5}


def wrong(results: Row) -> list[Row]:
    """What is out of its bound, of the checks and of what was timed."""
    rows = [row for section in ("checks", "training", "inference") for row in results[section]]
    return [found for row in rows for found in row.get("found", ()) if found["passed"] is False]


def ours(row: Row) -> str | None:
    """The fastest of our variants in a row of training or inference; None unless transformers' was timed, too."""
    timed = {name: figures["ms"]["median"] for name, figures in row.get("variants", {}).items() if "ms" in figures}
    own = [name for name in timed if name.startswith("segformer")]
    return min(own, key=lambda name: timed[name]) if own and "transformers" in timed else None


def headline(results: Row, size: int) -> list[Row]:
    """Aims, at the first size, and what was measured; whether they are met is a question for a GPU at 512."""
    options = results["options"]
    usual = not options.get("tiny") and options.get("classes") in (None, 150) and options.get("batch") in (None, 16)
    judge = size == 512 and options["device"] != "cpu" and usual
    lines: list[Row] = []

    def line(aim: str, bound: float, value: Any, variant: str | None, least: bool = True) -> None:
        middle = value["median"] if isinstance(value, dict) else value
        met = None if middle is None or not judge else "met" if (middle >= bound) == least else "not"
        sign = ">=" if least else "<="
        lines.append({"aim": aim, "bound": f"{sign} {bound}", "measured": value, "variant": variant, "met": met})

    def found(section: str, model: str) -> list[Row]:
        return [row for row in results[section] if row["model"] == model and row["size"] == size and ours(row)]

    for model, bound in AIMS["training"].items():
        row = next(iter(found("training", model)), {"variants": {}})
        name = ours(row)
        own, theirs = (row["variants"].get(key, {}) for key in (name, "transformers"))
        line(f"training {model}, times transformers", bound, own.get("ratio"), name)
        peaks = [figures.get("peak MiB") for figures in (own, theirs)]
        share = peaks[0] / peaks[1] if all(peaks) else None
        line(f"training {model}, peak memory, share of transformers'", AIMS["memory"], share, name, least=False)
    for model in AIMS["training"]:
        rows = found("inference", model)
        name = "segformer graphs"
        ratios = [row["variants"].get(name, {}).get("ratio") for row in rows if row["batch"] == 1]
        line(f"inference {model}, batch 1, times transformers", AIMS["latency"], next(iter(ratios), None), name)
        speeds = [
            (figures["images/s"], f"{name}, batch {row['batch']}")
            for row in rows
            for name, figures in row["variants"].items()
            if "images/s" in figures
        ]
        eager = [speed for speed in speeds if speed[1].startswith("transformers, ")]  # what the aims are against
        best = max([speed for speed in speeds if speed[1].startswith("segformer")], default=None)
        theirs = max(eager, default=None)
        share = best[0] / theirs[0] if best and theirs else None
        note = f"{best[1]} to {theirs[1]}" if best and theirs else None
        line(f"inference {model}, best batch, times transformers", AIMS["throughput"], share, note)
    for learn in PASSES:
        key = {"kernel": "upsample_cross_entropy", "pass": learn}
        rows = [row for row in results["kernels"] if row.items() >= key.items()]
        times = rows[0].get("variants", {}).get("kernel", {}).get("times the floor") if rows else None
        line(f"loss kernel, {learn}, times its byte floor", AIMS["loss"], times, None, least=False)
    return lines


COLUMNS = (
    *("first call s", "ms", "us", "images/s", "ratio", "peak MiB", "reserved MiB", "share of memory roofline"),
    *("share of matmul rate", "times the floor", "labels as the first variant's", "error"),
)


def report(results: Row) -> str:
    """Markdown: what was run where, then a table a section."""
    lines = ["# GPU benchmark", ", ".join(f"{key} {value}" for key, value in results["environment"].items() if value)]
    tables: dict[str, list[Row]] = {"Roofline": results["roofline"]}
    timed = [
        {"of": f"{section} {row['model']} {row['size']}, batch {row['batch']}", "found": row.get("found", ())}
        for section in ("training", "inference")
        for row in results[section]
    ]
    tables["Checks"] = [
        {"of": row["of"], **dict.fromkeys(("check", "value", "bound", "passed", "error")), **found}
        for row in (*results["checks"], *timed)
        for found in [*row.get("found", ()), *([{"error": row["error"]}] if "error" in row else ())]
    ]
    for row in tables["Checks"]:
        row.pop("at", None)
    for section in ("training", "inference", "kernels", "decode"):
        flat = [
            {key: value for key, value in row.items() if not isinstance(value, dict)} | {"variant": name, **figures}
            for row in results[section]
            for name, figures in (row.get("variants") or {"-": {}}).items()
        ]
        first = ("model", "kernel", "pass", "size", "batch", "floor us", "variant")
        columns = [name for name in (*first, *COLUMNS) if any(row.get(name) is not None for row in flat)]
        tables[section.capitalize()] = [{name: row.get(name) for name in columns} for row in flat]
    for row in results["profiles"]:
        if "error" in row:
            lines.append(f"No profile of {row['task']}: {row['error']}")
        for variant, top in row.items():
            if isinstance(top, list):
                tables[f"Top kernels, {row['task']}, {row['model']}, batch {row['batch']}, {variant}"] = top
    tables["Aims"] = results["headline"]
    lines += [f"## {heading}\n\n{pairs.table(rows)}" for heading, rows in tables.items() if rows]
    if results["left_out"]:
        lines.append("Left out, the budget was spent: " + "; ".join(results["left_out"]))
    return "\n\n".join(lines)
