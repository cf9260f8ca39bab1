"""What `tunery doctor` finds on a machine. docs/reference.md is generated from the descriptions here."""

from __future__ import annotations

from pydantic import Field

from tunery.records.typed_record import Record


class ProcessorSection(Record):
    """The CPU."""

    name: str = Field(description="as it calls itself")
    cores: int | None = Field(default=None, description="physical ones")
    available: int | None = Field(default=None, description="logical ones that this process may use")
    threads: int | None = Field(default=None, description="that PyTorch computes with")
    features: list[str] = Field(description="instructions that matter here, of those that the system lists")
    bfloat16: bool | None = Field(
        default=None, description="multiplies matrices of bfloat16; null: the system is silent"
    )


class ComputingSection(Record):
    """What `train.device: auto` and `train.precision: auto` come to."""

    device: str = Field(description="cpu, cuda or mps")
    name: str = Field(description="of the processor or the GPU")
    memory_bytes: int = Field(description="of the GPU, else of the machine")
    available_bytes: int = Field(description="free of that now, within the container's limit")
    dtype: str = Field(description="that a base would compute in")
    reason: str = Field(description="why, by a short timed probe")


class StoragePlace(Record):
    """A folder where much may lie."""

    what: str = Field(description="what it is for")
    path: str = Field(description="the folder")
    bytes: int | None = Field(default=None, description="that its files take; null: it is not there")
    free_bytes: int | None = Field(default=None, description="left on its disk")


class OptionalPart(Record):
    """Something that needs further packages."""

    name: str = Field(description="of the extra, or the package")
    purpose: str = Field(description="what needs it")
    missing: list[str] = Field(description="packages that are not installed")
    install: str = Field(description="the command that installs them")


class HubSection(Record):
    """The Hugging Face hub."""

    address: str = Field(description="of the hub ($HF_ENDPOINT)")
    offline: list[str] = Field(description="variables that forbid to ask it")
    reachable: bool | None = Field(default=None, description="whether it answers; null: it was not asked")
    detail: str = Field(default="", description="why not")


class DoctorReport(Record):
    """A machine as tunery sees it. A section that could not be found out is null, and `problems` says why."""

    tunery: str = Field(description="its version")
    python: str = Field(description="version of Python")
    executable: str = Field(description="the Python that runs")
    platform: str = Field(description="operating system and architecture")
    versions: dict[str, str | None] = Field(description="package → version; null: not installed")
    processor: ProcessorSection | None = None
    computing: ComputingSection | None = None
    memory_bytes: int | None = Field(default=None, description="of the machine")
    storage: list[StoragePlace]
    optional: list[OptionalPart]
    hub: HubSection | None = None
    environment: dict[str, str] = Field(description="variables that are set and change what happens here")
    problems: list[str] = Field(description="what does not work, in sentences")
