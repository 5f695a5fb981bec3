"""The layer in float64 numpy, one token and one expert at a time, written from the equations.

DeepSeek-V3 (arXiv:2412.19437) eq. 12-16 with the scores of DeepSeek-V4 (arXiv:2606.19348).
Nothing here is imported from the library.
"""

import numpy as np

SCORES = {
    "sqrtsoftplus": lambda z: np.sqrt(np.logaddexp(0.0, z)),
    "sigmoid": lambda z: np.exp(-np.logaddexp(0.0, -z)),
    "softmax": lambda z: np.exp(z - z.max()) / np.exp(z - z.max()).sum(),
}


def top_k(values, k):
    """The k largest, ties to the lower index, largest first."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]


def select(scores, bias, k, num_groups=1, num_selected_groups=1, num_summed=2):
    """Biased, group-limited selection for one token."""
    corrected = list(scores + bias)
    size = len(corrected) // num_groups
    if num_groups > 1:
        group_scores = [
            sum(sorted(corrected[g * size : (g + 1) * size])[-num_summed:])
            for g in range(num_groups)
        ]
        kept = top_k(group_scores, num_selected_groups)
        corrected = [v if i // size in kept else -np.inf for i, v in enumerate(corrected)]
    return top_k(corrected, k)


def gate(token, weight, chosen, score_function, normalize, scaling_factor, temperature=1.0):
    """Scores of one token and the weights of its `chosen` experts."""
    logits = np.array([np.dot(row, token) for row in weight]) / temperature
    scores = SCORES[score_function](logits)
    indices = chosen(scores)
    weights = np.array([scores[i] for i in indices])
    if normalize:
        weights = weights / (weights.sum() + 1e-20)
    return scores, indices, weights * scaling_factor


def swiglu(token, gate_up, down, limit):
    """One expert on one token; `gate_up` is (2, intermediate, hidden)."""
    gate, up = (np.array([np.dot(row, token) for row in matrix]) for matrix in gate_up)
    if limit is not None:
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return (gate / (1 + np.exp(-gate)) * up) @ down


def routed(tokens, indices, weights, gate_up, down, limit, network=swiglu):
    """Weighted sum of the chosen experts, token by token."""
    output = np.zeros_like(tokens)
    for t, token in enumerate(tokens):
        for expert, w in zip(indices[t], weights[t], strict=True):
            output[t] += w * network(token, gate_up[expert], down[expert], limit)
    return output


def block_and_gradients(tokens, indices, weights, gate_up, down, limit, cotangent):
    """Output of `routed` and its vector-Jacobian product by the chain rule, by hand."""
    d_tokens, d_weights = np.zeros_like(tokens), np.zeros_like(weights)
    d_gate_up, d_down = np.zeros_like(gate_up), np.zeros_like(down)
    bound = np.inf if limit is None else limit
    for t, token in enumerate(tokens):
        for slot, expert in enumerate(indices[t]):
            gate, up = gate_up[expert] @ token
            g, u = np.minimum(gate, bound), np.clip(up, -bound, bound)
            s = 1 / (1 + np.exp(-g))
            h = g * s * u
            d_weights[t, slot] = cotangent[t] @ (h @ down[expert])
            d_out = weights[t, slot] * cotangent[t]
            d_down[expert] += np.outer(h, d_out)
            d_h = down[expert] @ d_out
            d_gate = np.where(gate <= bound, d_h * u * (s + g * s * (1 - s)), 0)
            d_up = np.where(np.abs(up) <= bound, d_h * g * s, 0)
            for part, d_part in enumerate((d_gate, d_up)):
                d_gate_up[expert, part] += np.outer(d_part, token)
                d_tokens[t] += d_part @ gate_up[expert, part]
    output = routed(tokens, indices, weights, gate_up, down, limit)
    return output, d_tokens, d_weights, d_gate_up, d_down


def quantiles(scores, bias, k):
    """The exact quantiles of quantile balancing for `scores` (tokens, experts), not centered."""
    num_tokens, num_experts = scores.shape
    cutoffs = np.array([sorted(row + bias, reverse=True)[k] for row in scores])
    differences = [sorted(cutoffs - scores[:, expert]) for expert in range(num_experts)]
    return np.array([column[num_tokens * k // num_experts] for column in differences])


def quantile_bias(scores, bias, k):
    """The bias that quantile balancing gives."""
    new = quantiles(scores, bias, k)
    return new - new.mean()
