"""Candidates of torch: transformers' experts and plain products of equal FLOPs."""

import torch
from interleaving import Call
from transformers import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts
from workloads import LIMIT, Arrays, Workload

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LARGEST_COPY = 1e9  # bytes: `batched_mm` copies the weights of every row, and is never the fastest


def candidates(workload: Workload, arrays: Arrays, direction: str) -> dict[str, Call]:
    """Every implementation that fits into memory, and the products."""
    calls = {"product of torch": _products(workload, direction)}
    for name in IMPLEMENTATIONS:
        if name != "batched_mm" or 4 * workload.rows * workload.expert_size <= LARGEST_COPY:
            calls[f"torch {name}"] = _experts(workload, arrays, direction, name)
    return calls


def _experts(workload: Workload, arrays: Arrays, direction: str, implementation: str) -> Call:
    backward = direction != "forward"
    configuration = DeepseekV4Config(
        hidden_size=workload.hidden,
        moe_intermediate_size=workload.intermediate,
        n_routed_experts=workload.experts,
        num_experts_per_tok=workload.experts_per_token,
        swiglu_limit=LIMIT,
        experts_implementation=implementation,
    )
    settings = {"dtype": getattr(torch, workload.dtype), "device": DEVICE}
    names = ("hidden_states", "weights", "cotangent", "gate_up", "down")
    hidden_states, weights, cotangent, gate_up, down = (
        torch.tensor(getattr(arrays, name), **settings) for name in names
    )
    module = DeepseekV4Experts(configuration)
    module.gate_up_proj = torch.nn.Parameter(gate_up.flatten(1, 2))
    module.down_proj = torch.nn.Parameter(down.mT.contiguous())
    indices = torch.from_numpy(arrays.indices).long().to(DEVICE)
    inputs = (hidden_states, weights, *module.parameters())
    for tensor in inputs:
        tensor.requires_grad_(backward)

    def run():
        with torch.set_grad_enabled(backward):
            output = module(hidden_states, indices, weights)
            if backward:
                torch.autograd.grad(output, inputs, cotangent)
        _wait()

    return run


def _products(workload: Workload, direction: str) -> Call:
    settings = {"dtype": getattr(torch, workload.dtype), "device": DEVICE}
    pairs = [
        (torch.randn(m, k, **settings), torch.randn(k, n, **settings))
        for m, k, n in workload.products(direction)
    ]

    def run():
        with torch.no_grad():
            for left, right in pairs:
                torch.matmul(left, right)
        _wait()

    return run


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
