"""What the tests of the Triton kernels share.

Without a GPU triton's interpreter runs them on the CPU, in a process of its own, since TRITON_INTERPRET
changes whatever else uses triton. `python -m tests.ops.test_..._triton` is that process.
"""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from visionsel.ops import gpu

Call = tuple[Any, ...]


def learned(call: Call) -> list[Tensor]:
    return [x for x in call if isinstance(x, Tensor) and x.requires_grad]


def the_compiler_takes_it_as_one_graph(module: ModuleType, call: Call) -> None:
    def attend(*call: Any) -> Tensor:
        assert module.why_not(*call) is None
        return module.triton(*call)

    # aot_eager: the graph and its gradient as the compiler sees them, without minutes of code generation
    out = torch.compile(attend, fullgraph=True, backend="aot_eager")(*call)
    expected = attend(*call)
    assert torch.equal(out, expected)
    grads = torch.autograd.grad(out.square().sum(), learned(call))
    for grad, truth in zip(grads, torch.autograd.grad(expected.square().sum(), learned(call)), strict=True):
        torch.testing.assert_close(grad, truth, rtol=0, atol=1e-6)


def checkpointing_changes_no_gradient(module: ModuleType, call: Call) -> None:
    """Without reentrance it gives the backward what was saved a single time."""
    out = checkpoint(module.triton, *call, use_reentrant=False)
    grads = torch.autograd.grad(out.square().sum(), learned(call))
    plain = torch.autograd.grad(module.triton(*call).square().sum(), learned(call))
    assert len(grads) == 4
    assert all(torch.equal(x, y) for x, y in zip(grads, plain, strict=True))


def selective_checkpointing_sees_the_operators(module: ModuleType, call: Call) -> None:
    """Eager calls go past PyTorch's dispatcher, but not where a mode wants to see them."""
    seen = []

    def policy(context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        ours = operator.namespace == "visionsel"
        seen.append(ours)
        return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    out = checkpoint(module.triton, *call, use_reentrant=False, context_fn=contexts)
    grads = torch.autograd.grad(out.square().sum(), learned(call))
    assert any(seen)
    plain = torch.autograd.grad(module.triton(*call).square().sum(), learned(call))
    assert all(torch.equal(x, y) for x, y in zip(grads, plain, strict=True))


def a_profiler_sees_the_operators(module: ModuleType, call: Call) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.autograd.grad(module.triton(*call).square().sum(), learned(call))
    names = {event.name for event in profile.events() or ()}
    assert {name.endswith("_backward") for name in names if name.startswith("visionsel::")} == {True, False}


def autocast_attends_in_half_precision(module: ModuleType, call: Call) -> None:
    expected = module.triton(*call)
    with torch.autocast(call[0].device.type, torch.bfloat16):
        out = module.triton(*call)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=8 * 2**-7)
    grads = torch.autograd.grad(out.float().square().sum(), learned(call))
    assert {grad.dtype for grad in grads} == {torch.float32}


def an_expanded_gradient_is_read_as_it_is(module: ModuleType, call: Call) -> None:
    out = module.triton(*call)
    grads = torch.autograd.grad(out.sum(), learned(call))
    plain = torch.autograd.grad(module.triton(*call), learned(call), torch.ones_like(out))
    # on a GPU the code for other strides may sum in another order
    atol = 1e-6 if out.is_cuda else 0
    for grad, truth in zip(grads, plain, strict=True):
        torch.testing.assert_close(grad, truth, rtol=0, atol=atol)


def a_second_derivative_is_refused(module: ModuleType, call: Call) -> None:
    (grad,) = torch.autograd.grad(module.triton(*call).square().sum(), call[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives; use backend='tiled'"):
        grad.sum().backward()


def shared_checks(module: ModuleType, small: Callable[[str], Call]) -> dict[str, Callable[[str], None]]:
    """Checks of an operator's backend on a device, with a call of four tensors that all take gradients."""

    def on(device: str, check: Callable[[ModuleType, Call], None]) -> None:
        check(module, small(device))

    checks = (
        the_compiler_takes_it_as_one_graph,
        checkpointing_changes_no_gradient,
        selective_checkpointing_sees_the_operators,
        a_profiler_sees_the_operators,
        autocast_attends_in_half_precision,
        an_expanded_gradient_is_read_as_it_is,
        a_second_derivative_is_refused,
    )
    return {check.__name__: partial(on, check=check) for check in checks}


class NoGpu:
    """Triton's driver of a GPU that is not there: enough to compile for it."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> str:
        return f"none of {self.capability}"  # what is compiled is kept for each device

    def get_current_stream(self, device: str) -> int:
        return 0


def compiled_without_a_gpu(
    run: Callable[[], None], capability: int, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> dict[str, int]:
    """Compile the kernels that `run` launches for a GPU of a capability; bytes of shared memory by name."""
    if not gpu.installed() or gpu.interpreted():
        pytest.skip("needs triton, not interpreted")
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    shared = {}
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        shared[self.__name__] = launch(self, *args, grid=grid, warmup=True, **kwargs).metadata.shared

    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    monkeypatch.setattr(driver, "_active", NoGpu(capability))
    monkeypatch.setattr(JITFunction, "run", compile_only)
    run()
    return shared


def assert_interpreted(tests: str) -> None:
    """Run a module of tests by the interpreter, in a process of its own, and fail with what it reports."""
    if not gpu.installed():
        pytest.skip("needs triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", tests],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    failures = json.loads(done.stdout.splitlines()[-1])
    assert not failures, "\n".join(f"{name}: {what}" for name, what in failures.items())


def report(module: ModuleType, runs: dict[str, Callable[[str], None]]) -> None:
    """Run everything on the CPU; the last line of the output is JSON: what failed, and how."""
    # torchvision imports triton itself, but the kernels are decorated at their first use
    early = f"{module.__name__}_kernels" in sys.modules
    failures = {"importing visionsel": "it imports the kernels"} if early else {}
    for name, run in runs.items():
        try:
            run("cpu")
        except Exception:
            failures[name] = traceback.format_exc()
    print(json.dumps(failures))
