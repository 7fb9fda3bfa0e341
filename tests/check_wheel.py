"""Build the wheel and check that it holds the three packages, their data files, and nothing else."""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

EXPECTED = {"dmi_hpc", "search", "launch"}
DATA = {"dmi_hpc/py.typed", "search/py.typed", "launch/py.typed", "dmi_hpc/report/template.html.j2"}
DATA |= {"launch/machines/frontier.toml"}

with tempfile.TemporaryDirectory() as folder:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", folder],
        check=True,
        capture_output=True,
    )
    (wheel,) = Path(folder).glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
tops = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
missing = DATA - names
if tops != EXPECTED or missing:
    sys.exit(f"wheel: found {sorted(tops)}, expected {sorted(EXPECTED)}; missing {sorted(missing)}")
sys.stdout.write(f"wheel: {len(names)} files in {sorted(tops)}\n")
