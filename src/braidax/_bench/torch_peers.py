"""The PyTorch peers, where they are installed: transformers' experts and a plain product."""

import importlib
import importlib.util
import os
from typing import Any

from .candidates import LIMIT, Call
from .workloads import Arrays, Workload

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
_LARGEST_COPY = 4e9  # bytes: `batched_mm` copies the weights of every row


def _torch() -> Any:
    # Threads that spin between two products slow each other down where JAX's threads wait too.
    # It is read once, when torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    return importlib.import_module("torch")


def available() -> bool:
    """Whether torch and transformers can be imported. Neither is a dependency of braidax."""
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def threads() -> int:
    """Threads that torch computes with."""
    return _torch().get_num_threads()


def experts(workload: Workload, arrays: Arrays, implementation: str, direction: str) -> Call | None:
    """`DeepseekV4Experts` with the same arrays; `None` where it would not fit into memory."""
    row_bytes = 12 * workload.hidden * workload.intermediate
    if implementation == "batched_mm" and workload.rows * row_bytes > _LARGEST_COPY:
        return None
    torch = _torch()
    module = _module(torch, workload, arrays, implementation)
    backward = direction != "forward"
    hidden_states, weights, cotangent = (
        _tensor(torch, workload, array)
        for array in (arrays.hidden_states, arrays.weights, arrays.cotangent)
    )
    indices = torch.from_numpy(arrays.indices).long().to(hidden_states.device)
    if backward:
        hidden_states.requires_grad_()
        weights.requires_grad_()
    parameters = (hidden_states, weights, *module.parameters())

    def run():
        with torch.set_grad_enabled(backward):
            output = module(hidden_states, indices, weights)
            if backward:
                torch.autograd.grad(output, parameters, cotangent)
        if output.is_cuda:
            torch.cuda.synchronize()

    return run


def gemm_limit(workload: Workload, arrays: Arrays, direction: str) -> Call:
    """As `candidates.gemm_limit`."""
    torch = _torch()
    rows = _tensor(torch, workload, arrays.hidden_states).repeat(workload.experts_per_token, 1)
    gate_up = _tensor(torch, workload, arrays.gate_up[0]).T.contiguous()
    down = _tensor(torch, workload, arrays.down[0])
    inner = rows @ gate_up
    activations = inner[:, : workload.intermediate].contiguous()

    def run():
        with torch.no_grad():
            torch.matmul(rows, gate_up)
            torch.matmul(activations, down)
            if direction != "forward":
                torch.matmul(inner, gate_up.T)
                torch.matmul(rows.T, inner)
                torch.matmul(rows, down.T)
                torch.matmul(activations.T, rows)
        if rows.is_cuda:
            torch.cuda.synchronize()

    return run


def _tensor(torch: Any, workload: Workload, array: Any) -> Any:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.tensor(array, dtype=getattr(torch, workload.dtype), device=device)


def _module(torch: Any, workload: Workload, arrays: Arrays, implementation: str) -> Any:
    modeling = importlib.import_module("transformers.models.deepseek_v4.modeling_deepseek_v4")
    configuration = importlib.import_module("transformers").DeepseekV4Config(
        hidden_size=workload.hidden,
        moe_intermediate_size=workload.intermediate,
        n_routed_experts=workload.experts,
        num_experts_per_tok=workload.experts_per_token,
        swiglu_limit=LIMIT,
        experts_implementation=implementation,
    )
    module = modeling.DeepseekV4Experts(configuration)
    down = arrays.down.swapaxes(1, 2)
    module.gate_up_proj = torch.nn.Parameter(_tensor(torch, workload, arrays.gate_up))
    module.down_proj = torch.nn.Parameter(_tensor(torch, workload, down).contiguous())
    return module
