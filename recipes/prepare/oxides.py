"""Published energies of garnets and perovskites (Ye et al. 2018) -> a table for `dmi data import`.

    python recipes/prepare/oxides.py garnets mp_garnets_oxide_ref_152.csv garnets.csv
    python recipes/prepare/oxides.py perovskites ye_perovskite_assigned.csv perovskites.csv
    python recipes/prepare/oxides.py mixed ye_perovskite_assigned.csv mixed.csv \
        --entries perov_calc_entries.json.xz --mixed A --sites code
    dmi data import perovskites.csv --out data/perovskites --as table --split-column split

perovskites: one row a compound, the lowest of its energies. Where both ions may be on either site, the
larger is on A, and the compound is kept only if both ways were computed: else nothing says which was.
mixed: two ions in equal parts on one site, one row for each ordering. The files do not number the
orderings; they were entered into a database one after another, and count in the order of these numbers.
The smaller ion is the first. Compounds without mixing stand there with each ordering, to learn from.
--sites mean: one row a compound, its lowest energy, and the mean of the ions on a site.

Compounds fall into ten parts at random; --fold names the one that tests, and the next one validates.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas

from dmi_hpc.errors import DataError
from dmi_hpc.tasks.oxides import System, code_columns, site_columns, sites_of, smaller_first

ORDERINGS = 10  # of two ions in equal parts on one site of a perovskite
APART = 0.005  # eV/atom; entries that differ by less are of one structure
COMPOUND = ["A", "B", "A_amt", "B_amt"]
Row = dict[str, Any]


def main() -> None:
    options = _options()
    amounts = {"A_amt": str, "B_amt": str}  # "4|4": two ions in equal parts
    source = pandas.read_csv(options.source, dtype=amounts, na_filter=False)
    if options.kind == "garnets":
        rows = list(garnets(source))
    elif options.kind == "perovskites":
        rows = list(perovskites(source))
    else:
        rows = list(mixed(source, options))
    if not rows:
        sys.exit(f"{options.source}: no compounds of this kind in it")
    _split(rows, options)
    with options.out.open("x", newline="") as out:
        pandas.DataFrame(rows).to_csv(out, index=False, lineterminator="\n")
    compounds = len({row["compound"] for row in rows})
    sys.stderr.write(f"{options.out}: {len(rows)} rows of {compounds} compounds\n")


def garnets(source: pandas.DataFrame) -> Iterator[Row]:
    for given in source.to_dict("records"):
        ions = {site: str(given[site]) for site in "CAD"}
        yield from _row("garnet", None, ions, float(given["Ef_oxides_eV_per_atom"]))


def perovskites(source: pandas.DataFrame) -> Iterator[Row]:
    unmixed = source[~source["mixed"]]
    for (a, b), entries in unmixed.groupby(["A", "B"]):
        energies = entries["Ef_eV_per_atom"]
        ways = int(entries["n_cand"].iloc[0])
        if ways > 1 and energies.max() - energies.min() < APART:
            continue
        yield from _row("perovskite", None, {"A": str(a), "B": str(b)}, float(energies.min()))


def mixed(source: pandas.DataFrame, options: argparse.Namespace) -> Iterator[Row]:
    """Compounds with two ions in equal parts on one site, then those without mixing."""
    site, code = options.mixed, options.sites == "code"
    source = source.assign(entry=_numbers(source, options.entries))
    halves = {name: "4|4" if name == site else "8" for name in "AB"}
    chosen = source["mixed"] & (source["n_cand"] == 1)
    for name, amounts in halves.items():
        chosen &= source[f"{name}_amt"] == amounts
    for _, entries in source[chosen].groupby(COMPOUND):
        ordered = entries.sort_values("entry")
        if len(ordered) > ORDERINGS:
            ordered = ordered.iloc[:ORDERINGS]  # entered twice
        energies = ordered["Ef_eV_per_atom"].tolist()
        ions = {"A": str(ordered["A"].iloc[0]), "B": str(ordered["B"].iloc[0])}
        if not code:
            yield from _row("perovskite", None, ions, min(energies))
            continue
        first, second = ions.pop(site).split("|")
        ions |= {f"{site}1": first, f"{site}2": second}
        for ordering, energy in enumerate(energies):
            yield from _row("perovskite", site, ions, energy, ordering)
    for row in perovskites(source):
        if not code:
            yield {**row, "split": "train"}
            continue
        ions = {f"{s}{n}" if s == site else s: row[s] for s in "AB" for n in (1, 2)}
        for ordering in range(ORDERINGS):
            for made in _row("perovskite", site, ions, row["formation_energy"], ordering):
                yield {**made, "split": "train"}


def _numbers(source: pandas.DataFrame, path: Path) -> list[int]:
    """The number in the database of each row's entry, which has the same energy."""
    with lzma.open(path) as file:
        entries = {round(entry["energy"], 6): entry["entry_id"] for entry in json.load(file)}
    try:
        return [entries[round(energy, 6)] for energy in source["energy_eV"]]
    except KeyError as energy:
        sys.exit(f"{path}: no entry with the energy {energy} eV")


def _row(
    system: System, site: str | None, ions: dict[str, str], energy: float, ordering: int = 0
) -> Iterator[Row]:
    """One row, or none with a word why."""
    whole = {}
    if site is not None:
        shared = dict.fromkeys((ions[f"{site}1"], ions[f"{site}2"]))
        whole[site] = "|".join(shared)  # one ion if they are alike
    whole |= {name: ion for name, ion in ions.items() if name[0] != site}
    name = " ".join(f"{each}={whole[each]}" for each in sorted(whole))
    try:
        ions = smaller_first(ions, system, site)
        columns = site_columns(ions, sites_of(system, site))
    except DataError as error:
        sys.stderr.write(f"left out: {name}: {error}\n")
        return
    code = code_columns(ordering, ORDERINGS) if site is not None else {}
    yield {"compound": name, **ions, **columns, **code, "formation_energy": energy}


def _split(rows: list[Row], options: argparse.Namespace) -> None:
    """All rows of a compound in one split; rows that have one keep it."""
    compounds = sorted({row["compound"] for row in rows if "split" not in row})
    random.Random(options.seed).shuffle(compounds)
    part = {name: number % 10 for number, name in enumerate(compounds)}
    names = {options.fold: "test", (options.fold + 1) % 10: "validation"}
    for row in rows:
        row.setdefault("split", names.get(part.get(row["compound"], -1), "train"))


def _options() -> argparse.Namespace:
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=text)
    parser.add_argument("kind", choices=("garnets", "perovskites", "mixed"))
    parser.add_argument("source", type=Path, help="CSV of ions on the sites and formation energies")
    parser.add_argument("out", type=Path, help="CSV to be written; must not be there yet")
    parser.add_argument("--entries", type=Path, help="mixed: computed entries, JSON in xz")
    parser.add_argument("--mixed", choices=("A", "B"), default="A", help="mixed: the site")
    parser.add_argument(
        "--sites", choices=("code", "mean"), default="code", help="mixed: see above"
    )
    parser.add_argument("--fold", type=int, choices=range(10), default=0, help="that tests")
    parser.add_argument("--seed", type=int, default=0, help="of the parts")
    options = parser.parse_args()
    if options.kind == "mixed" and options.entries is None:
        parser.error("mixed needs --entries")
    return options


if __name__ == "__main__":
    main()
