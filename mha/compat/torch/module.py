"""``torch.nn.MultiheadAttention`` on NumPy and CuPy arrays, with torch's own parameters and state dict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mha import layer, optional
from mha.compat.module_base import FrontEndModule, ModuleGradients, check_heads
from mha.compat.stacked import StackedCall
from mha.dispatch import backend_for
from mha.problem import RowStatistics, checked_probability
from mha.random import next_generator, xavier_uniform

Array = NDArray[Any]

#: Parameters by the names that `StackedCall` has for them.
_NAMES = {
    "in_weight": "in_proj_weight", "q_weight": "q_proj_weight", "k_weight": "k_proj_weight",
    "v_weight": "v_proj_weight", "in_bias": "in_proj_bias", "bias_k": "bias_k", "bias_v": "bias_v",
    "out_weight": "out_proj.weight", "out_bias": "out_proj.bias",
}  # fmt: skip


class Linear:
    """The output projection: its parameters by torch's names."""

    def __init__(self, weight: Array, bias: Array | None) -> None:
        self.weight, self.bias = weight, bias

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def __repr__(self) -> str:
        bias = self.bias is not None
        return f"Linear(in_features={self.in_features}, out_features={self.out_features}, bias={bias})"


class MultiheadAttention(FrontEndModule):
    """``torch.nn.MultiheadAttention``.

    Parameters
    ----------
    embed_dim, num_heads : int
        E and H; E must be divisible by H.
    dropout : float
        Of the attention weights, in training.
    bias : bool
        Whether the projections have biases.
    add_bias_kv, add_zero_attn : bool
        Append a learned key and value, or zeros; both are always visible.
    kdim, vdim : int, optional
        Widths of key and value; None is E. Unless both are E the input weights are kept apart.
    batch_first : bool
        Inputs and output are (N, length, width); by default (length, N, width).
    device : optional
        None or "cpu": NumPy arrays; "cuda", "cuda:0" ...: CuPy arrays.
    dtype : optional
        float16, bfloat16, float32 (None) or float64, or torch's name for one.

    Attributes
    ----------
    in_proj_weight : (3*E, E) array, or None
    q_proj_weight, k_proj_weight, v_proj_weight : (E, E), (E, kdim), (E, vdim) arrays, or None beside in_proj_weight
    in_proj_bias : (3*E,) array or None
    bias_k, bias_v : (1, 1, E) arrays or None
    out_proj : `Linear`, its weight (E, E) and bias (E,) or None
    training : bool

    Raises
    ------
    ValueError
        For sizes that are not positive or not divisible, and a dropout that is no probability.

    Notes
    -----
    After PyTorch 2.13, its initial distributions included, drawn from `mha.seed`. Masks all hold and ``is_causal``
    needs none beside it; a query that sees no key gets the output bias.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        check_heads(embed_dim, num_heads)
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.dropout = checked_probability("dropout", dropout)
        self.batch_first, self.add_zero_attn = bool(batch_first), bool(add_zero_attn)
        self.head_dim = embed_dim // num_heads
        self._bias, self._bias_kv = bool(bias), bool(add_bias_kv)
        self._start(device, dtype)
        self._reset_parameters()

    @property
    def _qkv_same_embed_dim(self) -> bool:
        return self.kdim == self.vdim == self.embed_dim

    def _reset_parameters(self) -> None:
        """Draw the parameters anew."""
        rng, width = next_generator(), self.embed_dim

        def xavier(rows: int, columns: int) -> Array:
            return self._array(xavier_uniform(rng, rows, columns))

        zeros = [self._array(np.zeros(n)) if self._bias else None for n in (width, 3 * width)]
        self.out_proj = Linear(self._array(rng.uniform(-(width**-0.5), width**-0.5, (width, width))), zeros[0])
        self.in_proj_weight = self.q_proj_weight = self.k_proj_weight = self.v_proj_weight = None
        if self._qkv_same_embed_dim:
            self.in_proj_weight = xavier(3 * width, width)
        else:
            self.q_proj_weight, self.k_proj_weight, self.v_proj_weight = (
                xavier(width, columns) for columns in (width, self.kdim, self.vdim)
            )
        self.in_proj_bias = zeros[1]
        self.bias_k = self.bias_v = None
        if self._bias_kv:
            rows = (self._array(rng.normal(0, width**-0.5, (1, 1, width))) for _ in "kv")
            self.bias_k, self.bias_v = rows

    def __call__(
        self,
        query: Any,
        key: Any,
        value: Any,
        key_padding_mask: Array | None = None,
        need_weights: bool = True,
        attn_mask: Array | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Any, Any]:
        """Run the layer.

        Parameters
        ----------
        query, key, value : arrays
            (L, N, E), (S, N, kdim) and (S, N, vdim), with `batch_first` N before the length; or unbatched (L, E),
            (S, kdim), (S, vdim). Or, where torch takes a nested tensor, one list three times: arrays (L_i, E), with
            `batch_first` and without masks.
        key_padding_mask : (N, S) array, optional
            bool: True = ignore. float: added to the scores. Unbatched (S,).
        need_weights, average_attn_weights : bool
            Return the weights, after dropout, averaged over the heads.
        attn_mask : array, optional
            (L, S), (N*H, L, S), or 4-D broadcastable to (N, H, L, S); bool: True = ignore. float: added.
        is_causal : bool
            Query i sees keys j <= i, with or without other masks.

        Returns
        -------
        output : array
            As the query; for a list a list of (L_i, E).
        weights : (N, L, T) array, per head (N, H, L, T), or None
            Batch first always; T counts appended keys. For a list a list of (L_i, L_i) or (H, L_i, L_i).

        Raises
        ------
        ValueError, TypeError
            For inputs and masks that do not fit; the message names every shape and dtype.
        """
        masks = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask}
        options = {"need_weights": need_weights, "average": average_attn_weights, "is_causal": is_causal}
        if isinstance(query, (list, tuple)):
            made, lengths, result = self._ragged(query, key, value, masks, options)
        else:
            made, lengths = self._build(query, key, value, length_first=not self.batch_first, **masks, **options), None
            result = made.forward()
        self._keep((made, lengths))
        return result

    forward = __call__

    def backward(
        self, grad_output: Any, grad_weights: Array | None = None, *, mask_gradients: bool = False
    ) -> ModuleGradients:
        """Gradients of this thread's latest call in training, which is used up.

        Parameters
        ----------
        grad_output : array, or list of arrays
            Gradient of the output.
        grad_weights : array, optional
            Gradient of the returned weights; not for lists.
        mask_gradients : bool
            Also return the gradients of float masks.

        Raises
        ------
        RuntimeError
            Without a call in training since the last backward.
        ValueError, TypeError
            If the gradients do not fit what the call returned.
        """
        made, lengths = self._latest.get()
        if lengths is not None:
            grad_output = _joined(grad_output, "grad_output", lengths)
        gradients = made.backward(grad_output, grad_weights, mask_gradients)
        self._keep(None)
        inputs = [gradients[name] for name in ("query", "key", "value")]
        if lengths is not None:
            inputs = [_parts(x, lengths) for x in inputs]
        masks = gradients.get("key_padding_mask"), gradients.get("attn_mask")
        parameters = {own: gradients[name] for name, own in _NAMES.items() if name in gradients}
        return ModuleGradients(inputs[0], inputs[1], inputs[2], parameters, *masks)

    def _build(self, query: Array, key: Array, value: Array, **options: Any) -> StackedCall:
        state = self.state_dict()
        return StackedCall.build(
            query, key, value, {name: state.get(own) for name, own in _NAMES.items()}, self.num_heads,
            embed_dim=self.embed_dim, add_zero_attn=self.add_zero_attn, dropout_p=self.dropout,
            training=self.training, **options,
        )  # fmt: skip

    def _ragged(
        self, query: Any, key: Any, value: Any, masks: dict[str, Any], options: dict[str, Any]
    ) -> tuple[StackedCall, list[int] | None, tuple[Any, Any]]:
        """One unbatched call over all samples end to end, in which each query sees the keys of its own sample."""
        given = [name for name, mask in masks.items() if mask is not None]
        extra = self.add_zero_attn or self.bias_k is not None
        if key is not query or value is not query or not self.batch_first or given or extra:
            raise ValueError(
                f"a list of {len(query)} arrays with key {'the same' if key is query else 'another'}, value "
                f"{'the same' if value is query else 'another'}, batch_first={self.batch_first}, masks {given}, "
                f"appended keys {extra}. A list goes in three times, batch first, without masks and appended keys."
            )
        need_weights = options.pop("need_weights")
        if need_weights and self.training and self.dropout > 0:
            raise ValueError(
                f"need_weights with a list of {len(query)} arrays and dropout {self.dropout} in training. "
                "Pass need_weights=False, or the samples one by one."
            )
        lengths = [len(x) for x in query]
        x = _joined(query, "query", lengths)
        made = self._build(x, x, x, length_first=False, need_weights=False, **options)
        bounds = np.repeat([(0, *accumulate(lengths))[:-1], [*accumulate(lengths)]], lengths, axis=1)
        made.call.mask = replace(made.call.mask, row_ranges=self._xp.asarray(bounds.astype(np.int64)))
        output = made.forward()[0]
        weights = _weights_of_parts(made.call, lengths, options["average"]) if need_weights else None
        return made, lengths, (_parts(output, lengths), weights)

    def _named(self) -> dict[str, Array | None]:
        names = [own for own in _NAMES.values() if "." not in own]
        found: dict[str, Array | None] = {name: getattr(self, name) for name in names}
        return found | {"out_proj.weight": self.out_proj.weight, "out_proj.bias": self.out_proj.bias}

    def __repr__(self) -> str:
        values = {
            "dropout": self.dropout, "bias": self._bias, "add_bias_kv": self._bias_kv,
            "add_zero_attn": self.add_zero_attn, "kdim": self.kdim, "vdim": self.vdim,
            "batch_first": self.batch_first, "dtype": self._dtype.name,
        }  # fmt: skip
        listed = ", ".join(f"{name}={value!r}" for name, value in values.items())
        return f"{type(self).__name__}({self.embed_dim}, {self.num_heads}, {listed})"


def _joined(parts: Any, name: str, lengths: list[int]) -> Array:
    """The parts (L_i, E) end to end."""
    if (
        not isinstance(parts, (list, tuple))
        or not parts
        or [len(x) for x in parts] != lengths
        or any(x.ndim != 2 for x in parts)
    ):
        found = [x.shape for x in parts] if isinstance(parts, (list, tuple)) else type(parts).__name__
        raise ValueError(f"{name} is {found} where a list of (length, width) of lengths {lengths} is expected.")
    xp: ModuleType = optional.array_module(*parts)
    joined: Array = xp.concatenate(list(parts))
    return joined


def _parts(x: Array, lengths: Sequence[int]) -> list[Array]:
    """Views of the samples that lie end to end on the first axis."""
    return [x[start:stop] for start, stop in pairwise((0, *accumulate(lengths)))]


def _weights_of_parts(call: layer.LayerCall, lengths: Sequence[int], average: bool) -> list[Array]:
    """Each sample's own weights (L_i, L_i) or (H, L_i, L_i): no array over pairs of different samples is made."""
    problem, rows = call.problem, call.rows
    assert problem is not None
    assert rows is not None
    weights = []
    for start, stop in pairwise((0, *accumulate(lengths))):
        part = slice(start, stop)
        one = replace(problem, mask=replace(problem.mask, row_ranges=None),
                      **{name: getattr(problem, name)[:, :, part] for name in ("query", "key", "value")})  # fmt: skip
        xp = problem.xp
        scale = None if rows.scale is None else xp.ascontiguousarray(rows.scale[:, :, part])
        statistics = RowStatistics(xp.ascontiguousarray(rows.shift[:, :, part]), scale)
        weights.append(backend_for(one).attention_weights(one, statistics, average)[0])
    return weights
