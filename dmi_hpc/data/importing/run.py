"""The import, top to bottom: files -> source -> chunks -> parsed batches -> shards.

Memory: a shard, and a few chunks for each process. What a set holds does not depend on how many
processes parse.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
from pydantic import JsonValue, ValidationError

from dmi_hpc.data.composition import Compositions
from dmi_hpc.data.importing.arrays import ArraySource
from dmi_hpc.data.importing.files import Inputs, checksums, inputs_of, provenance_of
from dmi_hpc.data.importing.images import ImageFolder
from dmi_hpc.data.importing.molecules import Molecules
from dmi_hpc.data.importing.options import ROW, ImportOptions, Kind
from dmi_hpc.data.importing.parallel import ordered_map
from dmi_hpc.data.importing.records import Advance, Batch, Chunk, ImportReport, Source
from dmi_hpc.data.importing.structures import Structures
from dmi_hpc.data.importing.tables import CsvTable, ParquetTable
from dmi_hpc.data.manifest import (
    MANIFEST,
    SPLIT,
    BuildPlan,
    Manifest,
    SplitName,
    SplitRule,
    read_manifest,
    split_of,
)
from dmi_hpc.data.ragged import Ragged
from dmi_hpc.data.reader import ShardSet
from dmi_hpc.data.rewrite import Changes, rewrite
from dmi_hpc.data.writer import ShardWriter
from dmi_hpc.errors import DataError
from dmi_hpc.files import TEMP_PREFIX, exclusive, write_json, writing

REPORT = "import-report.json"
SHARD_BYTES = 2**28  # few files and long stripes: what parallel file systems are good at


def import_files(
    paths: Sequence[Path],
    target: Path,
    options: ImportOptions,
    progress: Advance = lambda *_: None,
) -> tuple[Manifest, ImportReport]:
    """Files or folders -> shard set `target`, and what became of each record.

    The report is written to `target`/import-report.json too. Raises DataError: input missing, of
    unknown or mixed kinds, bad records where they are not to be skipped (file and line of the first
    ten), no usable record, sources or another data set in `target`; an old set is then still there.
    """
    inputs = inputs_of(paths, options)
    _keep_sources(target, paths, inputs)
    options = _for_format(inputs, options)
    options.check_kind(inputs.kind)
    source = source_of(inputs, options)
    report = ImportReport()
    findings = source.scan()
    if findings is not None:
        source.learn(_mapped(source, source.look, findings, options, progress, "first pass"))
    _check_fields(source)
    report.notes += [*source.notes(), *inputs.notes(source.beside())]
    batches = source.collect(_checked(_parsed(source, options, progress), options, report))
    first = next((batch for batch in batches if batch.count), None)
    if first is None:
        raise DataError(
            f"{', '.join(map(str, paths))}: no usable record in {report.read}"
            + "".join(f"\n  {bad}" for bad in report.bad[:10])
        )
    plan = _plan(source, inputs, options, first, progress)
    rows = _some_train(itertools.chain([first], batches), plan, inputs.kind)
    if options.shuffle is None:
        _keep_others(target, plan, options)
        manifest = _written(target, plan, rows)
    else:
        manifest = _shuffled(target, plan, rows, options, progress)
    report.kept = manifest.rows
    report.merged = report.read - report.kept - report.skipped
    report.notes[:0] = _empty_splits(manifest, inputs.kind)
    report.duplicates += source.duplicates
    report.repeated = source.repeated
    report.across += source.across
    report.crossing = source.crossing
    with writing(target):
        write_json(target / REPORT, {"identity": manifest.identity, **report.as_json()})
    return manifest, report


def _keep_sources(target: Path, paths: Sequence[Path], inputs: Inputs) -> None:
    """No set among its own sources: they would be taken for each other, now or at the next import."""
    here = target.resolve()
    folders = [path.resolve() for path in paths if path.is_dir()]
    near = [f for f in folders if here.is_relative_to(f) or f.is_relative_to(here)]
    near += [f for f in {path.parent for path in inputs.files} if f.resolve() == here]
    if near:
        raise DataError(
            f"{target}: sources are read from {near[0]}. Write the set to a folder apart from them"
        )


def _check_fields(source: Source) -> None:
    """What fields say together is the user's; what is wrong with it is told as such."""
    try:
        rule = SplitRule(seed=0, validation=0, test=0, key=source.key)
        BuildPlan(task=source.task, rows_per_shard=1, fields=source.fields, split_rule=rule, seed=0)
    except ValidationError as error:
        raise DataError(f"fields: {error.errors()[0]['msg']}") from None


def _empty_splits(manifest: Manifest, kind: Kind) -> list[str]:
    """A share was asked for, and no row has it: there are only a few keys."""
    rule = manifest.plan.split_rule
    shares: dict[SplitName, float] = {"validation": rule.validation, "test": rule.test}
    empty = [name for name, share in shares.items() if share and not manifest.split_rows[name]]
    if not empty:
        return []
    return [f"no row is for {' or '.join(empty)} (split: {rule.key}).{_ways_out(rule, kind)}"]


def source_of(inputs: Inputs, options: ImportOptions) -> Source:
    """The source of a kind."""
    if inputs.kind == "composition":
        return Compositions(inputs.files, options)
    if inputs.kind == "molecule":
        return Molecules(inputs.files, options)
    if inputs.kind == "table":
        parquet = inputs.formats[0] == "parquet"
        return (ParquetTable if parquet else CsvTable)(inputs.files, options)
    if inputs.kind == "image":
        return ImageFolder(inputs, options)
    if inputs.kind == "structure":
        return Structures(inputs, options)
    return ArraySource(inputs.files, inputs.formats[0], options)


def _for_format(inputs: Inputs, options: ImportOptions) -> ImportOptions:
    if inputs.formats[0] == "tsv" and options.delimiter == ",":
        return options.model_copy(update={"delimiter": "\t"})
    return options


def _mapped(
    source: Source,
    function: Callable[[Chunk], object],
    chunks: Iterator[Chunk],
    options: ImportOptions,
    progress: Advance,
    phase: str,
) -> Iterator[object]:
    """function of each chunk, in order, in as many processes as are worth it."""
    done = 0

    def noted() -> Iterator[Chunk]:
        nonlocal done
        for chunk in chunks:
            done = chunk.done
            yield chunk

    for result in ordered_map(function, noted(), options.processes if source.heavy else 1):
        progress(phase, done, source.total, source.unit)
        yield result


def _parsed(source: Source, options: ImportOptions, progress: Advance) -> Iterator[Batch]:
    for batch in _mapped(source, source.parse, source.chunks(), options, progress, "import"):
        assert isinstance(batch, Batch), "what parse returns"
        yield batch


def _checked(
    batches: Iterator[Batch], options: ImportOptions, report: ImportReport
) -> Iterator[Batch]:
    """Count; where bad records are an error, look on for more of them but give no more rows."""
    for batch in batches:
        report.add_bad(batch.bad)
        report.add_remarks(batch.remarks)
        report.read += batch.count + len(batch.bad)
        if report.skipped and options.bad == "error":
            if report.gave_up:
                break
            continue
        yield batch
    if report.skipped and options.bad == "error":
        report.refuse_bad()


def _some_train(batches: Iterator[Batch], plan: BuildPlan, kind: Kind) -> Iterator[Batch]:
    """The batches. Raises DataError after the last, before the commit, if no row is for training."""
    rule, row, found = plan.split_rule, 0, False
    for batch in batches:
        if not found and SPLIT.name in batch.rows:
            splits = batch.rows[SPLIT.name]
            assert isinstance(splits, np.ndarray), "one a row"
            found = bool((splits == 0).any())
        elif not found:
            numbers = map(str, range(row, row + batch.count))
            found = any(split_of(rule.seed, n, rule.validation, rule.test) == 0 for n in numbers)
        row += batch.count
        yield batch
    if not found:
        raise DataError(
            f"no row is for training: validation and test have all {row} (split: {rule.key})."
            + _ways_out(rule, kind)
        )


def _ways_out(rule: SplitRule, kind: Kind) -> str:
    """How rows may fall to other splits."""
    if rule.key.startswith("given by"):
        return ""
    ways = f" Try another --seed or other shares (now {rule.validation:g} and {rule.test:g})"
    if kind == "composition" or rule.key == ROW:
        return ways
    return ways + f', or --group "{ROW}", which splits each row by itself'


def _plan(
    source: Source, inputs: Inputs, options: ImportOptions, first: Batch, progress: Advance
) -> BuildPlan:
    given = source.key.startswith("given by")
    others = source.beside()
    sums = checksums([*source.files, *others], progress)
    beside = {"beside": provenance_of(others, sums, inputs.root)} if others else {}
    provenance: dict[str, JsonValue] = {
        "source": "dmi data import",
        "files": provenance_of(source.files, sums, inputs.root),
        "options": options.of_kind(inputs.kind),
        **beside,
        **source.provenance(),
    }
    return BuildPlan(
        task=source.task,
        rows=None,
        rows_per_shard=options.rows_per_shard or _rows_of_a_shard(first),
        fields=source.fields,
        split_rule=SplitRule(
            seed=options.seed,
            validation=0.0 if given else options.validation,
            test=0.0 if given else options.test,
            key=source.key,
        ),
        seed=options.seed,
        compression=options.compression,
        provenance=provenance,
    )


def _rows_of_a_shard(batch: Batch) -> int:
    size = 0
    for values in batch.rows.values():
        size += (
            values.values.nbytes + 8 * len(values) if isinstance(values, Ragged) else values.nbytes
        )
    return max(1, SHARD_BYTES * batch.count // size)


def _keep_others(target: Path, plan: BuildPlan, options: ImportOptions) -> None:
    """The same import may be repeated; another set is not replaced unless that is said."""
    if options.replace or not (target / MANIFEST).exists():
        return
    found = read_manifest(target)
    if found.plan.fingerprint() != plan.fingerprint():
        here, wanted = found.plan.model_dump(mode="json"), plan.model_dump(mode="json")
        changed = ", ".join(key for key in wanted if here[key] != wanted[key])
        raise DataError(
            f"{target}: holds another data set ({found.rows} rows; it differs in {changed}). Choose "
            "another folder, or replace it with --replace."
        )


def _written(target: Path, plan: BuildPlan, batches: Iterator[Batch]) -> Manifest:
    with ShardWriter(target, plan) as writer:
        for batch in batches:
            if batch.count:
                writer.append(batch.rows)
    assert writer.manifest is not None, "the block ended without an error"
    return writer.manifest


def _shuffled(
    target: Path,
    plan: BuildPlan,
    batches: Iterator[Batch],
    options: ImportOptions,
    progress: Advance,
) -> Manifest:
    """Rows in the order of the files to a hidden set beside `target`, from there in another order.

    The hidden set needs as much space again while this runs. Its name is always the same, so that
    what a killed import leaves is overwritten and removed by the next; who holds its lock, owns it.
    """
    whole = target.resolve()
    hidden = whole.with_name(f"{TEMP_PREFIX}{whole.name}-import")
    scratch = hidden / "rows"
    with ExitStack() as held:
        held.callback(_remove_empty, hidden)
        with writing(whole.parent):
            held.enter_context(exclusive(hidden, "import"))
        held.callback(shutil.rmtree, scratch, ignore_errors=True)
        manifest = _written(scratch, plan.model_copy(update={"compression": None}), batches)
        changes = Changes(shuffle_seed=options.shuffle, compression=options.compression)
        done = 0

        def advance(rows: int) -> None:
            nonlocal done
            done += rows
            progress("shuffle", done, manifest.rows, "rows")

        processes = options.processes
        if processes == "auto":
            big = manifest.bytes > SHARD_BYTES
            processes = len(os.sched_getaffinity(0)) if big else 1
        with ShardSet.open(scratch, verify="none") as rows:
            return rewrite(rows, target, changes, processes=processes, progress=advance)


def _remove_empty(folder: Path) -> None:
    """Unless another import is at work in it already."""
    with suppress(OSError):
        folder.rmdir()
