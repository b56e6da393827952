"""A call of the packed layer: MegEngine's parameters in, a `LayerCall` out, and its gradients back again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from mha import front, layer
from mha.cpu.replay import repeat
from mha.mask_checks import Sizes
from mha.masks import float_masks, for_multi_head_attention
from mha.optional import array_module
from mha.packing import PackedLayout
from mha.problem import check_dtypes, usable

Array = NDArray[Any]


@dataclass(eq=False)
class PackedCall:
    """One call of `multi_head_attention`, validated."""

    PARAMETERS: ClassVar[tuple[str, ...]] = (
        "query", "key", "value", "embed_dim", "num_heads", "attn_drop", "out_drop", "io_weight_bias", "qproj_size",
        "kproj_size", "vproj_size", "oproj_size", "qbias", "kbias", "vbias", "obias", "bias_k", "bias_v",
        "add_zero_attn", "key_padding_mask", "attn_mask", "need_weights", "average_attn_weights", "is_causal",
        "maybe_cudnn_style_mask", "reslink", "training", "num_kv_heads", "scale", "window", "softcap", "causal_offset",
    )  # fmt: skip

    #: Arrays that few calls have, and what makes a call depend on more than shapes: such calls are not repeated.
    _RARE: ClassVar[tuple[str, ...]] = (
        "bias_k", "bias_v", "key_padding_mask", "attn_mask", "add_zero_attn", "need_weights", "training",
    )  # fmt: skip
    _ARRAYS: ClassVar[tuple[str, ...]] = ("query", "key", "value", "io_weight_bias")
    _OPTIONS: ClassVar[tuple[str, ...]] = tuple(sorted({*PARAMETERS} - {*_RARE} - {*_ARRAYS}))

    call: layer.LayerCall
    layout: PackedLayout
    vector: Array
    masks: dict[str, Array | None]
    batched: bool

    @classmethod
    def build(cls, **p: Any) -> PackedCall:
        """Check a call of `multi_head_attention`, whose parameters these are."""
        given = {name: p[name] for name in ("query", "key", "value")}
        if p["io_weight_bias"] is None:
            raise TypeError("io_weight_bias is None, not an array. Pass one of no elements if no projection is on.")
        xp = array_module(*given.values(), p["io_weight_bias"], p["bias_k"], p["bias_v"])
        check_dtypes(given | {n: p[n] for n in ("io_weight_bias", "bias_k", "bias_v") if p[n] is not None})
        batched = front.check_inputs(**given, embed_dim=p["embed_dim"])
        layout = PackedLayout(
            p["embed_dim"], p["num_heads"], kdim=p["key"].shape[-1], vdim=p["value"].shape[-1],
            num_kv_heads=p["num_kv_heads"],
            **{f"{x}proj_size": p[f"{x}proj_size"] for x in "qkvo"}, **{f"{x}bias": p[f"{x}bias"] for x in "qkvo"},
        )  # fmt: skip
        q, k, v = (usable(x if batched else x[None], xp) for x in given.values())
        vector = usable(p["io_weight_bias"], xp)
        weights = layout.views(vector)
        bias_rows = front.check_bias_rows(
            p["bias_k"], p["bias_v"], layout.kproj_size or layout.kdim, layout.vproj_size or layout.vdim
        )
        batch, queries, keys = q.shape[0], q.shape[1], k.shape[1]
        extra = (bias_rows is not None) + bool(p["add_zero_attn"])
        masks = {name: p[name] for name in ("key_padding_mask", "attn_mask")}
        spec = for_multi_head_attention(
            **masks, batch=batch, heads=layout.num_heads, queries=queries, keys=keys, dtype=q.dtype,
            is_causal=p["is_causal"], maybe_cudnn_style_mask=p["maybe_cudnn_style_mask"], window=p["window"],
            causal_offset=p["causal_offset"], extra=extra, batched=batched, xp=xp,
        )  # fmt: skip
        if p["reslink"] and layout.output_size != layout.embed_dim:
            raise ValueError(
                f"reslink adds the query {p['query'].shape} to an output of width {layout.output_size}. "
                "Set oproj_size to embed_dim, or clear reslink."
            )
        dropout, output_dropout = front.dropouts(
            ("attn_drop", "out_drop"), p["attn_drop"], p["out_drop"], p["training"]
        )
        sizes = Sizes((batch,), layout.num_heads, queries, keys)
        call = layer.LayerCall(
            q, k, v, weights, layout.num_heads, layout.num_kv_heads, mask=spec,
            scale=layout.scale if p["scale"] is None else p["scale"], softcap=p["softcap"], dropout=dropout,
            output_dropout=output_dropout, bias_rows=bias_rows, zero_row=bool(p["add_zero_attn"]),
            residual=q if p["reslink"] else None, need_weights=bool(p["need_weights"]),
            average=bool(p["average_attn_weights"]), float_masks=float_masks(**masks, sizes=sizes),
        )  # fmt: skip
        return cls(call, layout, vector, masks, batched)

    @classmethod
    def evaluate(cls, packed: Mapping[str, Any], **p: Any) -> tuple[Array, Array | None]:
        """Output and weights of a call that no backward follows.

        `packed` are weights as a backend's `pack` has made them, by the names of the layout. A plain call that has been
        made before with arrays of such shapes is repeated without any of the checks, which its shapes have passed.
        """
        arrays = [p[name] for name in cls._ARRAYS]
        rare = any(p[name] is not None and p[name] is not False for name in cls._RARE)
        if rare or type(arrays[0]) is not np.ndarray:
            return cls._evaluated(packed, p)
        names = tuple(packed)

        def call(*arrays: Array) -> tuple[Array, Array | None]:
            there = {name: packed[name]._replace(memory=x) for name, x in zip(names, arrays[4:], strict=True)}
            return cls._evaluated(there, p | dict(zip(cls._ARRAYS, arrays, strict=False)))

        held = (*arrays, *(matrix.memory for matrix in packed.values()))
        return repeat(call, held, ("packed", names, *map(p.__getitem__, cls._OPTIONS)))

    @classmethod
    def _evaluated(cls, packed: Mapping[str, Any], p: Mapping[str, Any]) -> tuple[Array, Array | None]:
        call = cls.build(**p)
        call.call.weights |= packed
        return call.forward()

    def reserve(self) -> tuple[Any, Any]:
        """The two reserve spaces: dropout states, and this call."""
        states = tuple(d.state if d is not None else None for d in (self.call.dropout, self.call.output_dropout))
        return states, self

    def forward(self) -> tuple[Array, Array | None]:
        """Output and weights, without the batch axis if the inputs have none."""
        output, weights, _ = layer.forward(self.call)
        if weights is not None:
            weights = weights.reshape(self._weights_shape())
        return output if self.batched else output[0], weights

    def backward(self, grad_output: Array, grad_weights: Array | None, mask_gradients: bool) -> tuple[Any, ...]:
        """Gradients in the order of `MultiHeadAttentionGradients`."""
        call = self.call
        shape = call.output_shape
        grad = front.gradient_like("grad_attn_output", grad_output, shape[not self.batched :], call.query)
        grad_weights = front.weights_gradient(
            "grad_attn_output_weights", grad_weights, self._weights_shape(), call.weights_shape, call.need_weights
        )
        grad = grad.reshape(shape)
        grad_vector = call.xp.zeros(self.vector.shape, self.vector.dtype)
        made = layer.backward(call, grad, grad_weights, self.layout.views(grad_vector), mask_gradients)
        inputs = [x for x in made[:3] if x is not None]
        if call.residual is not None:
            inputs[0] = inputs[0] + made.residual
        inputs = [x if self.batched else x[0] for x in inputs]
        of_masks = {name: x.reshape(self.masks[name].shape) for name, x in made.masks.items()}  # type: ignore[union-attr]
        return (*inputs, grad_vector, *(made.bias_rows or (None, None)), *map(of_masks.get, self.masks))

    def _weights_shape(self) -> tuple[int, ...]:
        """(N*H, L, T), averaged (N, L, T); unbatched (H, L, T) or (L, T)."""
        batch, *rest = self.call.weights_shape
        if not self.batched:
            return tuple(rest)
        return (batch, *rest) if self.call.average else (batch * rest[0], *rest[1:])
