import os
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from dmi_hpc.data.importing.images import read_image
from dmi_hpc.data.importing.options import ImportOptions
from dmi_hpc.data.importing.run import import_files
from dmi_hpc.data.reader import ShardSet
from dmi_hpc.errors import DataError

RNG = np.random.default_rng(0)


def grey(shape=(6, 5), dtype=np.uint8):
    return RNG.integers(0, 200, shape).astype(dtype)


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        Image.fromarray(pixels).save(path)
    else:
        tifffile.imwrite(path, pixels)
    return pixels


def run(tmp_path, **options):
    folder = tmp_path / "images"
    return import_files([folder], tmp_path / "set", ImportOptions(**options))


def rows(tmp_path, name, split="all"):
    with ShardSet.open(tmp_path / "set") as shards:
        return shards.gather(name, shards.rows(split))


def by_name(tmp_path, field):
    names = [name.decode() for name in rows(tmp_path, "name")]
    return dict(zip(names, rows(tmp_path, field), strict=True))


def test_classes_are_folders(tmp_path):
    pixels = {
        f"{kind}/ü{i}.png": save(tmp_path / "images" / kind / f"ü{i}.png", grey())
        for kind in ("pearlite", "ferrite")
        for i in range(10)
    }
    manifest, report = run(tmp_path, seed=1)
    assert report.kept == 20
    assert manifest.field("image").shape == (1, 6, 5)
    assert manifest.plan.provenance["classes"] == ["ferrite", "pearlite"]
    images, labels = by_name(tmp_path, "image"), by_name(tmp_path, "label")
    assert set(images) == set(pixels)
    for name, image in images.items():
        assert np.array_equal(image[0], pixels[name])
        assert labels[name] == name.startswith("pearlite")


def test_folders_of_splits_decide(tmp_path):
    for split, count in (("train", 3), ("val", 2), ("test", 1)):
        for i in range(count):
            save(tmp_path / "images" / split / f"{'ab'[i % 2]}" / f"{i}.png", grey())
    manifest, _ = run(tmp_path)
    assert dict(manifest.split_rows) == {"train": 3, "validation": 2, "test": 1}
    assert manifest.plan.provenance["classes"] == ["a", "b"]
    assert sorted(rows(tmp_path, "name", "validation").tolist()) == [b"val/a/0.png", b"val/b/1.png"]
    save(tmp_path / "images" / "more" / "a" / "0.png", grey())
    with pytest.raises(DataError, match=r"folders of splits .*found more, test, train, val"):
        run(tmp_path, replace=True)


@pytest.mark.parametrize("where", ["_annot", "masks"])
def test_masks_of_the_same_stem(tmp_path, where):
    masks = {}
    for split in ("train", "test"):
        folder = f"{split}_annot" if where == "_annot" else f"masks/{split}"
        for i in range(3):
            save(tmp_path / "images" / split / f"{i}.png", grey())
            name = f"{i}_mask.png" if i else f"{i}.png"
            masks[f"{split}/{i}.png"] = save(tmp_path / "images" / folder / name, grey() % 3)
    manifest, report = run(tmp_path, masks=where)
    assert (report.kept, manifest.split_rows["test"]) == (6, 3)
    for name, mask in by_name(tmp_path, "mask").items():
        assert np.array_equal(mask, masks[name])
    save(tmp_path / "images" / "train" / "9.png", grey())
    save(tmp_path / "images" / "train" / "8.png", grey())
    lone = tmp_path / "images" / ("train_annot" if where == "_annot" else "masks/train") / "8.png"
    save(lone, grey((2, 2)))
    _, report = run(tmp_path, masks=where, bad="skip", replace=True)
    assert [bad.reason for bad in report.bad] == [
        "mask: expected uint8 (6, 5), found uint8 (2, 2)",
        "no mask called 9 or 9_mask",
    ]


def test_labels_from_a_table(tmp_path):
    for i in range(4):
        save(tmp_path / "images" / f"{i}.tif", grey(dtype=np.uint16))
    labels = tmp_path / "labels.csv"
    labels.write_text(
        "file,strength,batch,part\n0.tif,1.5,x,train\n1,2.5,yy,test\n2,3.5,x,val\n7,0,,\n"
    )
    _, report = run(tmp_path, labels=labels, bad="skip", split_column="part")
    assert [bad.reason for bad in report.bad] == [f"not in {labels}"]
    assert report.notes == [f"{labels}: 1 row without a file of that name (7)"]
    assert by_name(tmp_path, "strength") == {"0.tif": 1.5, "1.tif": 2.5, "2.tif": 3.5}
    assert by_name(tmp_path, "batch") == {"0.tif": b"x", "1.tif": b"yy", "2.tif": b"x"}
    assert rows(tmp_path, "name", "test").tolist() == [b"1.tif"]
    assert rows(tmp_path, "image").dtype == np.uint16


def test_images_that_differ_are_bad_records(tmp_path):
    folder = tmp_path / "images"
    save(folder / "a.png", grey())
    save(folder / "b.png", grey((6, 4)))
    save(folder / "c.png", grey((6, 5, 3)))
    save(folder / "d.tif", grey(dtype=np.uint16))
    (folder / "e.png").write_bytes((folder / "a.png").read_bytes()[:60])
    (folder / "f.tif").write_bytes(b"II*\0nonsense")
    save(folder / "g.png", grey())
    _, report = run(tmp_path, bad="skip")
    found = {Path(bad.where).name: bad.reason for bad in report.bad}
    assert (report.kept, len(found)) == (2, 5)
    assert "expected uint8 (1, 6, 5)" in found["b.png"]
    assert "found uint8 (3, 6, 5)" in found["c.png"]
    assert "found uint16 (1, 6, 5)" in found["d.tif"]
    assert "not a readable image" in found["e.png"]
    assert "holds 0 series of images" in found["f.tif"]
    with pytest.raises(DataError, match=r"5 records(.|\n)*b\.png: expected uint8"):
        run(tmp_path)


def test_pixels_of_every_type(tmp_path):
    colour = grey((6, 5, 3))
    save(tmp_path / "c.png", colour)
    assert np.array_equal(read_image(tmp_path / "c.png"), np.moveaxis(colour, -1, 0))
    deep = grey(dtype=np.uint16) * 300
    save(tmp_path / "d.png", deep)
    found = read_image(tmp_path / "d.png")
    assert found.dtype == np.uint16
    assert np.array_equal(found[0], deep)
    for pixels in (RNG.random((4, 3)).astype(np.float32), RNG.random((4, 3)).astype(">f4")):
        save(tmp_path / "f.tif", pixels)
        assert np.array_equal(read_image(tmp_path / "f.tif")[0], pixels)
    stack = grey((7, 4, 3))
    tifffile.imwrite(tmp_path / "s.tif", stack, photometric="minisblack")
    assert np.array_equal(read_image(tmp_path / "s.tif"), stack)
    tifffile.imwrite(tmp_path / "rgb.tif", grey((7, 4, 3)), photometric="rgb")
    assert read_image(tmp_path / "rgb.tif").shape == (3, 7, 4)
    Image.fromarray(grey() % 2 * 255).convert("1").save(tmp_path / "1.png")
    assert read_image(tmp_path / "1.png").shape == (1, 6, 5)
    palette = Image.fromarray(grey() % 4).convert("P")
    palette.save(tmp_path / "p.png")
    assert read_image(tmp_path / "p.png").shape == (3, 6, 5)
    assert np.array_equal(read_image(tmp_path / "p.png", palette=True)[0], np.asarray(palette))
    tifffile.imwrite(tmp_path / "f8.tif", RNG.random((4, 3)))
    with pytest.raises(DataError, match="expected uint8, uint16, float32, found float64"):
        read_image(tmp_path / "f8.tif")
    tifffile.imwrite(tmp_path / "nan.tif", np.full((4, 3), np.nan, dtype=np.float32))
    with pytest.raises(DataError, match="not finite"):
        read_image(tmp_path / "nan.tif")


def test_deep_colours_of_png_are_not_cut_to_8_bits(tmp_path):
    import struct
    import zlib

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    raw = zlib.compress(b"\0" + bytes(range(6)))
    path = tmp_path / "deep.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", raw) + chunk(b"IEND", b"")
    )
    with pytest.raises(DataError, match="16 bits a channel"):
        read_image(path)


def test_annotated_micrographs(tmp_path):
    default = Path(__file__).parents[2].parent / "shared" / "data"
    folder = Path(os.environ.get("DMI_TEST_DATA", default)) / "segmentation" / "Super1"
    if not folder.is_dir():
        pytest.skip(f"real data not at hand: {folder}")
    manifest, report = import_files([folder], tmp_path / "set", ImportOptions(masks="_annot"))
    assert dict(manifest.split_rows) == {"train": 10, "validation": 4, "test": 4}
    assert manifest.field("image").shape == (1, 512, 512)
    assert set(np.unique(rows(tmp_path, "mask"))) == {0, 1, 2}
    assert report.bad == []
