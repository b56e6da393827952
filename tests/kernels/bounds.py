"""What rounding may cost a kernel beyond what it costs a naive implementation, element by element.

The naive backward has the weights at hand and takes the row term as rowsum(P * dP). The kernels have the stored
output and take rowsum(dO * O), which is the same number with other rounding errors (Higham, "Accuracy and Stability
of Numerical Algorithms", section 3.1): with u the unit roundoff of the storage and v that of the computation,

    |error of delta[i]| <= (u + (Dv + T) * v) * sum over d of |dO[i, d]| * (A |V|)[i, d],

and from there on exactly P * scale times it, through |K| to the queries and through |Q| to the keys. Nothing here
looks at the largest value of an array: an element that no error can reach is allowed none.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from tolerance import TRUTH, spacing

from mha import reference
from mha.problem import AttentionProblem


class Slack(NamedTuple):
    """Absolute errors that are allowed on top of the rule, in the shapes of the gradients."""

    query: Any
    key: Any
    value: Any


def of_row_term(problem: AttentionProblem, grad_output: Any, grad_weights: Any = None, lse: Any = None) -> Slack:
    """The bound above. With `lse` the probabilities were made from its rounded value, so each is off by |lse| * v."""
    p = problem
    options: dict[str, Any] = {"scale": p.scale, "softcap": p.softcap, "dtype": TRUTH}
    dropout = {} if p.dropout is None else {"dropout_p": p.dropout.p, "dropout_state": p.dropout.state}
    positive = np.abs(p.value.astype(TRUTH))
    spread, _, dropped = reference.attention_forward(p.query, p.key, positive, p.mask, **options, **dropout)
    probability = reference.attention_forward(p.query, p.key, positive, p.mask, **options)[2]
    storage, computing = TRUTH(spacing(p.dtype)) / 2, TRUTH(spacing(p.computing)) / 2
    upstream = np.abs(grad_output.astype(TRUTH))
    size = (upstream * spread).sum(axis=-1, keepdims=True)
    in_delta = (storage + (p.v_head_dim + p.keys) * computing) * size
    of_weights = upstream @ _per_head(positive, p).swapaxes(-1, -2)
    if grad_weights is not None:
        size = (np.abs(grad_weights.astype(TRUTH)) * dropped).sum(axis=-1, keepdims=True)
        in_delta = in_delta + p.keys * computing * size
        of_weights = of_weights + np.abs(grad_weights.astype(TRUTH))
    relative = 0 if lse is None else 4 * computing * np.where(np.isfinite(lse), np.abs(lse.astype(TRUTH)), 0)[..., None]
    kept = np.where(dropped != 0, 1 / (1 - TRUTH(p.dropout.p)), 0) if p.dropout and p.dropout.p < 1 else 1
    score = probability * (in_delta + relative * (of_weights * kept + size)) * abs(p.scale)
    return Slack(
        score @ _per_head(np.abs(p.key.astype(TRUTH)), p),
        _per_key_head(score.swapaxes(-1, -2) @ np.abs(p.query.astype(TRUTH)), p),
        _per_key_head((relative * dropped).swapaxes(-1, -2) @ upstream, p),
    )


def _per_head(x: Any, problem: AttentionProblem) -> Any:
    return np.repeat(x, problem.heads // max(problem.kv_heads, 1), axis=-3)


def _per_key_head(x: Any, problem: AttentionProblem) -> Any:
    *batch, _, rows, columns = x.shape
    return x.reshape(*batch, problem.kv_heads, -1, rows, columns).sum(axis=-3) if x.size else x[..., :0, :, :]
