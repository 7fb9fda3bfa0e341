"""A Ray Train job of two workers from a shard set: each worker makes its own ShardLoader."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray import train
from ray.train.torch import TorchTrainer, prepare_model

from dmi_hpc.data import BuildPlan, Field, ShardLoader, ShardWriter, SplitRule

EPOCHS = 3


def worker(config: dict[str, Any]) -> None:
    # Ray has set up torch.distributed: the loader finds its rank and their number there
    loader = ShardLoader(config["folder"], ("x", "y"), batch_size=50)
    model = prepare_model(torch.nn.Linear(4, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    ranks = train.get_context().get_world_size()
    if found := train.get_checkpoint():  # after a failure; perhaps at another number of workers
        with found.as_directory() as folder:
            state = torch.load(Path(folder) / "state.pt")
        loader.load_state_dict(state["loader"])
        model.module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    for epoch in range(loader.epoch, EPOCHS):
        total = torch.zeros(2)  # squared error, rows
        for batch in loader:
            squares = (model(batch["x"]).squeeze(1) - batch["y"]).square() * batch["_weights"]
            rows = batch["_weights"].sum()
            torch.distributed.all_reduce(rows)
            optimizer.zero_grad()
            (squares.sum() * ranks / rows).backward()  # gradients are averaged over the ranks
            optimizer.step()
            total += torch.stack([squares.detach().sum(), batch["_weights"].sum()])
        torch.distributed.all_reduce(total)
        metrics = {"mse": float(total[0] / total[1]), "rows": int(total[1]), "epoch": epoch}
        with tempfile.TemporaryDirectory() as folder:
            state = {
                "loader": loader.state_dict(),
                "model": model.module.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            torch.save(state, Path(folder) / "state.pt")
            train.report(metrics, checkpoint=train.Checkpoint.from_directory(folder))


def main(temporary: str) -> train.Result:
    plan = BuildPlan(
        task="example",
        rows_per_shard=500,
        fields=(
            Field(name="x", dtype="float32", shape=(4,), unit="1", description="fractions"),
            Field(name="y", dtype="float32", unit="eV/atom", description="energy"),
        ),
        split_rule=SplitRule(seed=0, validation=0.0, test=0.0, key="row number"),
        seed=0,
    )
    folder = Path(temporary) / "set"
    x = np.random.default_rng(0).dirichlet(np.ones(4), 1020).astype(np.float32)
    with ShardWriter(folder, plan) as writer:
        writer.append({"x": x, "y": x @ np.array([1, -2, 3, 0], dtype=np.float32)})
    trainer = TorchTrainer(
        worker,
        train_loop_config={"folder": str(folder)},
        scaling_config=train.ScalingConfig(num_workers=2),
        run_config=train.RunConfig(name="example", storage_path=temporary),
    )
    return trainer.fit()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        metrics = main(temporary).metrics
        ray.shutdown()
    assert metrics["rows"] == 1020  # every row once, though 1020 is no multiple of 50
    assert metrics["mse"] < 0.1
