"""Networks that leave: safetensors with a JSON spec, torch.export or ONNX; checked when written.

An exported folder holds the network in one file, what it is of (model.json), and README.txt.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import logging
import platform
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
import xxhash
from pydantic import ValidationError
from torch import Tensor, nn

from dmi_hpc.checkpoint import load_weights
from dmi_hpc.config import Config
from dmi_hpc.errors import CheckpointError, DataError, FormatVersionError, RunError
from dmi_hpc.files import atomic_folder, write_json, write_text
from dmi_hpc.models.build import build
from dmi_hpc.models.graphs import Inputs, nominal_graphs, values_of
from dmi_hpc.models.spec import NetworkSpec
from dmi_hpc.run import versions
from dmi_hpc.targets import Scale, TargetScale
from dmi_hpc.tasks.base import Array

if TYPE_CHECKING:
    from dmi_hpc.predict import Model

Format = Literal["safetensors", "torch", "onnx"]
FORMATS: tuple[Format, ...] = get_args(Format)
SPEC = "model.json"
FORMAT_VERSION = 1
FILES: Mapping[Format, str] = {
    "safetensors": "weights.safetensors",
    "torch": "model.pt2",
    "onnx": "model.onnx",
}
_TRACED_ROWS, _CHECKED_ROWS = 2, 3  # differ: the number of rows must not be built in
_ONE_FILE = 2**30  # bytes; protobuf holds 2 GiB, larger weights go to model.onnx.data beside it
_TOLERANCE = 1e-4  # of float32 sums in another order, relative


class Export(Config):
    """What an exported folder holds. `xxh3`: of `file`, xxh3_128."""

    format: Literal["dmi-export"] = "dmi-export"
    version: int = FORMAT_VERSION
    kind: Format
    file: str
    xxh3: str
    network: NetworkSpec
    scale: Scale
    task: Mapping[str, Any]
    quantity: str
    unit: str
    input_fields: tuple[str, ...]
    data: str
    checkpoint: str
    metrics: Mapping[str, float]
    versions: Mapping[str, str]


class InFieldUnits(nn.Module):
    """A network whose outputs are in the quantity's unit: (n, *input_shape) float32 -> (n,), or (n, k)
    of k quantities, or of the probabilities of k classes."""

    def __init__(self, network: nn.Module, scale: Scale) -> None:
        super().__init__()
        self.network, self.scale = network, scale

    def forward(self, inputs: Tensor) -> Tensor:
        output, heads = values_of(self.network(inputs)), self.scale.heads
        if len(heads) == 1:
            return _in_field_units(output, heads[0])
        return torch.stack([_in_field_units(output[:, k], h) for k, h in enumerate(heads)], dim=1)


def _in_field_units(values: Tensor, scale: TargetScale) -> Tensor:
    """`TargetScale.unscale`, of tensors."""
    match scale.transform:
        case "identity":
            return values * scale.std + scale.mean
        case "log":
            return torch.exp(values * scale.std + scale.mean)
        case "logit":
            return torch.sigmoid(values)
        case "category":
            return torch.softmax(values, dim=-1)


def export(model: Model, out: Path, kind: Format) -> Export:
    """Write `model` to the new folder `out` and check it there: whole and right, or absent.

    Raises RunError if `out` is not empty, DataError without the libraries of ONNX, CheckpointError
    if what was written does not predict the same as the model.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out}: expected a new or empty folder; choose another --out")
    if kind != "safetensors" and model.network.graph is not None:
        raise RunError(
            f"a network of graphs cannot be exported as {kind} yet: choose safetensors, which DMI-HPC "
            "reads back, or use the checkpoint"
        )
    network = copy.deepcopy(model.module).cpu().eval()
    with atomic_folder(out) as folder:
        path = folder / FILES[kind]
        _WRITE[kind](network, model, path)
        task, quantity = model.task, model.task.quantity
        spec = Export(
            kind=kind,
            file=path.name,
            xxh3=xxhash.xxh3_128_hexdigest(path.read_bytes()),
            network=model.network,
            scale=model.scale,
            task=task.recipe_options(),
            quantity=quantity.name,
            unit=quantity.unit,
            input_fields=task.input_fields,
            data=model.data,
            checkpoint=model.checkpoint,
            metrics=model.metrics,
            versions={"python": platform.python_version(), **versions()},
        )
        write_json(folder / SPEC, spec.model_dump(mode="json"))
        write_text(folder / "README.txt", _readme(spec, model))
        _check(network, model, folder, spec)
    return spec


def _example(model: Model, rows: int) -> Inputs:
    if model.network.graph is not None:
        return nominal_graphs(model.network, rows)
    generator = torch.Generator().manual_seed(0)
    # not negative: some networks read whole numbers from their inputs
    return torch.rand(rows, *model.network.input_shape, generator=generator)


def _safetensors(network: nn.Module, model: Model, path: Path) -> None:
    from safetensors.torch import save

    path.write_bytes(save({name: t.contiguous() for name, t in network.state_dict().items()}))


def _program(network: nn.Module, model: Model) -> torch.export.ExportedProgram:
    """The network as a graph for any number of rows."""
    rows = torch.export.Dim("rows", min=1, max=2**31 - 1)
    with warnings.catch_warnings():
        # GRU and LSTM hold their weights in a list, too
        warnings.filterwarnings("ignore", r".*_flat_weights", UserWarning)
        return torch.export.export(
            InFieldUnits(network, model.scale),
            (_example(model, _TRACED_ROWS),),
            dynamic_shapes={"inputs": {0: rows}},
        )


def _torch(network: nn.Module, model: Model, path: Path) -> None:
    torch.export.save(_program(network, model), path)


def _onnx(network: nn.Module, model: Model, path: Path) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        _onnx_library(name)
    with _quiet():
        program = torch.onnx.export(
            _program(network, model),
            input_names=["inputs"],
            output_names=["prediction"],
            dynamo=True,
            verbose=False,
        )
    assert program is not None, "the dynamo exporter returns its program"
    size = sum(tensor.nbytes for tensor in network.state_dict().values())
    program.save(path, external_data=size > _ONE_FILE)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of torchvision, which we do not use, and of torch itself."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r".*treespec, LeafSpec", FutureWarning)
            yield
    finally:
        logger.setLevel(before)


def _onnx_library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(
            f"--format onnx needs {name} ({error}): pip install 'dmi-hpc[onnx]'"
        ) from None


_WRITE: Mapping[Format, Callable[[nn.Module, Model, Path], None]] = {
    "safetensors": _safetensors,
    "torch": _torch,
    "onnx": _onnx,
}


def _check(network: nn.Module, model: Model, folder: Path, spec: Export) -> None:
    """Raises CheckpointError unless the file, read back, predicts the same for random inputs."""
    inputs = _example(model, _CHECKED_ROWS)
    with torch.no_grad():
        wanted = model.scale.unscale(values_of(network(inputs)).numpy())
    found = _OUTPUTS[spec.kind](folder, inputs)
    spread = max(head.unit for head in model.scale.heads)
    if found.shape != wanted.shape or not np.allclose(
        found, wanted, rtol=_TOLERANCE, atol=_TOLERANCE * spread
    ):
        raise CheckpointError(
            f"{spec.file}: read back it predicts {found.tolist()} {spec.unit}, expected "
            f"{wanted.tolist()}: this network cannot be exported as {spec.kind}; nothing was written"
        )


def _safetensors_outputs(folder: Path, inputs: Tensor) -> Array:
    spec, module = load_export(folder)
    with torch.no_grad():
        return np.asarray(InFieldUnits(module.eval(), spec.scale)(inputs).numpy())


def _torch_outputs(folder: Path, inputs: Tensor) -> Array:
    program = torch.export.load(folder / FILES["torch"])
    with torch.no_grad():
        return np.asarray(program.module()(inputs).numpy())


def _onnx_outputs(folder: Path, inputs: Tensor) -> Array:
    session = _onnx_library("onnxruntime").InferenceSession(
        folder / FILES["onnx"], providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(["prediction"], {"inputs": inputs.numpy()})[0])


_OUTPUTS: Mapping[Format, Callable[[Path, Any], Array]] = {
    "safetensors": _safetensors_outputs,
    "torch": _torch_outputs,
    "onnx": _onnx_outputs,
}


def load_export(folder: Path) -> tuple[Export, nn.Module]:
    """(spec, bare network with its weights) of a folder exported as safetensors.

    The network's outputs are in scaled units: `spec.scale.unscale` gives the quantity. Raises
    CheckpointError if the folder is damaged, RunError if it is of another format.
    """
    spec = read_spec(folder)
    if spec.kind != "safetensors":
        raise RunError(
            f"{folder}: exported as {spec.kind}, expected safetensors; its README.txt says how "
            f"{spec.file} is used"
        )
    path = folder / spec.file
    try:
        found = xxhash.xxh3_128_hexdigest(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if found != spec.xxh3:
        raise CheckpointError(f"{path}: checksum {found}, expected {spec.xxh3}; export it again")
    module = build(spec.network)
    load_weights(folder, module)
    return spec, module


def read_spec(folder: Path) -> Export:
    """What an exported folder says it is. Raises CheckpointError, FormatVersionError."""
    try:
        raw = json.loads((folder / SPEC).read_text())
        version = raw.get("version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise FormatVersionError(
                f"{folder}: export format {version}, this DMI-HPC reads up to {FORMAT_VERSION}"
            )
        return Export.model_validate(raw)
    except (OSError, json.JSONDecodeError, AttributeError, ValidationError) as error:
        raise CheckpointError(f"{folder / SPEC}: not an exported network: {error}") from None


_CALL: Mapping[Format, str] = {
    "safetensors": """\
from dmi_hpc import load
model = load("FOLDER")
model.predict({{{fields}}})    # (n,) in {unit}; it prepares the inputs, too

Without DMI-HPC: weights.safetensors holds the tensors, named as in a torch.nn.Sequential of the
layers in model.json and a last linear one (standardize.mean and .std: of inputs, before it); of its
output y, prediction = {unscaled}""",
    "torch": """\
import torch
network = torch.export.load("FOLDER/model.pt2").module()
network(inputs)    # inputs: a torch.float32 tensor; result: (n,) in {unit}""",
    "onnx": """\
import onnxruntime
session = onnxruntime.InferenceSession("FOLDER/model.onnx")
session.run(["prediction"], {{"inputs": inputs}})[0]    # numpy float32; result: (n,) in {unit}""",
}


def _formula(scale: TargetScale) -> str:
    scaled = f"y * {scale.std!r} + {scale.mean!r}"
    formulas = {"log": f"exp({scaled})", "logit": "1 / (1 + exp(-y))", "category": "softmax(y)"}
    return formulas.get(scale.transform, scaled)


def _readme(spec: Export, model: Model) -> str:
    unit = spec.unit or "no unit"
    each = [_formula(head) for head in spec.scale.heads]
    call = _CALL[spec.kind].format(
        fields=", ".join(f'"{name}": ...' for name in spec.input_fields),
        unit=unit,
        unscaled=each[0] if len(each) == 1 else f"[{', '.join(each)}] of its numbers y",
    )
    preparation = inspect.getdoc(type(model.task).inputs) or "see the task"
    shape = f"float32, ({', '.join(map(str, ('n', *spec.network.input_shape)))})"
    if spec.network.graph is not None:
        shape = "dmi_hpc.models.graphs.Graphs of n graphs"
    return f"""\
{spec.quantity} ({unit}), predicted by a network of task {spec.task["name"]}.
DMI-HPC {spec.versions["dmi-hpc"]}, checkpoint {spec.checkpoint}, data set {spec.data or "not recorded"}.

Inputs of the network: {shape}, any n.
The task makes them from {", ".join(spec.input_fields)}; that step is not in the network:
{textwrap.indent(preparation, "    ")}

Use (FOLDER stands for this folder):
{textwrap.indent(call, "    ")}

model.json: layers, scale of the target, options of the task, identity of the training data, errors on
the validation split, versions of the software, checksum of {spec.file}.
"""
