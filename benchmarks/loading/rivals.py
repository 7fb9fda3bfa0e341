"""One rival loader in a process of its own: writes its format, then reads windows on request.

    python rivals.py NAME FOLDER

FOLDER holds ``source.npy`` (rows, *shape), or ``source.npz`` of graphs. Requests and answers are
lines of JSON; what the libraries print goes to stderr. A process of its own, because some of these
libraries start processes and shared memory that outlive an exception.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Loader = Iterable[Any]

PACKAGES = {  # what each needs to be installed
    "webdataset": "webdataset",
    "mosaicml-streaming": "mosaicml-streaming",
    "litdata": "litdata",
    "h5py DataLoader": "h5py",
    "PyG": "torch_geometric",
}
CHUNK = 64 * 2**20  # bytes of a shard, the default of MosaicML and LitData


def installed(name: str) -> str | None:
    """Version of a rival's package."""
    try:
        return version(PACKAGES[name])
    except PackageNotFoundError:
        return None


def workers_of(workers: int) -> dict[str, Any]:
    """Of torch's DataLoader: kept over epochs, four batches ahead each."""
    extra = {"persistent_workers": True, "prefetch_factor": 4} if workers else {}
    return {"num_workers": workers, **extra}


def write_webdataset(source: Array, folder: Path) -> None:
    import webdataset

    shards = max(8, -(-source.nbytes // CHUNK))  # at least two a worker
    for shard, rows in enumerate(np.array_split(np.arange(len(source)), shards)):
        with webdataset.TarWriter(str(folder / f"{shard:05d}.tar")) as tar:
            for row in rows.tolist():
                tar.write({"__key__": f"{row:09d}", "x.bin": source[row].tobytes()})


def load_webdataset(source: Array, folder: Path, batch: int, workers: int) -> Loader:
    """Raw bytes: quicker to decode than its ``.npy``. Shuffled by shard and in a buffer of 1000."""
    import torch
    import webdataset

    shape, dtype = source.shape[1:], source.dtype

    def decode(sample: dict[str, bytes]) -> Array:
        return np.frombuffer(bytearray(sample["x.bin"]), dtype=dtype).reshape(shape)

    urls = sorted(str(path) for path in folder.glob("*.tar"))
    samples = webdataset.WebDataset(urls, shardshuffle=len(urls)).shuffle(1000).map(decode)
    batches = samples.batched(batch, collation_fn=torch.utils.data.default_collate)
    return webdataset.WebLoader(batches, batch_size=None, **workers_of(workers))


def write_mosaicml(source: Array, folder: Path) -> None:
    from streaming import MDSWriter

    shape = ",".join(map(str, source.shape[1:]))
    columns = {"x": f"ndarray:{source.dtype.name}:{shape}"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=CHUNK) as writer:
        for row in source:
            writer.write({"x": row})


def load_mosaicml(source: Array, folder: Path, batch: int, workers: int) -> Loader:
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    alias = folder.with_name(f"{folder.name}-{workers}")  # it refuses a folder twice in a process
    alias.symlink_to(folder)
    data = StreamingDataset(local=str(alias), shuffle=True, batch_size=batch)
    return DataLoader(data, batch_size=batch, **workers_of(workers))


class _Row:
    """Row of a memory-mapped file, for processes that LitData starts."""

    def __init__(self, source: Path) -> None:
        self.source = source

    def __call__(self, row: int) -> Array:
        # an array is read 3 to 10 times as fast as a tensor or a dictionary of them
        return np.array(np.load(self.source, mmap_mode="r")[row])


def write_litdata(source: Array, folder: Path) -> None:
    import litdata

    litdata.optimize(
        fn=_Row(folder.parent / "source.npy"),
        inputs=list(range(len(source))),
        output_dir=str(folder),
        chunk_bytes=CHUNK,
        num_workers=1,
        verbose=False,
    )


def load_litdata(source: Array, folder: Path, batch: int, workers: int) -> Loader:
    import litdata

    data = litdata.StreamingDataset(str(folder), shuffle=True, drop_last=False)
    return litdata.StreamingDataLoader(data, batch_size=batch, **workers_of(workers))


def write_hdf5(source: Array, folder: Path) -> None:
    import h5py

    with h5py.File(folder / "x.h5", "w") as file:
        file.create_dataset("x", data=source)  # contiguous: the fastest layout for single rows


class _Hdf5Rows:
    """Opened where it is read: HDF5 handles do not survive a fork."""

    def __init__(self, path: Path, rows: int) -> None:
        self.path, self.rows = path, rows
        self.data: Any = None

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> Array:
        import h5py

        if self.data is None:
            self.data = h5py.File(self.path, "r")["x"]
        return self.data[row]


def load_hdf5(source: Array, folder: Path, batch: int, workers: int) -> Loader:
    from torch.utils.data import DataLoader

    rows: Any = _Hdf5Rows(folder / "x.h5", len(source))
    return DataLoader(rows, batch_size=batch, shuffle=True, **workers_of(workers))


def write_pyg(source: Any, folder: Path) -> None:
    """Nothing: InMemoryDataset holds its graphs in memory."""


def load_pyg(source: Any, folder: Path, batch: int, workers: int) -> Loader:
    import torch
    from torch_geometric.data import Data, InMemoryDataset
    from torch_geometric.loader import DataLoader

    class Crystals(InMemoryDataset):
        def __init__(self, graphs: list[Data]) -> None:
            super().__init__()
            self.data, self.slices = self.collate(graphs)

    fields = {name: torch.from_numpy(source[name]) for name in source.files}
    nodes, edges = source["nodes"].tolist(), source["edges"].tolist()
    graphs = [
        Data(
            z=z,
            pos=positions,
            edge_index=pairs.t().contiguous(),
            edge_attr=distance,
            y=y,
        )
        for z, positions, pairs, distance, y in zip(
            fields["z"].split(nodes),
            fields["positions"].split(nodes),
            fields["pairs"].split(edges),
            fields["distance"].split(edges),
            fields["y"].split(1),
            strict=True,
        )
    ]
    return DataLoader(Crystals(graphs), batch_size=batch, shuffle=True, **workers_of(workers))


Write = Callable[[Any, Path], None]
Load = Callable[[Any, Path, int, int], Loader]
RIVALS: dict[str, tuple[Write, Load]] = {
    "webdataset": (write_webdataset, load_webdataset),
    "mosaicml-streaming": (write_mosaicml, load_mosaicml),
    "litdata": (write_litdata, load_litdata),
    "h5py DataLoader": (write_hdf5, load_hdf5),
    "PyG": (write_pyg, load_pyg),
}


class Stream:
    """Epoch after epoch of one loader, read a window at a time.

    The clock stands still while an epoch starts and while the batches made ahead during a pause are
    used up: what counts is the steady rate, the kindest figure to a loader with slow starts.
    """

    def __init__(self, loader: Loader, sample: tuple[int, ...], dtype: str, workers: int) -> None:
        self.loader, self.sample, self.dtype = loader, sample, dtype
        self.ahead = 4 * workers + 2
        self.batches: Iterator[Any] = iter(())

    def window(self, seconds: float) -> float:
        """Samples a second over at least `seconds`."""
        samples, spent, discard = 0, 0.0, self.ahead
        while spent < seconds:
            for _ in range(discard):
                if next(self.batches, None) is None:
                    break
            started, counted = time.perf_counter(), 0
            for batch in self.batches:
                counted += self.size(batch)
                if spent + time.perf_counter() - started >= seconds:
                    break
            else:
                self.batches, discard = iter(self.loader), 4
            samples += counted
            spent += time.perf_counter() - started if counted else 0.0
        return samples / spent

    def size(self, batch: Any) -> int:
        if hasattr(batch, "num_graphs"):
            return int(batch.num_graphs)
        values = batch["x"] if isinstance(batch, dict) else batch
        if values.shape[1:] != self.sample or str(values.dtype) != f"torch.{self.dtype}":
            raise TypeError(f"a batch of {values.dtype} {tuple(values.shape)}")
        return len(values)


class Server:
    """The requests of loader.py."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.write, self.load = RIVALS[name]
        graphs = folder / "source.npz"
        self.source: Any = (
            np.load(graphs) if graphs.exists() else np.load(folder / "source.npy", mmap_mode="r")
        )
        self.place = folder / name.replace(" ", "-")
        self.streams: dict[int, Stream] = {}

    def prepare(self) -> dict[str, float]:
        self.place.mkdir()
        started = time.perf_counter()
        self.write(self.source, self.place)
        seconds = time.perf_counter() - started
        size = sum(path.stat().st_size for path in self.place.rglob("*") if path.is_file())
        return {"seconds": seconds, "bytes": size}

    def start(self, workers: int, batch: int) -> None:
        loader = self.load(self.source, self.place, batch, workers)
        shape, dtype = getattr(self.source, "shape", (0,)), getattr(self.source, "dtype", "")
        self.streams[workers] = Stream(loader, tuple(shape[1:]), str(dtype), workers)

    def window(self, workers: int, seconds: float) -> float:
        return self.streams[workers].window(seconds)

    def count(self, workers: int) -> int:
        """Samples of one whole epoch."""
        stream = self.streams[workers]
        return sum(stream.size(batch) for batch in stream.loader)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    server = Server(sys.argv[1], Path(sys.argv[2]))
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(server, request.pop("do"))(**request)
        answers.write(json.dumps({"answer": answer}) + "\n")


if __name__ == "__main__":
    main()
