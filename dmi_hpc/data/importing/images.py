"""Folders of images: PNG and TIFF, with classes, splits, masks or a table of labels."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import JsonValue

from dmi_hpc.data.importing.files import Inputs
from dmi_hpc.data.importing.labels import Labels, labels_of, names_of
from dmi_hpc.data.importing.optional import library, readable
from dmi_hpc.data.importing.options import ImportOptions
from dmi_hpc.data.importing.records import BadRecord, Batch, Chunk, PlainSource
from dmi_hpc.data.importing.rows import Splits, good_rows, with_split
from dmi_hpc.data.importing.values import Problems, from_texts
from dmi_hpc.data.manifest import Field
from dmi_hpc.data.ragged import Ragged
from dmi_hpc.errors import DataError

Array = np.ndarray[Any, np.dtype[Any]]

_PER_CHUNK = 8
_MOST_PIXELS = 2**31  # of a TIFF; Pillow has a limit of its own
_TYPES = ("uint8", "uint16", "float32")
SPLIT_FOLDERS = ("train", "training", "validation", "val", "valid", "test", "testing")
_MASKS = re.compile(r"(^|_)(masks?|annot|annotations?|labels?|gt|segmentations?)$", re.I)
_MODES = {"1": "L", "P": "RGB", "PA": "RGBA"}  # of images; masks keep the numbers of a palette


class ImageFolder(PlainSource):
    """`image` (channels, height, width), and per image a name, a class, a mask, labels."""

    task = "image"
    unit = "images"

    def __init__(self, inputs: Inputs, options: ImportOptions) -> None:
        super().__init__()
        self.root = inputs.root
        self.masks = _Masks(options.masks, inputs.root) if options.masks else None
        self.files = tuple(f for f in inputs.files if self.masks is None or self.masks.image(f))
        if not self.files:
            raise DataError(f"{inputs.root}: no images besides the masks")
        self.labels: Labels | None = labels_of(inputs.root, options)
        if self.labels is not None:
            self.labels.check(self.files, self.root)
        self.longest = max(len(self._name(file).encode()) for file in self.files)
        folders = [self._parts(file) for file in self.files]
        self.split_folders = self._split_by(folders)
        self.classes = self._classes(folders)
        by_folder = self.split_folders and options.group is None
        given = options.split_column or ("folder" if by_folder else None)
        self.decides = options.split_column or options.group_column
        columns = self.labels.columns if self.labels else ()
        if self.decides is not None and self.decides not in columns:
            raise DataError(f"{self.decides!r} is to decide the split, but no --labels have it")
        self.splits = Splits(options, given)
        if given or self.decides:
            self.key = self.splits.rule.key or f"text of column {self.decides!r}"
        self.shape, self.dtype = self._first(read_image)
        self.mask_dtype = self._first(self._mask)[1] if self.masks else None

    @property
    def total(self) -> int:
        return len(self.files)

    def _parts(self, file: Path) -> tuple[str, ...]:
        """Folders between the root and a file."""
        return file.relative_to(self.root).parent.parts if self.root else ()

    def _split_by(self, folders: Sequence[tuple[str, ...]]) -> bool:
        """Whether the outer folders are train, validation and test."""
        outer = sorted({f[0] if f else "." for f in folders})
        others = [name for name in outer if name.lower() not in SPLIT_FOLDERS]
        if others and any(name.lower().startswith("train") for name in outer):
            raise DataError(
                f"{self.root}: expected all images in folders of splits ({', '.join(SPLIT_FOLDERS)}) "
                f"or none, found {', '.join(outer)}"
            )
        return not others

    def _classes(self, folders: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
        """Names of classes: of the folders that images lie in, if there are several."""
        names = {"/".join(f[1:] if self.split_folders else f) for f in folders}
        if self.masks or names == {""} or len(names) == 1:
            return ()
        self._refuse_masks()
        if "" in names:
            raise DataError(
                f"{self.root}: some images lie in folders, others beside them: expected a folder "
                "for each class, or none"
            )
        return tuple(sorted(names))

    def _refuse_masks(self) -> None:
        """A folder called masks, with an image elsewhere for each of its files, is no class."""
        stems: dict[Path, set[str]] = {}
        for file in self.files:
            stems.setdefault(file.parent, set()).add(file.stem)
        for folder, own in stems.items():
            others = set().union(*(names for other, names in stems.items() if other != folder))
            bare = {stem.removesuffix("_mask") for stem in own}
            if _MASKS.search(folder.name) and bare <= others:
                raise DataError(
                    f"{folder}: looks like masks of the other images: say --masks {folder.name} (or "
                    "the ending of such folders, as in --masks _annot). If it is a class, rename it"
                )

    def _first(self, read: Any) -> tuple[tuple[int, ...], str]:
        """Shape and type of the first image that can be read: those of the whole set."""
        reason = ""
        for file in self.files:
            try:
                found = read(file)
            except DataError as error:
                reason = reason or f"{file}: {error}"
                continue
            return found.shape, found.dtype.name
        raise DataError(f"no image can be read, or no mask, of {len(self.files)}; first {reason}")

    @property
    def fields(self) -> tuple[Field, ...]:
        found = [
            Field(
                name="image",
                dtype=self.dtype,
                shape=self.shape,
                unit="",
                description="channels, height, width",
            ),
            Field(name="name", dtype=f"S{self.longest}", unit="", description="of the file"),
        ]
        if self.masks is not None and self.mask_dtype is not None:
            about = "class of each pixel, as in the file"
            shape = self.shape[1:]
            found.append(
                Field(name="mask", dtype=self.mask_dtype, shape=shape, unit="", description=about)
            )
        if self.classes:
            about = "index into provenance.classes (names of the folders, sorted)"
            found.append(Field(name="label", dtype="uint16", unit="", description=about))
        if self.labels is not None:
            found += [column.field for column in self.labels.fields]
        return tuple(found)

    def provenance(self) -> Mapping[str, JsonValue]:
        return {"classes": list(self.classes)} if self.classes else {}

    def notes(self) -> Sequence[str]:
        return self.labels.notes(self.files, self.root) if self.labels else ()

    def beside(self) -> Sequence[Path]:
        """The masks that there are, and the labels."""
        found = [self.labels.path] if self.labels else []
        if self.masks is not None:
            found += [mask for file in self.files if (mask := self.masks.find(file))]
        return found

    def _name(self, file: Path) -> str:
        return file.relative_to(self.root).as_posix() if self.root else file.name

    def chunks(self) -> Iterator[Chunk]:
        for start in range(0, len(self.files), _PER_CHUNK):
            files = self.files[start : start + _PER_CHUNK]
            yield Chunk(files, start + len(files))

    def parse(self, chunk: Chunk) -> Batch:
        rows: list[dict[str, Any]] = []
        bad: list[BadRecord] = []
        for file in chunk.payload:
            try:
                rows.append(self._row(file))
            except DataError as error:
                bad.append(BadRecord(str(file), str(error)))
        if not rows:
            return Batch({}, tuple(bad))
        columns: dict[str, Array | Ragged] = {}
        problems: dict[str, Problems] = {}
        labelled = {c.name: c for c in self.labels.fields} if self.labels else {}
        for field in self.fields:
            if field.name in labelled:
                source = labelled[field.name].source
                cells = [row["labels"][source] for row in rows]
                columns[field.name], problems[source] = from_texts(field, cells)
            else:
                columns[field.name] = np.stack([row[field.name] for row in rows]).astype(
                    field.numpy
                )
        if self.decides is not None:
            with_split(columns, problems, self.splits, [r["labels"][self.decides] for r in rows])
        elif self.splits.given:
            folders = [self._parts(row["file"])[0] for row in rows]
            with_split(columns, problems, self.splits, folders)
        return good_rows(columns, problems, lambda row: str(rows[row]["file"]), bad)

    def _row(self, file: Path) -> dict[str, Any]:
        image = read_image(file)
        if (image.shape, image.dtype.name) != (self.shape, self.dtype):
            raise DataError(
                f"expected {self.dtype} {self.shape} (channels, height, width) as of the first "
                f"image, found {image.dtype} {image.shape}"
            )
        row: dict[str, Any] = {"file": file, "image": image, "name": self._name(file).encode()}
        if self.masks is not None:
            row["mask"] = self._mask(file)
            if row["mask"].dtype.name != self.mask_dtype or row["mask"].shape != self.shape[1:]:
                raise DataError(
                    f"mask: expected {self.mask_dtype} {self.shape[1:]}, found "
                    f"{row['mask'].dtype} {row['mask'].shape}"
                )
        if self.classes:
            parts = self._parts(file)
            row["label"] = self.classes.index("/".join(parts[1:] if self.split_folders else parts))
        if self.labels is not None:
            row["labels"] = self.labels.of(names_of(file, self.root))
            if row["labels"] is None:
                raise DataError(f"not in {self.labels.path}")
        return row

    def _mask(self, file: Path) -> Array:
        """(height, width) of an image's mask."""
        assert self.masks is not None, "asked for with masks only"
        found = read_image(self.masks.of(file), palette=True)
        if len(found) != 1 or found.dtype.kind != "u":
            raise DataError(f"mask: expected one channel of integers, found {found.shape}")
        return np.asarray(found[0])


class _Masks:
    """Where the mask of an image lies: the same stem, or stem_mask, in the folder of masks."""

    def __init__(self, said: str, root: Path | None) -> None:
        """said: a folder laid out as the images are, or what their folders' names end in."""
        self.suffix = said if said.startswith("_") else ""
        self.root = root
        self.folder = Path(said)
        if not self.suffix and not self.folder.is_dir():
            self.folder = (root or Path()) / said
            if not self.folder.is_dir():
                raise DataError(
                    f"--masks {said}: no such folder; expected one, or what the names of folders of "
                    "masks end in, such as _annot for train/ and train_annot/"
                )

    def image(self, file: Path) -> bool:
        """A file that is no mask itself."""
        if self.suffix:
            return not file.parent.name.endswith(self.suffix)
        return self.folder.resolve() not in file.resolve().parents

    def of(self, file: Path) -> Path:
        """Raises DataError if there is none."""
        if (found := self.find(file)) is None:
            raise DataError(f"no mask called {file.stem} or {file.stem}_mask")
        return found

    def find(self, file: Path) -> Path | None:
        if self.suffix:
            folder = file.parent.with_name(file.parent.name + self.suffix)
        else:
            inside = file.relative_to(self.root).parent if self.root else Path()
            folder = self.folder / inside
            if not folder.is_dir() and inside.parts:  # images/a.png has masks/a.png
                folder = self.folder.joinpath(*inside.parts[1:])
        for stem in (file.stem, f"{file.stem}_mask"):
            for suffix in (file.suffix, ".png", ".tif", ".tiff"):
                if (mask := folder / f"{stem}{suffix}").is_file():
                    return mask
        return None


def read_image(file: Path, *, palette: bool = False) -> Array:
    """(channels, height, width) uint8, uint16 or float32. palette: numbers instead of colours.

    Pages of a TIFF are channels. Raises DataError.
    """
    with readable("not a readable image"), warnings.catch_warnings(action="ignore"):
        tiff = file.suffix.lower() in (".tif", ".tiff")
        found = _read_tiff(file) if tiff else _read_png(file, palette)
    if found.dtype.name not in _TYPES:
        raise DataError(f"expected {', '.join(_TYPES)}, found {found.dtype}")
    if found.dtype.kind == "f" and not np.isfinite(found).all():
        raise DataError("has values that are not finite")
    return np.ascontiguousarray(found.astype(found.dtype.newbyteorder("=")))


def _read_png(file: Path, palette: bool) -> Array:
    image_library = library("PIL.Image", "images")
    with file.open("rb") as stream:
        head = stream.read(26)
    if head[24:25] == b"\x10" and head[25] in (2, 4, 6):
        raise DataError(
            "16 bits a channel and several channels: Pillow reads only 8 of them. Save it as TIFF."
        )
    try:
        with image_library.open(file) as image:
            mode = "L" if palette and image.mode == "1" else _MODES.get(image.mode, image.mode)
            keep = palette and image.mode == "P"
            pixels = np.asarray(image if keep else image.convert(mode))
    except image_library.DecompressionBombError as error:
        raise DataError(str(error)) from None
    if mode == "I":  # 16-bit greys, as some versions of Pillow open them
        pixels = pixels.astype(np.uint16)
    return pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)


def _read_tiff(file: Path) -> Array:
    tifffile = library("tifffile", "TIFF images")
    with tifffile.TiffFile(file) as tiff:
        if len(tiff.series) != 1:
            raise DataError(f"holds {len(tiff.series)} series of images, expected one")
        if math.prod(tiff.series[0].shape) > _MOST_PIXELS:
            raise DataError(f"declares {tiff.series[0].shape} pixels: too many, or damaged")
        pixels, axes = np.asarray(tiff.series[0].asarray()), tiff.series[0].axes
    if pixels.ndim == 3 and axes.endswith("S"):
        return np.moveaxis(pixels, -1, 0)
    if pixels.ndim not in (2, 3):
        raise DataError(f"expected 2 or 3 axes, found {pixels.ndim} ({axes})")
    if pixels.dtype == np.bool_:
        pixels = pixels.astype(np.uint8)
    return pixels[None] if pixels.ndim == 2 else pixels
