"""The layer behind `multi_head_attention` and the module: projections around the attention core."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar

from numpy.typing import NDArray

from mha.dispatch import backend_for, backend_of, dropout_backend
from mha.masks import MaskSpec, for_multi_head_attention
from mha.matrix import heads_of, rows_of
from mha.optional import array_module
from mha.packing import PackedLayout
from mha.problem import AttentionProblem, Dropout, RowStatistics, check_dtypes, checked_probability, shapes_of, usable
from mha.projection import linear_gradients, project_heads, project_output, sum_over
from mha.random import DropoutState, next_state

Array = NDArray[Any]


@dataclass(eq=False)
class Call:
    """One call of the layer, validated; the forward adds what the backward needs."""

    PARAMETERS: ClassVar[tuple[str, ...]] = (
        "query", "key", "value", "embed_dim", "num_heads", "attn_drop", "out_drop", "io_weight_bias", "qproj_size",
        "kproj_size", "vproj_size", "oproj_size", "qbias", "kbias", "vbias", "obias", "bias_k", "bias_v",
        "add_zero_attn", "key_padding_mask", "attn_mask", "need_weights", "average_attn_weights", "is_causal",
        "maybe_cudnn_style_mask", "reslink", "training", "num_kv_heads", "scale", "window", "softcap", "causal_offset",
    )  # fmt: skip

    inputs: dict[str, Array]
    layout: PackedLayout
    vector: Array
    bias_rows: tuple[Array, Array] | None
    appended: tuple[list[Array | None], list[Array | None]]
    masks: dict[str, Array | None]
    spec: MaskSpec
    scale: float
    softcap: float | None
    dropout: Dropout | None
    output_dropout: Dropout | None
    reslink: bool
    need_weights: bool
    average: bool
    batched: bool
    weights: dict[str, Array] = field(default_factory=dict)
    problem: AttentionProblem | None = None
    heads: Array | None = None
    rows: RowStatistics | None = None

    @classmethod
    def build(cls, **p: Any) -> Call:
        """Check a call of `multi_head_attention`, whose parameters these are."""
        given = {name: p[name] for name in ("query", "key", "value")}
        if p["io_weight_bias"] is None:
            raise TypeError("io_weight_bias is None, not an array. Pass one of no elements if no projection is on.")
        xp = array_module(*given.values(), p["io_weight_bias"], p["bias_k"], p["bias_v"])
        check_dtypes(given | {n: p[n] for n in ("io_weight_bias", "bias_k", "bias_v") if p[n] is not None})
        batched = _check_inputs(given, p["embed_dim"])
        layout = PackedLayout(
            p["embed_dim"], p["num_heads"], kdim=p["key"].shape[-1], vdim=p["value"].shape[-1],
            num_kv_heads=p["num_kv_heads"],
            **{f"{x}proj_size": p[f"{x}proj_size"] for x in "qkvo"}, **{f"{x}bias": p[f"{x}bias"] for x in "qkvo"},
        )  # fmt: skip
        inputs = {name: usable(x if batched else x[None], xp) for name, x in given.items()}
        vector = usable(p["io_weight_bias"], xp)
        views = layout.views(vector)
        bias_rows = _bias_rows(layout, p["bias_k"], p["bias_v"])
        zeros: list[Array | None] = [None] if p["add_zero_attn"] else []
        appended = ([*bias_rows[:1], *zeros], [*bias_rows[1:], *zeros]) if bias_rows else (zeros, zeros)
        batch, queries, keys = inputs["query"].shape[0], inputs["query"].shape[1], inputs["key"].shape[1]
        spec = for_multi_head_attention(
            p["attn_mask"], p["key_padding_mask"], batch=batch, heads=layout.num_heads, queries=queries, keys=keys,
            dtype=inputs["query"].dtype, is_causal=p["is_causal"], maybe_cudnn_style_mask=p["maybe_cudnn_style_mask"],
            window=p["window"], causal_offset=p["causal_offset"], extra=len(appended[0]), batched=batched, xp=xp,
        )  # fmt: skip
        if p["reslink"] and layout.output_size != layout.embed_dim:
            raise ValueError(
                f"reslink adds the query {p['query'].shape} to an output of width {layout.output_size}. "
                "Set oproj_size to embed_dim, or clear reslink."
            )
        dropout, output_dropout = _dropouts(p["attn_drop"], p["out_drop"], p["training"])
        return cls(
            inputs=inputs, layout=layout, vector=vector, bias_rows=bias_rows, appended=appended,
            masks={name: p[name] for name in ("key_padding_mask", "attn_mask")}, spec=spec,
            scale=layout.scale if p["scale"] is None else p["scale"], softcap=p["softcap"], dropout=dropout,
            output_dropout=output_dropout, reslink=bool(p["reslink"]), need_weights=bool(p["need_weights"]),
            average=bool(p["average_attn_weights"]), batched=batched, weights=views,
        )  # fmt: skip

    @property
    def xp(self) -> ModuleType:
        """The arrays' library."""
        return array_module(self.inputs["query"])

    def reserve(self) -> tuple[Any, Any]:
        """The two reserve spaces: dropout states, and this call."""
        states = tuple(d.state if d is not None else None for d in (self.dropout, self.output_dropout))
        return states, self


def forward(call: Call) -> tuple[Array, Array | None]:
    """Output (N, L, O) and weights, without the batch axis if the inputs have none."""
    layout, weights = call.layout, call.weights
    backend = backend_of(call.inputs["query"])
    counts = {"query": layout.num_heads, "key": layout.num_kv_heads, "value": layout.num_kv_heads}
    appended = {"query": [], "key": call.appended[0], "value": call.appended[1]}
    heads = {
        name: project_heads(
            backend, x, weights.get(f"{name[0]}_weight"), weights.get(f"{name[0]}_bias"), counts[name], appended[name]
        )
        for name, x in call.inputs.items()
    }
    problem = AttentionProblem.build(**heads, mask=call.spec, scale=call.scale, softcap=call.softcap,
                                     dropout=call.dropout)  # fmt: skip
    attention = backend_for(problem)
    z, _, rows = attention.attention_forward(problem, heads_last=True)
    attn_weights = None
    if call.need_weights:
        attn_weights = attention.attention_weights(problem, rows, call.average)
        if call.batched and not call.average:
            attn_weights = attn_weights.reshape(problem.batch * problem.heads, *attn_weights.shape[2:])
        elif not call.batched:
            attn_weights = attn_weights[0]
    output = project_output(backend, z, weights.get("o_weight"), weights.get("o_bias"))
    if call.output_dropout is not None or call.reslink:
        residual = call.inputs["query"] if call.reslink else None
        output = dropout_backend(output, call.output_dropout).output_dropout(output, call.output_dropout, residual)
    call.problem, call.heads, call.rows = problem, z, rows
    return output if call.batched else output[0], attn_weights


def backward(call: Call, grad_output: Array, grad_weights: Array | None, mask_gradients: bool) -> tuple[Any, ...]:
    """Gradients in the order of `MultiHeadAttentionGradients`."""
    problem, z = call.problem, call.heads
    assert problem is not None
    assert z is not None
    xp, layout, backend = call.xp, call.layout, backend_of(call.inputs["query"])
    grad = _like_output(call, grad_output)
    grad_vector = xp.zeros(call.vector.shape, call.vector.dtype)
    targets = layout.views(grad_vector)
    residual = grad if call.reslink else None
    if call.output_dropout is not None:
        grad = dropout_backend(grad, call.output_dropout).output_dropout(grad, call.output_dropout)
    grad_z = _output_gradient(call, backend, grad, targets)
    shapes = _mask_shapes(call) if mask_gradients else {}
    *grads, mask_grads = backend_for(problem).attention_backward(
        problem, grad_z, z, call.rows, _like_weights(call, grad_weights),
        1.0 / layout.num_heads if call.average else 1.0, list(shapes.values()),
    )  # fmt: skip
    inputs = [
        _input_gradient(call, backend, name, grad_heads, targets)
        for name, grad_heads in zip(("query", "key", "value"), grads, strict=True)
    ]
    if residual is not None:
        inputs[0] = inputs[0] + residual
    rows = _bias_row_gradients(call, grads[1], grads[2])
    by_name = dict(zip(shapes, mask_grads, strict=True))
    of_masks = [_mask_gradient(call.masks[name], by_name.get(name)) for name in ("key_padding_mask", "attn_mask")]
    return (*(x if call.batched else x[0] for x in inputs), grad_vector, *rows, *of_masks)


def _check_inputs(given: dict[str, Array], embed_dim: int) -> bool:
    """Shapes of query, key and value; returns whether they have a batch axis."""
    query, key, value = given.values()
    if (
        query.ndim == key.ndim == value.ndim in (2, 3)
        and query.shape[-1] == embed_dim
        and key.shape[:-1] == value.shape[:-1]
        and key.shape[:-2] == query.shape[:-2]
    ):
        return query.ndim == 3
    shapes = shapes_of(**given)
    if query.ndim not in (2, 3) or key.ndim != query.ndim or value.ndim != query.ndim:
        raise ValueError(f"{shapes}: all are (N, length, width) or, unbatched, (length, width). Check the axes.")
    if query.shape[-1] != embed_dim:
        raise ValueError(f"{shapes}: the query's width is not embed_dim {embed_dim}. Make them equal.")
    raise ValueError(
        f"{shapes}: query, key and value need the same batch size, key and value the same length. "
        "Inputs are batch first."
    )


def _bias_rows(layout: PackedLayout, bias_k: Array | None, bias_v: Array | None) -> tuple[Array, Array] | None:
    if bias_k is None and bias_v is None:
        return None
    expected = {"bias_k": (1, 1, layout.kproj_size or layout.kdim), "bias_v": (1, 1, layout.vproj_size or layout.vdim)}
    found = {name: None if x is None else x.shape for name, x in (("bias_k", bias_k), ("bias_v", bias_v))}
    if bias_k is None or bias_v is None or found != expected:
        listed = ", ".join(f"{name} {found[name]} where {expected[name]} is expected" for name in expected)
        raise ValueError(f"{listed}. Give both, of the projected widths, or neither.")
    return bias_k, bias_v


def _dropouts(attn_drop: float, out_drop: float, training: bool) -> tuple[Dropout | None, Dropout | None]:
    """The weights' dropout takes one state, the output's the next offset, whether or not both are in use."""
    drops = checked_probability("attn_drop", attn_drop), checked_probability("out_drop", out_drop)
    if not training or not any(drops):
        return None, None
    state = next_state(2)
    states = state, DropoutState(state.seed, state.offset + 1)
    first, second = (Dropout(p, s) if p > 0 else None for p, s in zip(drops, states, strict=True))
    return first, second


def _like_output(call: Call, grad: Array) -> Array:
    assert call.problem is not None
    batch, queries = call.inputs["query"].shape[:2]
    shape: tuple[int, ...] = (batch, queries, call.layout.output_size)[not call.batched :]
    array_module(call.inputs["query"], grad)
    if grad.shape != shape or grad.dtype != call.inputs["query"].dtype:
        raise (TypeError if grad.shape == shape else ValueError)(
            f"grad_attn_output is {grad.dtype} {grad.shape}, the output {call.inputs['query'].dtype} {shape}. "
            "Pass the gradient of that output."
        )
    return usable(grad if call.batched else grad[None], call.xp)


def _like_weights(call: Call, grad: Array | None) -> Array | None:
    """(N, H or 1, L, T)"""
    if grad is None:
        return None
    problem = call.problem
    assert problem is not None
    heads = 1 if call.average else problem.heads
    full = (problem.batch, heads, problem.queries, problem.keys)
    shape: tuple[int, ...] = (problem.batch if call.average else problem.batch * heads, *full[2:])
    if not call.batched:
        shape = full[2:] if call.average else full[1:]
    if not call.need_weights or grad.shape != shape:
        raise ValueError(
            f"grad_attn_output_weights {grad.shape}: the call returned weights {shape if call.need_weights else None}. "
            "Pass the gradient of those."
        )
    return usable(grad.reshape(full), call.xp)


def _output_gradient(call: Call, backend: Any, grad: Array, targets: dict[str, Array]) -> Array:
    """Gradient of the heads (N, H, L, Dv); those of Wo and bo go into their targets."""
    z = call.heads
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


def _input_gradient(call: Call, backend: Any, name: str, grad_heads: Array, targets: dict[str, Array]) -> Array:
    """Gradient of query, key or value; those of its projection go into their targets."""
    x, letter = call.inputs[name], name[0]
    own = grad_heads[:, :, : x.shape[1]]
    weight = call.weights.get(f"{letter}_weight")
    if weight is None:
        return sum_over(own, 1)
    grad_x = call.xp.empty(x.shape, x.dtype)
    if not call.xp.isfinite(x).all():
        # A position that took no part has gradient 0; what lies there must not reach the weights as 0 * NaN.
        x = call.xp.where((own == 0).all(axis=(1, 3))[..., None], 0, x).astype(x.dtype)
    linear_gradients(backend, rows_of(x), heads_of(own), weight, targets[f"{letter}_weight"],
                     targets.get(f"{letter}_bias"), rows_of(grad_x))  # fmt: skip
    return grad_x


def _bias_row_gradients(call: Call, grad_key: Array, grad_value: Array) -> tuple[Array | None, Array | None]:
    if call.bias_rows is None:
        return None, None
    keys = call.inputs["key"].shape[1]
    return tuple(
        _bias_row_gradient(grad[:, :, keys], projected, row)
        for grad, projected, row in zip(
            (grad_key, grad_value), (call.layout.kproj_size, call.layout.vproj_size), call.bias_rows, strict=True
        )
    )  # type: ignore[return-value]


def _bias_row_gradient(grad: Array, projected: int, row: Array) -> Array:
    """grad (N, Hk, D) -> (1, 1, Hk*D), or (1, 1, D) for a row that every head got whole."""
    total = sum_over(grad, 0)
    return (total if projected else sum_over(total, 0)).reshape(row.shape)


def _mask_shapes(call: Call) -> dict[str, tuple[int, int, int, int]]:
    """For each float mask (N or 1, H or 1, L or 1, S)."""
    problem = call.problem
    assert problem is not None
    keys = problem.keys - problem.mask.extra
    shapes = {}
    if call.spec.key_bias is not None:
        shapes["key_padding_mask"] = (problem.batch, 1, 1, keys)
    mask = call.masks["attn_mask"]
    if call.spec.pair_bias is not None and mask is not None:
        if mask.ndim == 4:
            shapes["attn_mask"] = (*mask.shape[:3], keys)
        else:
            shapes["attn_mask"] = (
                *((1, 1) if mask.ndim == 2 else (problem.batch, problem.heads)),
                problem.queries,
                keys,
            )
    return shapes


def _mask_gradient(mask: Array | None, gradient: Array | None) -> Array | None:
    if mask is None or gradient is None:
        return None
    if gradient.size != mask.size:
        gradient = gradient.sum(axis=-1, keepdims=True)
    return gradient.reshape(mask.shape).astype(mask.dtype)
