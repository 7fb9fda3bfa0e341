"""The loader as PyTorch users know one: an iterable of dictionaries of tensors, with a state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xxhash
from torch import Tensor, distributed
from torch.utils.data import IterableDataset, get_worker_info

from dmi_hpc.data.access import order_of
from dmi_hpc.data.device import to_device
from dmi_hpc.data.loader import Batch, Loader
from dmi_hpc.data.manifest import SplitName, require_identity
from dmi_hpc.data.permutation import Ids
from dmi_hpc.data.ragged import Ragged
from dmi_hpc.data.reader import ShardSet
from dmi_hpc.data.sampler import Order, Tail
from dmi_hpc.errors import DataError
from dmi_hpc.world import detect

_ONE_PROCESS = (
    "a ShardLoader works in the process that has made it, with threads of its own: a copy in another "
    "would read every batch once more. Of a DataLoader: DataLoader(loader, batch_size=None, "
    "num_workers=0); elsewhere, make it there"
)

Transform = Callable[[Batch], Mapping[str, Any]]
Tensors = dict[str, Tensor]


class ShardLoader(IterableDataset[Tensors]):
    """Batches of a shard set, as dictionaries of tensors.

        loader = ShardLoader("data/oqmd", ("fractions", "value"), batch_size=256)
        for epoch in range(10):
            for batch in loader:
                step(batch["fractions"], batch["value"])

    Each pass over it is an epoch, in an order of its own; one that is left before its end is over.
    The pass after load_state_dict is the rest of the epoch that the state was saved in. Keys: the
    fields; for each ragged axis "_offsets.AXIS" (n + 1,), whose entries lie one after the other in
    the axis's fields; "_weights" (n,), 1, or 0 where a row only pads a rank's share of the last
    batch; "_rows" (n,).

    fields: numeric fields of the set. split: or rows, (m,) int64 numbers of rows. batch_size: of all
    ranks together. shuffle: "auto" takes what suits the storage (`shards.access.reason` says why). rank,
    size: of torch.distributed if it is initialised, else 0 of 1. threads: 0 reads in the caller.
    tail: of the epoch's last, incomplete batch: "keep" (shorter), "drop", or "wrap" (filled from the
    epoch's start). transform: batch -> fields, run in the reading thread; ragged ones keep the axis
    of a field of the set. parts: see `Order`; by default 1, or in block shuffle what lets each rank
    read a part of the set only.
    device: where tensors are put; copies to a GPU run beside its work.

    Arrays are reused once nobody holds them. Not for several DataLoader workers: it has threads.
    """

    def __init__(
        self,
        shards: ShardSet | Path | str,
        fields: Sequence[str],
        *,
        batch_size: int,
        split: SplitName | Literal["all"] = "train",
        rows: Ids | None = None,
        seed: int = 0,
        shuffle: Literal["auto", "global", "block", "none"] = "auto",
        rank: int | None = None,
        size: int | None = None,
        threads: int = 2,
        tail: Tail = "keep",
        parts: int | None = None,
        transform: Transform | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if not isinstance(shards, ShardSet):
            shards = ShardSet.open(shards, processes_on_node=detect().local_size)
        self.shards = shards
        if not fields:
            known = ", ".join(field.name for field in shards.manifest.fields)
            raise DataError(f"fields: expected one or more, found none; of: {known}")
        for name in fields:
            if not self.shards.manifest.field(name).numeric:
                raise DataError(
                    f"field {name!r} is text: a tensor cannot hold it (ShardSet.gather)"
                )
        chosen = self.shards.rows(split) if rows is None else self.shards.numbers(rows)
        self._rows = split if rows is None else xxhash.xxh3_64_hexdigest(np.asarray(chosen).data)
        self.device, self._transform = torch.device(device), transform
        live = distributed.is_available() and distributed.is_initialized()
        if shuffle == "auto" and (size or 1) > 1 and not live:
            raise DataError(
                f"rank and size ({size}) without torch.distributed: each rank would choose a shuffle of "
                'its own. Give the shuffle ("global" or "block"), or call init_process_group first'
            )
        order = order_of(
            self.shards,
            fields,
            len(chosen),
            batch_size=batch_size,
            seed=seed,
            shuffle=None if shuffle == "auto" else shuffle,
            parts=parts,
        )
        if live and size != 1:  # a window follows the node's memory: rank 0's is everybody's
            shared = [order]
            distributed.broadcast_object_list(shared, src=0)
            order = shared[0]
        self._loader: Loader[Batch] = Loader(
            self.shards,
            chosen,
            fields,
            order,
            batch_size=batch_size,
            prepare=None if transform is None else self._transformed,
            rank=rank if rank is not None else distributed.get_rank() if live else 0,
            size=size if size is not None else distributed.get_world_size() if live else 1,
            tail=tail,
            threads=threads,
            pin=self.device.type == "cuda",
        )
        self.epoch, self.position = 0, 0
        self._begun = False  # a pass of this epoch

    @property
    def order(self) -> Order:
        return self._loader.order

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self._loader.steps()

    def set_epoch(self, epoch: int) -> None:
        """The next pass is this epoch, whatever came before."""
        self.epoch, self.position, self._begun = epoch, 0, False

    def __iter__(self) -> Iterator[Tensors]:
        """One epoch, or what a loaded state has left of it."""
        if get_worker_info() is not None:
            raise DataError(_ONE_PROCESS)
        if self._begun:
            self.set_epoch(self.epoch + 1)
        self._begun, epoch = True, self.epoch
        batches = self._loader.epoch(epoch, self.position)
        for stop, tensors in to_device(map(self._tensors, batches), self.device):
            # now, for a state saved in the loop's body counts this batch; and after the last one
            # nobody may ask for more
            if self._loader.steps(stop):
                self.position = stop
            else:
                self.set_epoch(epoch + 1)
            yield tensors
        if self.epoch == epoch:  # there was no batch
            self.set_epoch(epoch + 1)

    def state_dict(self) -> dict[str, Any]:
        """Where the epoch stands: with it training goes on at any number of ranks and threads."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "order": asdict(self.order),
            "data": self.shards.manifest.identity,
            "rows": self._rows,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state, in its order. Raises DataError if it is of other rows."""
        missing = {"epoch", "position", "order", "data", "rows"} - set(state)
        if missing:
            raise DataError(f"not the state of a ShardLoader: {', '.join(sorted(missing))} missing")
        require_identity(state["data"], self.shards.manifest.identity, maker="loader state")
        if state["rows"] != self._rows:
            raise DataError(
                f"the state is of the rows {state['rows']!r}, this loader of {self._rows!r}: the split, "
                "or a checksum of row numbers"
            )
        self._loader.continue_with(Order(**state["order"]), state["position"])
        self.epoch, self.position, self._begun = state["epoch"], state["position"], False

    def __getstate__(self) -> object:
        raise DataError(_ONE_PROCESS)

    def _transformed(self, batch: Batch) -> Batch:
        assert self._transform is not None
        return replace(batch, fields=dict(self._transform(batch)))

    def _tensors(self, batch: Batch) -> tuple[int, Tensors]:
        tensors: Tensors = {}
        for name, values in batch.fields.items():
            if isinstance(values, Ragged):
                axis = self.shards.manifest.field(name).axis
                tensors[name] = torch.from_numpy(values.values)
                tensors[f"_offsets.{axis}"] = torch.from_numpy(values.offsets)
            else:
                tensors[name] = torch.from_numpy(np.ascontiguousarray(values))
        tensors["_weights"] = torch.from_numpy(batch.weights)
        tensors["_rows"] = torch.from_numpy(batch.rows)
        return batch.stop, tensors
