"""What the others do that this reader does not: read in their documentation and source."""

from __future__ import annotations

from loading.report import markdown

ABSENT = (
    (
        "WebDataset 1.0",
        "Shards straight from HTTP, object stores and pipes. Samples of any files (JPEG, JSON, "
        "pickle, ...), decoded by Python one by one. Plain tar, which any program writes and reads. "
        "Mixing of sets with probabilities (RandomMix), resampling with replacement.",
    ),
    (
        "MosaicML streaming 0.13",
        "Shards downloaded while training from S3, GCS, OCI, Azure, Databricks, Hugging Face, SFTP, "
        "into a cache of limited size. Several streams mixed by proportion, or one stream a batch. "
        "JPEG, PNG, JSON and pickled columns, other ones to be registered. One batch for several "
        "devices (replication). A simulator of downloads and shuffle quality.",
    ),
    (
        "LitData 0.2.76",
        "Chunks from S3, GCS, Azure, R2, Hugging Face, into a cache of limited size; Parquet and raw "
        "files as they are. Sets mixed with weights, or read side by side. Any Python object as a "
        "sample, transforms of each. Encryption, token blocks, temporal windows, appending to a set.",
    ),
    (
        "DataLoader + h5py",
        "Any HDF5 file as it is: groups, chunks, filters, variable-length types. Any Python code for a "
        "sample, any sampler (weighted, balanced).",
    ),
    (
        "PyG 2.8",
        "Heterogeneous and temporal graphs, samples of neighbours in one large graph, batches of a "
        "limited number of nodes or edges (DynamicBatchSampler), Python transforms of each graph, "
        "sets on disk in SQLite or RocksDB (OnDiskDataset).",
    ),
)


def absent() -> str:
    return markdown(("loader", "does what this reader does not"), ABSENT)
