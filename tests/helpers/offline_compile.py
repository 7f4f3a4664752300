"""Compile Triton kernels for GPUs that are not here, and read what the compiler made of them.

    kernel = Kernel("package.module:_kernel", {"x_ptr": "*bf16", "D": "i32"}, {"BLOCK": 64}, cc=90)
    (resources,) = compile_offline([kernel])
    assert_ships(resources, dot=True)

The compiling happens in a child process without TRITON_INTERPRET, since `triton.jit` reads that
when it decorates. Registers, stack and shared memory come from the cubin through Triton's own
cuobjdump, tensor-core instructions from its nvdisasm: no driver, no GPU.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may ask for
TENSOR_CORE = re.compile(r"\b(?:HMMA|HGMMA|UTC\w*MMA|QGMMA|IMMA)\b")  # mma, wgmma, tcgen05


@dataclass(frozen=True)
class Kernel:
    """One specialisation to compile. `name` is "module:function"; `signature` maps every argument
    that is not a constexpr to its Triton type; pointers and "i32:16" count as 16-aligned."""

    name: str
    signature: dict[str, str]
    constexprs: dict[str, int | float | str | bool]
    cc: int  # compute capability: 80, 90 or 100
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class Resources:
    """What the cubin says: registers per thread, bytes spilled, bytes of shared memory."""

    kernel: Kernel
    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_core: bool
    instructions: dict[str, int] = field(default_factory=dict)  # tensor-core opcode -> count

    def __str__(self) -> str:
        k = self.kernel
        return (
            f"{k.name} {k.constexprs} warps {k.num_warps} stages {k.num_stages} sm_{k.cc}: "
            f"{self.registers} registers, {self.spilled_bytes} B spilled, "
            f"{self.shared_bytes} B shared, {self.instructions or 'no tensor core'}"
        )


def compile_offline(kernels: Sequence[Kernel]) -> list[Resources]:
    """What each kernel compiles to, or RuntimeError with the compiler's words."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "pipelines")]
    environment["PYTHONPATH"] = os.pathsep.join([*path, environment.get("PYTHONPATH", "")])
    child = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps([asdict(kernel) for kernel in kernels]),
        capture_output=True,
        text=True,
        env=environment,
    )
    if child.returncode:
        raise RuntimeError(f"offline compilation failed:\n{child.stderr[-4000:]}")
    found = json.loads(child.stdout.splitlines()[-1])
    return [Resources(kernel, **one) for kernel, one in zip(kernels, found, strict=True)]


def assert_ships(resources: Resources, *, dot: bool) -> None:
    """No spills, shared memory within the limit, tensor-core instructions where there is a dot."""
    assert resources.spilled_bytes == 0, f"spills: {resources}"
    limit = SHARED_LIMIT[resources.kernel.cc]
    assert resources.shared_bytes <= limit, f"more than {limit} B of shared memory: {resources}"
    assert resources.tensor_core == dot, f"tensor cores {'un' * (not dot)}used: {resources}"


def _compile(kernel: Kernel) -> dict[str, object]:
    """In the child: one kernel to a cubin, and the cubin read."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = kernel.name.split(":")
    function = getattr(importlib.import_module(module), name)
    types = {a: "constexpr" if a in kernel.constexprs else "" for a in function.arg_names}
    types |= {a: t.removesuffix(":16") for a, t in kernel.signature.items()}
    missing = [a for a, t in types.items() if not t]
    assert not missing, f"{kernel.name}: no type given for {missing}"
    aligned = [a for a, t in kernel.signature.items() if t.startswith("*") or t.endswith(":16")]
    attrs = {(function.arg_names.index(a),): [["tt.divisibility", 16]] for a in aligned}
    compiled = triton.compile(
        ASTSource(function, types, kernel.constexprs, attrs),
        target=GPUTarget("cuda", kernel.cc, 32),
        options={"num_warps": kernel.num_warps, "num_stages": kernel.num_stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", cubin.name)
        assembly = _tool("nvdisasm", "-c", cubin.name)
    number = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    opcodes = TENSOR_CORE.findall(assembly)
    return {
        "registers": number["REG"],
        "spilled_bytes": number["STACK"] + number["LOCAL"],
        "shared_bytes": compiled.metadata.shared,
        "tensor_core": bool(opcodes),
        "instructions": {opcode: opcodes.count(opcode) for opcode in sorted(set(opcodes))},
    }


def _tool(name: str, *arguments: str) -> str:
    """Output of one of the binary tools in Triton's wheel."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    print(json.dumps([_compile(Kernel(**one)) for one in json.load(sys.stdin)]))
