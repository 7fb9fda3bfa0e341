"""Run folders as the product writes them, small but with realistic numbers."""

from __future__ import annotations

import csv
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from dmi_hpc.files import write_json

LAYERS: list[dict[str, Any]] = [
    {"kind": "conv", "filters": 24, "kernel": 3, "padding": "circular"},
    {"kind": "norm", "op": "batch"},
    {"kind": "activation", "function": "silu"},
    {"kind": "pool", "op": "mean", "size": 2},
    {"kind": "conv", "filters": 64, "kernel": 5},
    {"kind": "activation", "function": "relu"},
    {"kind": "pool", "op": "max", "size": 2},
    {"kind": "conv", "filters": 128, "kernel": 3, "padding": "circular"},
    {"kind": "activation", "function": "gelu"},
    {"kind": "pool", "op": "mean", "size": 2},
    {"kind": "readout", "op": "flatten"},
    {"kind": "dense", "units": 512},
    {"kind": "activation", "function": "gelu"},
    {"kind": "dropout", "rate": 0.1},
    {"kind": "dense", "units": 64},
    {"kind": "activation", "function": "leaky_relu"},
]
VOXEL_NETWORK = {"input_shape": [1, 21, 21, 21], "layers": LAYERS, "outputs": 1}
ELEMNET_UNITS = [1024] * 4 + [512] * 3 + [256] * 3 + [128] * 3 + [64] * 2 + [32]
ELEMNET = {
    "input_shape": [86],
    "layers": [
        layer
        for units in ELEMNET_UNITS
        for layer in (
            {"kind": "dense", "units": units},
            {"kind": "activation", "function": "relu"},
        )
    ],
    "outputs": 1,
}
FIELDS = [
    ("phase", "uint8", [21, 21, 21], "", "1 where the voxel is stiff"),
    ("C1111", "float64", [], "GPa", "effective stiffness along x"),
    ("residual", "float64", [], "1", "relative residual of the solver"),
]
START = 1_790_000_000.0


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_run(run: Path, *, name: str = "homogenization_quickstart", task: str = "homogenization"):
    recipe = {
        "name": name,
        "seed": 7,
        "task": {"name": task, "voxels": 21, "contrast": 50},
        "data": {"path": None, "rows_per_shard": 128},
        "train": {"epochs": 60, "batch_size": 32, "learning_rate": 1e-3},
        "search": {"evaluations": 64, "workers": 2},
    }
    write_json(
        run / "run.json",
        {
            "recipe": recipe,
            "name": name,
            "task": task,
            "created": "2026-11-22T08:00:00+00:00",
            "commands": [f"dmi search recipes/{name}.toml runs/q", "dmi train runs/q"],
            "versions": {"dmi-hpc": "0.1.0", "torch": "2.13.0", "ray": "2.60.0"},
            "hardware": {"host_cores": 4, "cpu": "AMD EPYC 9B14", "memory_GB": 24, "gpus": []},
            "seed": 7,
        },
    )


def write_data(run: Path) -> None:
    stiffness = {"mean": 33.412, "std": 12.9, "min": 9.8, "max": 71.3, "count": 560}
    write_json(
        run / "data" / "manifest.json",
        {
            "format": "dmi-shards",
            "version": 2,
            "rows": 800,
            "split_rows": {"train": 560, "validation": 120, "test": 120},
            "plan": {
                "task": "homogenization",
                "fields": [
                    {
                        "name": name,
                        "dtype": dtype,
                        "shape": shape,
                        "unit": unit,
                        "description": text,
                    }
                    for name, dtype, shape, unit, text in FIELDS
                ],
                "split_rule": {"seed": 7, "validation": 0.15, "test": 0.15, "key": "row number"},
                "provenance": {
                    "solver": "trilinear hexahedra, B-bar, FFT-preconditioned CG",
                    "contrast": 50,
                    "E_stiff_GPa": 120.0,
                    "E_soft_GPa": 2.4,
                    "poisson": 0.3,
                },
            },
            "shards": [{"file": f"shard-{i:05d}.h5", "rows": 128} for i in range(7)],
            "statistics": {"C1111": stiffness, "residual": {"mean": 3.1e-7, "max": 9.9e-7}},
        },
    )


def genome(rng: np.random.Generator, parent: dict[str, Any] | None = None) -> dict[str, Any]:
    if parent is None:
        return {
            "conv": [
                {"filters": int(rng.choice([16, 32, 64])), "kernel": 3, "activation": "relu"}
                for _ in range(int(rng.integers(1, 4)))
            ],
            "readout": "flatten",
            "dense": [{"units": 128, "dropout": 0.0}],
            "hyper": {"learning_rate": float(10 ** rng.uniform(-4, -2))},
        }
    child: dict[str, Any] = json.loads(json.dumps(parent))
    if rng.random() < 0.4:
        child["conv"].append({"filters": 64, "kernel": 5, "activation": "silu"})
        child["conv"] = child["conv"][-4:]
    child["conv"][0]["filters"] = int(rng.choice([16, 24, 32, 48]))
    child["hyper"]["learning_rate"] *= float(np.exp(rng.normal(0, 0.3)))
    return child


def write_search(
    run: Path,
    *,
    trials: int = 64,
    workers: int = 2,
    all_fail: bool = False,
    new_keys: bool = False,
) -> int:
    """A journal of `trials` evaluations with one resume; returns the best id.

    new_keys: with those that journals of older versions do not have.
    """
    rng = np.random.default_rng(3)
    time, free = START, [START] * workers
    header = {"event": "header", "version": 1, "seed": 7, "time": START}
    config: dict[str, Any] = {"workers": workers}
    if new_keys:
        config |= {"objectives": ["error", "flops", "parameters"], "population": 12}
    events: list[dict[str, Any]] = [{**header, "config": config}]
    genomes: dict[int, dict[str, Any]] = {}
    fitness: dict[int, float] = {}
    for i in range(trials):
        worker = int(np.argmin(free))
        time = free[worker]
        ranked = sorted(fitness, key=fitness.__getitem__)[:10]
        origin, parents = "founder" if i < 2 else "random", []
        if i >= 12 and len(ranked) > 2:
            origin = str(
                rng.choice(
                    ["mutation", "crossover", "incumbent", "random"], p=[0.4, 0.35, 0.15, 0.1]
                )
            )
            count = {"crossover": 2, "random": 0}.get(origin, 1)
            parents = [int(p) for p in rng.choice(ranked, count, replace=False)]
        genomes[i] = genome(rng, genomes[parents[0]] if parents else None)
        events.append(
            {"event": "ask", "id": i, "time": time, "genome": genomes[i], "hash": f"{i:032x}"}
            | {"origin": origin, "parents": parents}
        )
        asked = events[-1]
        seconds = float(rng.uniform(2, 7))
        free[worker] += seconds + 0.3
        tell: dict[str, Any] = {
            "event": "tell",
            "id": i,
            "time": time + seconds,
            "seconds": seconds,
        }
        if all_fail or rng.random() < 0.08:
            kind = str(rng.choice(["nan", "memory", "timeout"]))
            tell |= {"status": "failed", "failure": kind, "message": "loss is not finite"}
        else:
            base = min((fitness[p] for p in parents), default=float(rng.uniform(0.25, 0.9)))
            fitness[i] = base * float(np.exp(rng.normal(0.06, 0.16)))
            parameters = int(10 ** rng.uniform(4, 6.5))
            tell |= {"status": "ok", "fitness": fitness[i]}
            tell["metrics"] = {"parameters": parameters, "flops": 30 * parameters + 5, "note": "x"}
            if new_keys and parents:
                asked["predicted"] = fitness[i] + float(rng.normal(0, 0.1))
        events.append(tell)
    ordered = sorted(events, key=lambda event: (event["time"], event["event"] != "ask"))
    ordered.sort(key=lambda event: event["event"] != "header")
    cut = len(ordered) // 2
    pause = [{**event, "time": event["time"] + 3600} for event in ordered[cut:]]
    resume = {"event": "resume", "time": pause[0]["time"] - 0.5}
    write_lines(run / "search" / "journal.jsonl", [*ordered[:cut], resume, *pause])
    if not fitness:
        return -1
    best = min(fitness, key=fitness.__getitem__)
    winning = next(e for e in ordered if e["event"] == "ask" and e["id"] == best)
    write_json(
        run / "search" / "winner.json",
        {
            "id": best,
            "fitness": fitness[best],
            "network": VOXEL_NETWORK,
            "hyper": {"learning_rate": 0.00183, "batch_size": 16, "optimizer": "adamw"},
            "origin": winning["origin"],
            "parents": winning["parents"],
        },
    )
    return best


def write_ensemble(run: Path) -> dict[str, Any]:
    """What `dmi search refine` leaves, without the members' weights; returns its scores."""
    raw = {"nll": 1.9, "coverage_1": 0.41, "coverage_2": 0.67, "rank_correlation": 0.52}
    good = {"nll": 0.71, "coverage_1": 0.702, "coverage_2": 0.958, "rank_correlation": 0.55}
    scores = {
        "quantity": "C1111",
        "unit": "GPa",
        "members": [
            {"network": str(n), "seed": s, "validation_mae": 0.03 + 0.001 * s}
            | {"test_mae": 0.031 + n / 1e4, "chosen": s < 9}
            for n in (40, 12)
            for s in (7, 8, 9)
        ],
        "validation": {"rows": 120, "mae": 0.027, **good, "raw": raw},
        "test": {"rows": 120, "mae": 0.0283, **good, "raw": raw},
    }
    content = {"format": "dmi-ensemble", "version": 1, "members": [], "scores": scores}
    write_json(run / "search" / "ensemble" / "ensemble.json", content)
    return scores


def write_training(run: Path, network: dict[str, Any], *, epochs: int = 60) -> None:
    rng = np.random.default_rng(4)
    lines = []
    for epoch in range(epochs):
        train = 0.9 * np.exp(-epoch / 9) + 0.006 + 0.002 * rng.random()
        lines.append(
            {
                "kind": "epoch",
                "epoch": epoch,
                "step": epoch * 18,
                "train_loss": float(train),
                "validation_error": float(8 * train + 0.8 + 0.3 * rng.random()),
                "validation_rmse": float(10 * train),
                "learning_rate": 1e-3 * float(np.cos(epoch / epochs * np.pi / 2)),
                "seconds": 2.1,
                "samples_per_s": 266.0 + float(rng.random()),
            }
        )
    write_lines(run / "train" / "metrics.jsonl", [{"kind": "start", "time": START}, *lines])
    write_json(run / "train" / "network.json", network)
    write_json(
        run / "train" / "status.json",
        {"state": "finished", "best_epoch": epochs - 6, "ranks": 2, "engine": "deepspeed"}
        | {"parameters": 971_793, "reason": "early stop", "device": "cpu", "weights_xxh3": "ab12"},
    )


HOMOGENIZATION_METHODS = {
    "network": ("Evolved 3-D CNN", 0.031),
    "voigt": ("Rule of mixtures (Voigt)", 0.45),
    "hashin_shtrikman": ("Hashin-Shtrikman mean", 0.21),
    "two_point": ("PCA of two-point statistics + regression", 0.062),
}
YANG = [
    {
        "label": "Yang 2018, 3-D CNN, 51³ voxels, 8,550 volumes",
        "mae": 1.04,
        "mae_percent": 3.1,
        "source": "Comput. Mater. Sci. 151 (2018) 278",
    },
    {"label": "Yang 2018, rule of mixtures", "mae": 15.68, "mae_percent": 46.66},
]
ELEMNET_METHODS = {"network": ("ElemNet", 0.05), "forest": ("Random forest", 0.1)}


def write_evaluation(
    run: Path,
    *,
    methods: dict[str, tuple[str, float]] = HOMOGENIZATION_METHODS,
    quantity: str = "C1111",
    unit: str = "GPa",
    label: str = "microstructure {}",
    rows: int = 120,
) -> dict[str, Any]:
    rng = np.random.default_rng(5)
    truth = rng.normal(33, 11, rows).clip(10) if unit == "GPa" else rng.normal(-0.6, 0.7, rows)
    spread = float(np.abs(truth).mean())
    columns = {}
    for name, (_, noise) in methods.items():
        bias = 1.0 if name in ("voigt", "hashin_shtrikman") else 0.0
        columns[name] = truth + spread * noise * (bias + rng.normal(0, 1.2 - bias / 2, rows))
    results = []
    for name, (title, _) in methods.items():
        error = columns[name] - truth
        mae = float(np.abs(error).mean())
        results.append(
            {
                "name": name,
                "label": title,
                "mae": mae,
                "rmse": float(np.sqrt((error**2).mean())),
                "r2": float(1 - (error**2).sum() / ((truth - truth.mean()) ** 2).sum()),
                "mae_percent": 100 * mae / spread,
                "seconds": 0.31,
            }
        )
    evaluation = {
        "split": "test",
        "rows": rows,
        "quantity": quantity,
        "unit": unit,
        "methods": results,
        "published": YANG if unit == "GPa" else [],
    }
    write_json(run / "evaluation.json", evaluation)
    with (run / "predictions.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["row", "label", "truth", *columns])
        for i in range(rows):
            writer.writerow([i, label.format(i), truth[i], *(c[i] for c in columns.values())])
    return evaluation


def png(pixels: np.ndarray) -> bytes:
    """A grey 8-bit PNG of (H, W) values."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    height, width = pixels.shape
    lines = b"".join(b"\0" + row.astype(np.uint8).tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def write_gallery(run: Path, *, pictures: int = 4) -> None:
    rng = np.random.default_rng(6)
    folder = run / "gallery"
    entries = []
    for i in range(pictures):
        noise = np.fft.rfft2(rng.normal(size=(84, 84)))
        frequency = np.hypot(np.fft.fftfreq(84)[:, None], np.fft.rfftfreq(84)[None, :])
        field = np.fft.irfft2(noise * np.exp(-((frequency / 0.05) ** 2)), s=(84, 84))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.png").write_bytes(png(np.where(field > 0, 210, 60)))
        caption = f"stiff fraction 0.{5 + i}: true {30 + i}.1 GPa, predicted {30 + i}.6 GPa"
        entries.append({"file": f"{i}.png", "caption": caption})
    write_json(folder / "gallery.json", entries)


def complete_run(run: Path) -> dict[str, Any]:
    write_run(run)
    write_data(run)
    write_search(run)
    write_training(run, VOXEL_NETWORK)
    write_gallery(run)
    return write_evaluation(run)


def elemnet_run(run: Path, *, rows: int = 3000) -> dict[str, Any]:
    """Another task: no search, no gallery, enough rows for a bitmap scatter."""
    write_run(run, name="elemnet", task="composition")
    write_training(run, ELEMNET)
    return write_evaluation(
        run,
        methods=ELEMNET_METHODS,
        quantity="formation enthalpy",
        unit="eV/atom",
        label="Al{}O3",
        rows=rows,
    )
