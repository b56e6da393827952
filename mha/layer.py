"""The layer that every front end translates its call to: projections around the attention core, and their gradients.

Nothing here knows a parameter format. Weights come as views (in-features, out-features) of whatever arrays the caller
has, and gradients of weights are written into equal views of its gradient arrays.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mha.dispatch import backend_for, backend_of, dropout_backend
from mha.masks import MaskSpec
from mha.matrix import heads_of, rows_of
from mha.optional import array_module
from mha.problem import AttentionProblem, Dropout, Norm, RowStatistics
from mha.projection import empty_like_rows, linear_gradients, project_heads, project_output, sum_over, with_rows

Array = NDArray[Any]


@dataclass(eq=False)
class LayerCall:
    """One call of a layer, validated by its front end; the forward adds what the backward needs.

    T counts the cached keys, the S new ones and the appended ones, in this order.
    """

    #: (N, L, width) and twice (N, S, width).
    query: Array
    key: Array
    value: Array
    #: q_weight, k_weight, v_weight, o_weight, (in-features, out-features) or what `pack` made of one, and q_bias ...;
    #: without a weight every head gets the whole input, or the heads side by side are the output.
    weights: dict[str, Any]
    num_heads: int
    num_kv_heads: int
    #: For the cached and new keys; its `extra` are the appended ones.
    mask: MaskSpec
    #: None is D ** -0.5.
    scale: float | None = None
    softcap: float | None = None
    dropout: Dropout | None = None
    output_dropout: Dropout | None = None
    #: One key and one value, projected, appended to every sample's.
    bias_rows: tuple[Array, Array] | None = None
    #: Append a key and a value of zeros, after them.
    zero_row: bool = False
    #: "query", "key" or "value": heads (N, H or Hk, length, D) that replace the projected ones.
    heads: dict[str, Array] = field(default_factory=dict)
    #: (2, N, Hk, C, D): earlier keys and values.
    cache: Array | None = None
    #: (N, L, O), added to the output after its dropout.
    residual: Array | None = None
    #: Of the output, after the residual.
    norm: Norm | None = None
    need_weights: bool = False
    average: bool = False
    #: Float masks as views of four axes that broadcast to (N, H, L, C + S), by name.
    float_masks: dict[str, Array] = field(default_factory=dict)
    problem: AttentionProblem | None = None
    attended: Array | None = None
    rows: RowStatistics | None = None
    #: What the norm was applied to.
    total: Array | None = None

    @property
    def xp(self) -> ModuleType:
        """The arrays' library."""
        return array_module(self.query)

    @property
    def output_shape(self) -> tuple[int, int, int]:
        """(N, L, O)"""
        weight, problem = self.weights.get("o_weight"), self.problem
        assert problem is not None
        width = problem.heads * problem.v_head_dim if weight is None else weight.shape[1]
        return problem.batch, problem.queries, width

    @property
    def weights_shape(self) -> tuple[int, ...]:
        """Of the returned weights: (N, H, L, T), or averaged (N, L, T)."""
        problem = self.problem
        assert problem is not None
        heads = () if self.average else (problem.heads,)
        return problem.batch, *heads, problem.queries, problem.keys


class LayerResult(NamedTuple):
    """What `forward` returns: (N, L, O); (N, H, L, T), averaged (N, L, T), or None; (2, N, Hk, C + S, D) or None."""

    output: Array
    weights: Array | None
    cache: Array | None


class LayerGradients(NamedTuple):
    """What `backward` returns, each in the shape of the call's; None for what the call did not have."""

    query: Array | None
    key: Array | None
    value: Array | None
    bias_rows: tuple[Array, Array] | None
    heads: dict[str, Array]
    cache: Array | None
    masks: dict[str, Array]
    residual: Array
    #: Scale and bias, in the computing dtype; also where the call had none.
    norm: tuple[Array, Array] | None


def forward(call: LayerCall) -> LayerResult:
    """Run the layer."""
    weights, backend = call.weights, backend_of(call.query)
    query = call.heads.get("query")
    if query is None:
        query = project_heads(backend, call.query, weights.get("q_weight"), weights.get("q_bias"), call.num_heads)
    key, value, cache = _key_value_heads(call, backend)
    call.problem = AttentionProblem.build(query, key, value, call.mask, call.scale, call.softcap, call.dropout)
    attention = backend_for(call.problem)
    call.attended, _, call.rows = attention.attention_forward(call.problem, heads_last=True)
    attn_weights = None
    if call.need_weights:
        attn_weights = attention.attention_weights(call.problem, call.rows, call.average)
    output = project_output(backend, call.attended, weights.get("o_weight"), weights.get("o_bias"), call.query)
    if call.output_dropout is not None or call.residual is not None or call.norm is not None:
        finishing = dropout_backend(output, call.output_dropout)
        output, call.total = finishing.residual_norm(output, call.output_dropout, call.residual, call.norm)
    return LayerResult(output, attn_weights, cache)


def backward(
    call: LayerCall,
    grad_output: Array,
    grad_weights: Array | None,
    targets: dict[str, Array],
    mask_gradients: bool = False,
) -> LayerGradients:
    """Gradients of the call's arrays; those of its weights are written into `targets`, views of the same names.

    Parameters
    ----------
    grad_output : (N, L, O)
    grad_weights : as the forward returned them, optional
    mask_gradients : bool
        Whether those of the float masks are wanted.
    """
    problem = call.problem
    assert problem is not None
    backend = backend_of(call.query)
    grad, of_total, of_norm = grad_output, grad_output, None
    finishing = dropout_backend(grad, call.output_dropout)
    if call.norm is not None:
        of_total, grad, *sums = finishing.residual_norm_backward(grad, call.total, call.norm, call.output_dropout)
        of_norm = sums[0], sums[1]
    elif call.output_dropout is not None:
        grad, _ = finishing.residual_norm(grad, call.output_dropout)
    grad_attended = _output_gradient(call, backend, grad, targets)
    if grad_weights is not None and call.average:
        grad_weights = grad_weights[:, None]
    wanted = call.float_masks if mask_gradients else {}
    keys = problem.keys - problem.mask.extra
    of_query, of_key, of_value, of_masks = backend_for(problem).attention_backward(
        problem, grad_attended, call.attended, call.rows, grad_weights, 1 / problem.heads if call.average else 1.0,
        [(*mask.shape[:3], keys) for mask in wanted.values()],
    )  # fmt: skip
    named = {"query": (call.query, of_query), "key": (call.key, of_key), "value": (call.value, of_value)}
    before = call.cache.shape[3] if call.cache is not None else 0
    inputs: dict[str, Array | None] = {}
    for name, (x, of_heads) in named.items():
        start = 0 if name == "query" else before
        own = of_heads[:, :, start : start + x.shape[1]]
        inputs[name] = None if name in call.heads else _input_gradient(call, backend, name, x, own, targets)
    return LayerGradients(
        **inputs,
        bias_rows=_bias_row_gradients(call, of_key[:, :, keys], of_value[:, :, keys]) if call.bias_rows else None,
        heads={name: named[name][1][:, :, : x.shape[2]] for name, x in call.heads.items()},
        cache=call.xp.stack([of_key[:, :, :before], of_value[:, :, :before]]) if call.cache is not None else None,
        masks={
            name: _mask_gradient(mask, gradient)
            for (name, mask), gradient in zip(wanted.items(), of_masks, strict=True)
        },
        residual=of_total,
        norm=of_norm,
    )


def _key_value_heads(call: LayerCall, backend: Any) -> tuple[Array, Array, Array | None]:
    """Heads (N, Hk, T, D) of key and value, and the cache grown by the new ones."""
    store, before = None, 0
    if call.cache is not None:
        batch, heads, before, width = call.cache.shape[1:]
        store = call.xp.empty((2, batch, heads, before + call.key.shape[1], width), call.key.dtype)
        store[:, :, :, :before] = call.cache
    made = []
    for i, (name, x) in enumerate((("key", call.key), ("value", call.value))):
        rows: list[Array | None] = [call.bias_rows[i]] if call.bias_rows else []
        rows += [None] * call.zero_row
        weight, bias = call.weights.get(f"{name[0]}_weight"), call.weights.get(f"{name[0]}_bias")
        if name in call.heads:
            made.append(with_rows(call.heads[name], rows))
        elif store is None:
            made.append(project_heads(backend, x, weight, bias, call.num_kv_heads, rows))
        else:
            project_heads(backend, x, weight, bias, call.num_kv_heads, out=store[i][:, :, before:])
            made.append(with_rows(store[i], rows))
    return made[0], made[1], store


def _output_gradient(call: LayerCall, backend: Any, grad: Array, targets: dict[str, Array]) -> Array:
    """Gradient of the heads (N, H, L, Dv); those of Wo and bo go into their targets."""
    z = call.attended
    assert z is not None
    batch, heads, queries, width = z.shape
    weight = call.weights.get("o_weight")
    if weight is None:
        return grad.reshape(batch, queries, heads, width).swapaxes(1, 2)
    joined = z.swapaxes(1, 2).reshape(batch, queries, heads * width)
    grad_joined = call.xp.empty(joined.shape, grad.dtype)
    linear_gradients(backend, rows_of(joined), rows_of(grad), weight, targets["o_weight"], targets.get("o_bias"),
                     rows_of(grad_joined))  # fmt: skip
    return grad_joined.reshape(batch, queries, heads, width).swapaxes(1, 2)


def _input_gradient(
    call: LayerCall, backend: Any, name: str, x: Array, grad_heads: Array, targets: dict[str, Array]
) -> Array:
    """Gradient of query, key or value; those of its projection go into their targets."""
    letter = name[0]
    weight = call.weights.get(f"{letter}_weight")
    if weight is None:
        return sum_over(grad_heads, 1)
    grad_x = empty_like_rows(x)
    problem = call.problem
    assert problem is not None
    left_out = problem.mask.may_leave_out(problem.queries, problem.keys - problem.mask.extra)
    if left_out and not (call.xp is np and np.isfinite(x).all()):
        # A position that took no part has gradient 0; what lies there must not reach the weights as 0 * NaN. Whether a
        # device's array has such values is not asked, for that would wait for it.
        x = call.xp.where((grad_heads == 0).all(axis=(1, 3))[..., None], 0, x).astype(x.dtype)
    linear_gradients(backend, rows_of(x), heads_of(grad_heads), weight, targets[f"{letter}_weight"],
                     targets.get(f"{letter}_bias"), rows_of(grad_x))  # fmt: skip
    return grad_x


def _bias_row_gradients(call: LayerCall, of_key: Array, of_value: Array) -> tuple[Array, Array]:
    """From (N, Hk, D) each to the shape of the row: (1, 1, Hk*D), or (1, 1, D) where every head got it whole."""
    assert call.bias_rows is not None
    made = []
    for letter, grad, row in zip("kv", (of_key, of_value), call.bias_rows, strict=True):
        total = sum_over(grad, 0)
        projected = f"{letter}_weight" in call.weights
        made.append((total if projected else sum_over(total, 0)).reshape(row.shape))
    return made[0], made[1]


def _mask_gradient(mask: Array, gradient: Array) -> Array:
    """Summed over the keys too where the mask has one column for all."""
    if gradient.shape[3] != mask.shape[3]:
        gradient = gradient.sum(axis=3, keepdims=True)
    return gradient.astype(mask.dtype)
