"""A LightningModule trained from a shard set: ShardLoader is the train_dataloaders."""

import tempfile
from pathlib import Path

import lightning
import numpy as np
import torch

from dmi_hpc.data import BuildPlan, Field, ShardLoader, ShardWriter, SplitRule

plan = BuildPlan(
    task="example",
    rows_per_shard=500,
    fields=(
        Field(name="x", dtype="float32", shape=(4,), unit="1", description="fractions"),
        Field(name="y", dtype="float32", unit="eV/atom", description="energy"),
    ),
    split_rule=SplitRule(seed=0, validation=0.2, test=0.0, key="row number"),
    seed=0,
)


class Linear(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        error = self.layer(batch["x"]).squeeze(1) - batch["y"]
        # weights are 0 where a rank's last batch is padded
        return (batch["_weights"] * error.square()).sum() / batch["_weights"].sum()

    def validation_step(self, batch: dict[str, torch.Tensor], _: int) -> None:
        error = (self.layer(batch["x"]).squeeze(1) - batch["y"]).abs()
        self.log("mae", error.mean(), batch_size=len(error))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.05)


with tempfile.TemporaryDirectory() as temporary:
    folder = Path(temporary) / "set"
    x = np.random.default_rng(0).dirichlet(np.ones(4), 1000).astype(np.float32)
    y = x @ np.array([1, -2, 3, 0], dtype=np.float32)
    with ShardWriter(folder, plan) as writer:
        writer.append({"x": x, "y": y})

    train = ShardLoader(folder, ("x", "y"), batch_size=50)
    validation = ShardLoader(folder, ("x", "y"), split="validation", batch_size=50, shuffle="none")
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=20,
        default_root_dir=temporary,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Linear(), train, validation)
    assert trainer.global_step == 20 * len(train)
    assert trainer.callback_metrics["mae"] < 0.05
