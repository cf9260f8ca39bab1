"""Small functions compiled with torch.compile where that pays, each once in a process, and run as they are elsewhere.

On a GPU an element-wise function costs a pass over memory for each of its operations; compiled, it is one kernel. Only
such functions ("islands") are compiled, never whole layers: products stay with cuBLAS, backward passes written by hand
stay as they are, and nothing is compiled anew for another length.

What is compiled is tried where it first runs, against the function as it is written, and not used where it fails or
differs (`refusals` says why): a compiler depends on the GPU, the driver and PyTorch's version.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor

from tunery.fast.trial import relative_difference

R = TypeVar("R")

Setting = bool | Literal["auto"]

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.005}
"""Largest relative difference from the function as it is written that rounding explains. In half precision that one
rounds after every operation, and the compiled one once."""

VARIANTS = 64
"""Most versions of one function: by dtype, layout, and what needs a gradient. PyTorch would stop at eight."""

COMPARED = 1 << 20
"""Elements of each result that are compared."""

_setting: Setting = "auto"
_refused: dict[tuple[str, str], str] = {}
_used = 0


@contextlib.contextmanager
def compiling(setting: Setting) -> Iterator[None]:
    """Within this context functions are compiled everywhere (True), nowhere (False), or on a GPU ("auto", the rule
    outside any such context)."""
    global _setting
    before, _setting = _setting, setting
    try:
        yield
    finally:
        _setting = before


def compiles(device: torch.device) -> bool:
    """Whether functions are compiled on a device."""
    return device.type == "cuda" if _setting == "auto" else _setting


def compile_in_calling_thread() -> None:
    """For a forked process: the threads that torch.compile hands work to have stayed with the parent, and it would wait
    for them for ever."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # read when inductor is loaded
    config: Any = sys.modules.get("torch._inductor.config")
    if config is not None:
        config.compile_threads = 1


def refusals() -> list[str]:
    """Functions that were tried in this process and are not compiled, with the reason, each as a sentence."""
    return list(dict.fromkeys(_refused.values()))


def calls() -> int:
    """How many calls ran compiled in this process so far."""
    return _used


def backend() -> str | Callable[..., object]:
    """Of torch.compile."""
    return "inductor"


class Island(Generic[R]):
    """A pure function of tensors, of which the first says where it runs.

    Args:
        written: what is compiled. It changes no argument.
        eager: the same for where nothing is compiled, if something else is quicker there. It may use up what its
            documentation says.
    """

    def __init__(self, written: Callable[..., R], eager: Callable[..., R] | None = None):
        self.written, self.eager = written, eager or written
        self._compiled: Callable[..., R] | None = None
        self._known: set[tuple[object, ...]] = set()

    def compiles(self, tensor: Tensor) -> bool:
        """Whether a call with this first argument would run compiled."""
        return compiles(tensor.device) and (self.written.__name__, tensor.device.type) not in _refused

    def __call__(self, first: Tensor, *others: object) -> R:
        args = (first, *others)
        if not self.compiles(first):
            return self.eager(*args)
        global _used
        try:
            result = self._run(*args)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler, its absence or a driver may raise
            _refused[self.written.__name__, first.device.type] = (
                f"{self._name} is not compiled ({_reason(error)}); training is slower without it"
            )
            return self.eager(*args)
        _used += 1
        return result

    @property
    def _name(self) -> str:
        return f"{self.written.__name__.strip('_')}()"

    def _run(self, *args: object) -> R:
        if self._compiled is None:
            self._compiled = torch.compile(self.written, dynamic=True, fullgraph=True, backend=backend())
        key = tuple(
            (a.dtype, a.device, a.dim(), a.is_contiguous(), a.requires_grad) if isinstance(a, Tensor) else a
            for a in args
        )
        if key in self._known:
            return self._compiled(*args)
        with torch._dynamo.config.patch(recompile_limit=VARIANTS):
            result = self._compiled(*args)
        self._require_same(result, self.written(*args))
        self._known.add(key)
        return result

    def _require_same(self, got: object, wanted: object) -> None:
        pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (got, wanted)), strict=True)
        for a, b in pairs:
            if not isinstance(b, Tensor) or not b.is_floating_point():
                continue
            a, b = (x.detach().flatten()[:COMPARED] for x in (a, b))
            difference = relative_difference(a, b)
            if not difference <= TOLERANCE.get(_narrowest(wanted), 0.02):
                raise ValueError(f"its result differs by {difference:.1%} from the plain one")


def _narrowest(results: object) -> torch.dtype:
    """The narrowest floating-point dtype among the results: rounding to it explains a difference in any of them."""
    tensors = results if isinstance(results, tuple) else (results,)
    return min((x.dtype for x in tensors if isinstance(x, Tensor) and x.is_floating_point()), key=lambda d: d.itemsize)


def _reason(error: BaseException) -> str:
    """The first line of what went wrong at the bottom, with its kind."""
    while (inner := getattr(error, "inner_exception", None) or error.__cause__) is not None:
        error = inner
    words = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {words[:160]}".removesuffix(": ")
