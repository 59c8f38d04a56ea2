"""The wheel holds all that an installed dpsynth needs, and nothing of the workshop."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_every_config(wheel):
    inside = set(wheel.namelist())
    configs = sorted((ROOT / "conf").rglob("*.yaml"))
    assert configs
    assert {f"dpsynth/{path.relative_to(ROOT).as_posix()}" for path in configs} <= inside


def test_wheel_holds_every_module_and_embedded_table(wheel):
    inside = set(wheel.namelist())
    wanted = [*(ROOT / "dpsynth").rglob("*.py"), *(ROOT / "dpsynth" / "datasets").glob("adult.*")]
    wanted.append(ROOT / "dpsynth" / "datasets" / "ATTRIBUTION.md")
    wanted.append(ROOT / "dpsynth" / "training" / "planner.json")
    assert {path.relative_to(ROOT).as_posix() for path in wanted} <= inside


def test_wheel_holds_nothing_but_the_package(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"dpsynth", "dpsynth-0.1.0.dist-info"}


def test_wheel_states_licence_and_command(wheel):
    info = "dpsynth-0.1.0.dist-info"
    assert "Apache License" in wheel.read(f"{info}/licenses/LICENSE").decode()
    assert "dpsynth = dpsynth.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()


def test_constraints_pin_every_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert all("==" in pin and "+" not in pin and "/" not in pin for pin in pins)
    pinned = {pin.split("==")[0].lower().replace("_", "-") for pin in pins}
    for line in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        assert line.split(">")[0].split("<")[0].lower() in pinned
