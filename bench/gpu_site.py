"""Collects in `.site` what a GPU machine without a network lacks to run tunery, its GPU check and TRL: `make gpu-site`.

bench/gpu_check.sh puts the folder first on PYTHONPATH. The wheels are for Python 3.12 on Linux, in the versions of
constraints.txt, or of bench/requirements where that has none. Done once, and again when a version changes.

The machine is expected to have torch, transformers, peft and accelerate with what those need, and numpy, jinja2,
filelock, psutil, sacrebleu, safetensors, tokenizers and pytest with xdist. TRL (the part `peer` of the check) imports
`datasets`, which also needs pandas and pyarrow: pyarrow alone is larger than LIMIT, so where the machine lacks them
that part fails, and the others do not.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bench.plan import ROOT

SITE = ROOT / ".site"
PACKAGES = (
    "pydantic",
    "pydantic_core",
    "annotated-types",
    "typing-inspection",
    "gguf",
    "click",
    "rich",
    "markdown-it-py",
    "mdurl",
    "Pygments",
    "trl",
    "datasets",
    "dill",
    "multiprocess",
    "xxhash",
    "liger-kernel",
    "bitsandbytes",
)
PINS = (ROOT / "constraints.txt", ROOT / "bench/requirements/trl.txt", ROOT / "bench/requirements/gpu.txt")
"""Where versions are looked up, the first one first."""

PYTHON = "3.12"
PLATFORMS = (*(f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17)), "manylinux2014_x86_64")
LIBRARIES = ("cuda130", "cpu")
"""Of bitsandbytes' libraries, those that are kept: the ones for CUDA 13.0, which torch 2.11 brings, and for the CPU."""

LIMIT = 64_000_000
"""Bytes that may be carried to the machine."""

STAMP = ".made-from"
Download = Callable[[Sequence[str], Path], None]


def main() -> None:
    """Make the folder if need be; say its size."""
    made = make(SITE, versions(PINS))
    size = size_of(SITE)
    print(f"{SITE.relative_to(ROOT)}: {size / 1e6:.1f} MB" + ("" if made else ", as it was"))
    if size > LIMIT:
        sys.exit(f"that is more than the {LIMIT / 1e6:.0f} MB that may be carried: leave packages out ({__file__})")


def versions(files: Sequence[Path]) -> dict[str, str]:
    """The version of each of PACKAGES, from the first file that names it.

    Raises:
        SystemExit: none does.
    """
    found: dict[str, str] = {}
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            name, equal, version = line.partition("==")
            if equal:
                found.setdefault(_plain(name), version.strip())
    if missing := [name for name in PACKAGES if _plain(name) not in found]:
        sys.exit(f"no version of {', '.join(missing)} in {', '.join(file.name for file in files)}")
    return {name: found[_plain(name)] for name in PACKAGES}


def _plain(name: str) -> str:
    """A package's name as it is compared (PEP 503)."""
    return name.strip().lower().replace("_", "-")


def make(site: Path, wanted: Mapping[str, str], download: Download | None = None) -> bool:
    """Fill the folder, unless it holds these versions already; returns whether it did anything."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = [f"{name}=={version}" for name, version in wanted.items()]
    stamp = hashlib.sha256("\n".join([*pins, project["version"], Path(__file__).read_text("utf-8")]).encode())
    written = site / STAMP
    if written.exists() and written.read_text(encoding="utf-8") == stamp.hexdigest():
        return False
    wheels, fresh = site.with_name(f"{site.name}-wheels"), site.with_name(f"{site.name}-new")
    for folder in (wheels, fresh):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    try:
        (download or _download)(pins, wheels)
        for wheel in sorted(wheels.glob("*.whl")):
            with zipfile.ZipFile(wheel) as file:
                file.extractall(fresh)
        trim(fresh)
        _metadata(fresh, project["name"], project["version"])
        (fresh / STAMP).write_text(stamp.hexdigest(), encoding="utf-8")
        shutil.rmtree(site, ignore_errors=True)
        fresh.rename(site)
    finally:
        for folder in (wheels, fresh):
            shutil.rmtree(folder, ignore_errors=True)
    return True


def _download(pins: Sequence[str], folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", PYTHON, "-d", str(folder)]
    command += [option for name in PLATFORMS for option in ("--platform", name)]
    # The Makefile holds pip to constraints.txt; what is asked for here is exact.
    environment = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
    result = subprocess.run([*command, *pins], env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"pip could not download the wheels: {result.stderr.strip()[-600:]}")


def trim(site: Path) -> None:
    """Take away what is not used there: libraries of bitsandbytes for other devices."""
    for library in (site / "bitsandbytes").glob("libbitsandbytes_*"):
        if not any(kept in library.name for kept in LIBRARIES):
            library.unlink()


def _metadata(site: Path, name: str, version: str) -> None:
    """As if the sources were installed: receipts ask for the version."""
    folder = site / f"{name}-{version}.dist-info"
    folder.mkdir()
    content = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (folder / "METADATA").write_text(content, encoding="utf-8")


def size_of(folder: Path) -> int:
    """Bytes of all files."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


if __name__ == "__main__":
    main()
