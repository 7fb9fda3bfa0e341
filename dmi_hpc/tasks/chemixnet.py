"""CheMixNet (Paul et al. 2018, arXiv:1811.08283): a molecule's property from its SMILES and fingerprint.

Two branches, one over the characters of the SMILES and one over the bits of a fingerprint, are joined
by dense layers. The authors' code ends regressions in a sigmoid, which reaches no standardised value
outside 0 to 1; here their output is linear.
"""

from __future__ import annotations

from typing import ClassVar, Literal, cast

import numpy as np
from pydantic import Field as Option

from dmi_hpc.config import Config
from dmi_hpc.data.importing.molecules import MACCS, MORGAN, other_smiles
from dmi_hpc.data.ragged import Ragged, places_of
from dmi_hpc.errors import DataError, RecipeError
from dmi_hpc.models.space import Choice, FloatRange, Founder, NetworkSpace, SearchSpace
from dmi_hpc.models.spec import (
    Activation,
    Conv,
    Dense,
    Dropout,
    Embedding,
    Layer,
    NetworkSpec,
    Parallel,
    Pool,
    Readout,
    Recurrent,
    Take,
)
from dmi_hpc.tasks.base import Array, Fields
from dmi_hpc.tasks.molecules import Fingerprint, MoleculeOptions, MoleculeTask

_FIRST, _LAST = 33, 126  # printable characters of ASCII; they become 1, 2, ..., and padding is 0
TOKENS = _LAST - _FIRST + 2


class CheMixNetOptions(MoleculeOptions):
    """[task] of a CheMixNet recipe."""

    branches: Literal["mixed-cnn", "mixed-rnn", "cnn", "rnn", "fingerprint"] = Option(
        "mixed-cnn", description="SMILES by convolutions or LSTM, with the fingerprint or alone"
    )
    fingerprint: Fingerprint = "maccs"
    length: int = Option(128, ge=8, description="characters of the longest SMILES")
    truncate: bool = Option(
        False, description="of longer SMILES read the first characters; else they are an error"
    )
    random_smiles: bool = Option(
        False, description="train on a random one of each molecule's SMILES in each epoch"
    )
    dropout: float = Option(0.2, ge=0, lt=1)


class CheMixNet(MoleculeTask):
    Options = CheMixNetOptions
    input_fields: ClassVar[tuple[str, ...]] = ("characters", "maccs", "morgan")

    def __init__(self, name: str, options: Config) -> None:
        super().__init__(name, options)
        self.o = cast(CheMixNetOptions, options)
        bits = MACCS if self.o.fingerprint == "maccs" else MORGAN
        self._bits = bits if self._reads_bits else 0

    @property
    def _reads_bits(self) -> bool:
        return self.o.branches not in ("cnn", "rnn")

    @property
    def _reads_smiles(self) -> bool:
        return self.o.branches != "fingerprint"

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self._bits + (self.o.length if self._reads_smiles else 0),)

    def inputs(self, fields: Fields) -> Array:
        """(n, bits + length) float32: the fingerprint, then a number of each character, 0 before
        the first."""
        n = len(fields[self.o.fingerprint])
        found = np.zeros((n, *self.input_shape), dtype=np.float32)
        if self._reads_bits:
            found[:, : self._bits] = fields[self.o.fingerprint]
        if self._reads_smiles:
            self._put_tokens(found[:, self._bits :], cast(Ragged, fields["characters"]))
        return found

    def _put_tokens(self, tokens: Array, characters: Ragged) -> None:
        """The last `length` columns; what is before the sequence is padding, as in the authors' code:
        a recurrent layer ends with the molecule."""
        lengths, most = characters.lengths, self.o.length
        if lengths.max(initial=0) > most and not self.o.truncate:
            row = int(lengths.argmax())
            text = characters[row].tobytes().decode("ascii", "replace")
            raise DataError(
                f"a SMILES of {lengths[row]} characters ({text[:40]}...), this task reads {most}: set "
                f"length = {lengths[row]} or more, or truncate = true to read the first {most}"
            )
        lengths = np.minimum(lengths, most)
        rows = np.repeat(np.arange(len(lengths)), lengths)
        columns = places_of(most - lengths, lengths)
        codes = characters.values[places_of(characters.offsets[:-1], lengths)].astype(np.float32)
        if len(codes) and (codes.min() < _FIRST or codes.max() > _LAST):
            raise DataError(
                f"characters: found codes {codes.min():g} to {codes.max():g}, no SMILES"
            )
        tokens[rows, columns] = codes - (_FIRST - 1)

    def augment(self, inputs: Array, bits: Array) -> Array:
        """Each molecule by another of its SMILES; as it is where that has too many characters."""
        if not (self.o.random_smiles and self._reads_smiles):
            return inputs
        changed = inputs.copy()
        for row, seed in zip(changed[:, self._bits :], bits, strict=True):
            codes = row[row > 0].astype(np.uint8) + (_FIRST - 1)
            if len(codes) == len(row):
                continue  # truncated, or just not
            text = other_smiles(codes.tobytes().decode("ascii"), int(seed))
            if len(text) <= len(row):
                start = len(row) - len(text)
                row[:start] = 0
                row[start:] = np.frombuffer(text.encode("ascii"), np.uint8)
                row[start:] -= _FIRST - 1
        return changed

    def published_network(self) -> NetworkSpec:
        """The branches of the authors' code, and a linear output."""
        drop = (Dropout(rate=self.o.dropout),) if self.o.dropout else ()
        bits = (*_dense(512, 256), *drop, *_dense(64))
        if self.o.branches == "fingerprint":
            return NetworkSpec(input_shape=self.input_shape, layers=bits)
        embedded = Embedding(entries=TOKENS, units=32)
        smiles = (embedded, *(_RECURRENT if self.o.branches.endswith("rnn") else _CONVOLUTIONS))
        if not self._reads_bits:
            return NetworkSpec(input_shape=self.input_shape, layers=(*smiles, *drop))
        end = self.input_shape[0]
        first = (Take(start=0, stop=self._bits), *bits)
        second = (Take(start=self._bits, stop=end), *smiles)
        joined = (Parallel(branches=(first, second)), *_dense(64), *drop)
        return NetworkSpec(input_shape=self.input_shape, layers=joined)

    def space(self) -> SearchSpace:
        """Of networks on the fingerprint. Raises RecipeError for the others."""
        if self._reads_smiles:
            raise RecipeError(
                f'task.branches is "{self.o.branches}": a search knows no networks with embedded '
                'characters. Set branches = "fingerprint", or search with the task mpnn'
            )
        return SearchSpace(
            network=NetworkSpace(
                input_shape=self.input_shape,
                dense_blocks=(1, 5),
                units=(16, 32, 64, 128, 256, 512, 1024),
                norms=(None, "batch"),
                dropouts=(0.0, 0.1, 0.2, 0.3, 0.5),
            ),
            hyper={
                "learning_rate": FloatRange(low=1e-4, high=1e-2, log=True),
                "weight_decay": FloatRange(low=1e-6, high=1e-1, log=True),
                "batch_size": Choice(values=(16, 32, 64, 128), ordered=True),
            },
            founders=(Founder(name="CheMixNet", network=self.published_network()),),
        )


def _dense(*units: int) -> tuple[Layer, ...]:
    return tuple(layer for n in units for layer in (Dense(units=n), Activation()))


_CONVOLUTIONS: tuple[Layer, ...] = (
    *2 * (Conv(filters=32, kernel=3), Activation(), Pool(size=2)),
    Readout(),
    *_dense(64),
)
_RECURRENT: tuple[Layer, ...] = (
    *(Conv(filters=32, kernel=3), Activation(), Pool(size=2)),
    Recurrent(cell="lstm", units=64),
    Recurrent(cell="lstm", units=64, last=True),
)
