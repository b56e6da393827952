"""What the kernel tests share: problems from the case table, and what the reference makes of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from cases import Case, call_options
from tolerance import TRUTH

from mha import core, optional, reference
from mha.cpu import load
from mha.problem import AttentionProblem


def taken(x: Any, level: str, kind: Any = None) -> Any:
    """What the products of a level see, or give for operands of `kind`: subnormals are 0 to the instruction that
    multiplies pairs of bfloat16."""
    if not load.kernels(level).PAIRED or (x.dtype if kind is None else kind) != optional.bfloat16:
        return x
    return np.where(np.abs(x.astype(np.float32)) < np.finfo(np.float32).tiny, 0, x).astype(x.dtype)


def problem_of(case: Case, arrays: dict[str, Any]) -> AttentionProblem:
    """The problem that `scaled_dot_product_attention` makes of a case."""
    defaults = dict(dropout_p=0.0, is_causal=False, scale=None, window=None, softcap=None, causal_offset=0,
                    key_lengths=None, query_lengths=None, dropout_state=None, attn_mask=None)  # fmt: skip
    options = defaults | call_options(case, arrays)
    return core._problem(arrays["query"], arrays["key"], arrays["value"], **options)


@dataclass(frozen=True, eq=False)
class Expected:
    """Outputs and gradients of the reference, at one precision."""

    output: Any
    lse: Any
    weights: Any
    gradients: tuple[Any, Any, Any]
    scores: Any


def expected(problem: AttentionProblem, grad_output: Any, dtype: Any, grad_weights: Any = None) -> Expected:
    """The reference, computed in `dtype`."""
    p, options = problem, {"scale": problem.scale, "softcap": problem.softcap, "dtype": dtype}
    if p.dropout is not None:
        options |= {"dropout_p": p.dropout.p, "dropout_state": p.dropout.state}
    output, lse, weights = reference.attention_forward(p.query, p.key, p.value, p.mask, **options)
    *gradients, scores = reference.attention_backward(
        grad_output, p.query, p.key, p.value, p.mask, grad_weights=grad_weights, **options
    )
    return Expected(output, lse, weights, tuple(gradients), scores)


@lru_cache(maxsize=4)
def prepared(case_name: str, dtype_name: str, with_weights: bool = False) -> Any:
    """Problem, arrays, truth and naive result of a case; cached, because every level asks for the same."""
    from cases import BY_NAME
    from tolerance import DTYPES

    dtype = np.dtype(DTYPES[dtype_name])
    arrays = BY_NAME[case_name].inputs(dtype)
    problem = problem_of(BY_NAME[case_name], arrays)
    grad_weights = None
    if with_weights:
        shape = (*problem.batch_shape, problem.heads, problem.queries, problem.keys)
        grad_weights = np.random.default_rng(5).standard_normal(shape).astype(dtype)
    truth = expected(problem, arrays["grad_output"], TRUTH, grad_weights)
    naive = expected(problem, arrays["grad_output"], problem.computing, grad_weights)
    naive = replace(naive, output=naive.output.astype(dtype), weights=naive.weights.astype(dtype),
                    gradients=tuple(g.astype(dtype) for g in naive.gradients))  # fmt: skip
    return problem, arrays, grad_weights, truth, naive
