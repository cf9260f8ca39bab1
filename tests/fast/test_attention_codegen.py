"""The Triton code that PyTorch makes of FlexAttention for an H100 (compute capability 9.0), generated without one.

Needs a PyTorch with Triton, which those for CPUs come without.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.device_interface import CudaInterface
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.exc import InductorError
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._subclasses import fake_tensor
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.nn.attention import flex_attention
from torch.utils import _triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from tests.fast.test_attention_gpu import random_rows
from tunery.data.batching import pack
from tunery.fast import attention_flex, attention_gpu
from tunery.fast.attention_gpu import GpuLayout, by_tree
from tunery.fast.attention_rule import Rule

H100 = SimpleNamespace(
    name="H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    total_memory=80 << 30,
    L2_cache_size=50 << 20,
    is_integrated=0,
    gcnArchName="",
)


class Driver:
    """Triton's view of an H100 that is not there."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0


class Generated(Exception):
    """The code is there, and is not to be loaded."""


def forget() -> None:
    """What was compiled, and what PyTorch remembers about this machine and its Triton."""
    torch.compiler.reset()
    attention_gpu.forget()
    for known in (*vars(_triton).values(), DeviceProperties.create):
        if hasattr(known, "cache_clear"):
            known.cache_clear()


@pytest.fixture
def codes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The code of each graph that is compiled from now on: of FlexAttention forward, then backward.

    Graphs are made on the CPU, and lowered as if their tensors were on a GPU."""
    found: list[str] = []

    def keep(graph: GraphLowering) -> None:
        code = graph.codegen()[0].value
        found.append(re.split(r"\ndef (?:get_args|benchmark)", code)[0])  # what follows is an example of a call
        raise Generated

    def lower(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        there = copy.deepcopy(graph)
        for module in there.modules():
            for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
                if "device" in node.kwargs:
                    node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
        inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
        mode = next(x.fake_mode for x in inputs if isinstance(x, fake_tensor.FakeTensor))
        with mode:
            inputs = [
                torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") if isinstance(x, Tensor) else x
                for x in inputs
            ]
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {
                "is_available": True,
                "is_initialized": True,
                "device_count": 1,
                "current_device": 0,
                "_lazy_init": None,
                "get_device_capability": (9, 0),
                "get_device_properties": H100,
                "_exchange_device": 0,
                "_maybe_exchange_device": 0,
                "synchronize": None,
                "get_rng_state": torch.get_rng_state(),
                "set_rng_state": None,
                "current_stream": SimpleNamespace(cuda_stream=0),
            }.items():
                patch.setattr(torch.cuda, name, lambda *_, value=value: value)
            FakeTensorProp(there, mode).propagate_dont_convert_inputs(*inputs)
            with pytest.raises(InductorError, match="Generated"):
                compile_fx_inner(there, inputs)
        return graph

    for owner, name, value in (
        (CudaInterface, "get_device_properties", staticmethod(lambda *_: H100)),
        (CudaInterface, "is_available", staticmethod(lambda *_: True)),
        (CudaInterface.Worker, "get_device_properties", staticmethod(lambda *_: H100)),
        (CudaInterface.Worker, "current_device", staticmethod(lambda *_: 0)),
        (GraphLowering, "_compile_to_module", keep),
        (fake_tensor, "init_gpu_context", lambda *_: None),
        (flex_attention, "_validate_device", lambda *_: None),
        (driver, "_active", Driver()),
        (inductor_config, "compile_threads", 1),
        (functorch_config, "force_non_lazy_backward_lowering", True),
    ):
        monkeypatch.setattr(owner, name, value)
    backend = aot_autograd(
        fw_compiler=lower, bw_compiler=lower, inference_compiler=lower, decompositions=select_decomp_table()
    )
    compiled = torch.compile(attention_flex.over_blocks, fullgraph=True, backend=backend)
    monkeypatch.setattr(attention_flex, "_compiled", lambda: compiled)
    forget()
    yield found
    monkeypatch.undo()
    forget()


RULES = {
    "plain": (torch.bfloat16, 128, Rule(128**-0.5)),
    "window, soft cap": (torch.bfloat16, 256, Rule(0.0625, 300, 50.0)),
    "sinks": (torch.bfloat16, 64, Rule(0.125, 128, None, torch.linspace(-1, 1, 8))),
    "float32": (torch.float32, 32, Rule(0.2)),
}


@pytest.mark.parametrize(("dtype", "width", "rule"), RULES.values(), ids=RULES)
def test_no_kernel_checks_where_the_row_ends_and_none_is_compiled_for_a_length(
    dtype: torch.dtype, width: int, rule: Rule, codes: list[str]
) -> None:
    batch = pack(random_rows(5, 20))
    q, k, v = (torch.randn(len(batch.ids), n, width, dtype=dtype).requires_grad_().transpose(0, 1) for n in (8, 2, 2))
    by_tree(q, k, v, GpuLayout(batch.groups, torch.device("cpu")), rule)
    assert len(codes) == 2
    for code in codes:
        assert set(re.findall(r"IS_DIVISIBLE : tl.constexpr = (\w+)", code)) == {"True"}
        assert set(re.findall(r"SM_SCALE : tl.constexpr = ([\d.]+)", code)) == {str(rule.scale)}
        blocks = -(-len(batch.ids) // attention_flex.BLOCK)
        assert str(blocks * attention_flex.BLOCK) not in code
    forward = codes[0][codes[0].index("def call") :]
    (number,) = set(re.findall(rf"\(1, 8, 128\*(\w+), {width}\)", forward))
    strides = f"({1024 * width}*{number}, {width}, {8 * width}, 1)"
    assert (
        f"empty_strided_cuda((1, 8, 128*{number}, {width}), {strides}" in forward
    )  # by token first, as models want it


def test_kernel_options_reach_the_kernels(codes: list[str]) -> None:
    """As the GPU check tries them."""
    batch = pack(random_rows(5, 20))
    q, k, v = (torch.randn(len(batch.ids), n, 64).bfloat16().requires_grad_().transpose(0, 1) for n in (8, 2, 2))
    layout = GpuLayout(batch.groups, torch.device("cpu"))
    for stages in (2, 3):
        compute = partial(attention_flex._compiled(), options={"bwd_num_stages": stages})
        by_tree(q, k, v, layout, Rule(0.125), compute)
        assert f"num_stages={stages}," in codes[-1][codes[-1].index("triton_tem_fused") :]
    assert len(codes) == 4
