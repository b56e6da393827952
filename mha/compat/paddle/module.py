"""``paddle.incubate.nn.FusedMultiHeadAttention`` on NumPy and CuPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mha.compat.module_base import FrontEndModule, ModuleGradients, check_heads
from mha.compat.paddle.functional import fused_multi_head_attention_vjp
from mha.problem import checked_probability
from mha.random import next_generator

Array = NDArray[Any]


class FusedMultiHeadAttention(FrontEndModule):
    """Paddle's fused attention layer: norm, self-attention, dropout, residual link.

    Parameters
    ----------
    embed_dim, num_heads : int
        E and H; E must be divisible by H.
    dropout_rate, attn_dropout_rate : float
        Of the output and of the attention weights, in training: 0.5 each unless given.
    kdim, vdim : int, optional
        Have no effect, as in Paddle: key and value are the query.
    normalize_before : bool
        Norm of the input, else of the result.
    need_weights : bool
        Only False.
    qkv_weight_attr, qkv_bias_attr, linear_weight_attr, linear_bias_attr, pre_ln_scale_attr, pre_ln_bias_attr, \
ln_scale_attr, ln_bias_attr : optional
        None: the parameter starts as Paddle's does. An array: its initial values. False: no bias, or none of the norm.
    epsilon : float
        Of the norm.
    nranks, ring_id : int
        1 and -1: no tensor parallelism. With ranks the layer holds the heads of one.
    transpose_qkv_wb : bool
        Keep qkv_weight as (E, 3*H*D) and qkv_bias as (3*H*D,).
    name : str, optional
        Has no effect.
    device, dtype : optional
        None or "cpu": NumPy arrays, "gpu:0" ...: CuPy arrays; float32 unless given.

    Attributes
    ----------
    qkv_weight, qkv_bias, linear_weight, linear_bias, pre_ln_scale, pre_ln_bias, ln_scale, ln_bias : arrays or None
        The norm that is not in use has none.

    Raises
    ------
    ValueError
        For sizes and flags that contradict each other.

    Notes
    -----
    After PaddlePaddle 3.3, its initial distributions included, drawn from `mha.seed`. Paddle silently ignores another
    key or value; here it is an error.
    """

    _SETTINGS = ("dropout_rate", "attn_dropout_rate", "kdim", "vdim", "normalize_before")

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout_rate: float = 0.5,
        attn_dropout_rate: float = 0.5,
        kdim: int | None = None,
        vdim: int | None = None,
        normalize_before: bool = False,
        need_weights: bool = False,
        qkv_weight_attr: Any = None,
        qkv_bias_attr: Any = None,
        linear_weight_attr: Any = None,
        linear_bias_attr: Any = None,
        pre_ln_scale_attr: Any = None,
        pre_ln_bias_attr: Any = None,
        ln_scale_attr: Any = None,
        ln_bias_attr: Any = None,
        epsilon: float = 1e-05,
        nranks: int = 1,
        ring_id: int = -1,
        transpose_qkv_wb: bool = False,
        name: str | None = None,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        check_heads(embed_dim, num_heads)
        if need_weights:
            raise ValueError("need_weights=True: the fused layer returns no weights. Leave it at False.")
        if nranks < 1 or num_heads % nranks or (nranks > 1 and ring_id == -1):
            raise ValueError(
                f"nranks {nranks} with num_heads {num_heads} and ring_id {ring_id}: the ranks share out the heads and "
                "have a ring. Leave nranks at 1."
            )
        self.embed_dim, self.head_dim, self.num_heads = embed_dim, embed_dim // num_heads, num_heads // nranks
        self.dropout_rate = checked_probability("dropout_rate", dropout_rate)
        self.attn_dropout_rate = checked_probability("attn_dropout_rate", attn_dropout_rate)
        self.kdim, self.vdim, self.need_weights = kdim, vdim, False
        self.normalize_before, self.transpose_qkv_wb = bool(normalize_before), bool(transpose_qkv_wb)
        self._epsilon, self._nranks, self._ring_id = float(epsilon), nranks, ring_id
        self._start(device, dtype)
        attrs = {
            "qkv_weight": qkv_weight_attr, "qkv_bias": qkv_bias_attr, "linear_weight": linear_weight_attr,
            "linear_bias": linear_bias_attr, "pre_ln_scale": pre_ln_scale_attr, "pre_ln_bias": pre_ln_bias_attr,
            "ln_scale": ln_scale_attr, "ln_bias": ln_bias_attr,
        }  # fmt: skip
        unused = ("ln_scale", "ln_bias") if self.normalize_before else ("pre_ln_scale", "pre_ln_bias")
        rng = next_generator()
        for own, attr in attrs.items():
            if attr is False and own.endswith("weight"):
                raise TypeError(f"{own}_attr is False: a layer cannot be without {own}. Pass None or an array.")
            absent = own in unused or attr is False
            setattr(self, own, None if absent else self._initial(own, attr, rng))

    qkv_weight: Array
    qkv_bias: Array | None
    linear_weight: Array
    linear_bias: Array | None
    pre_ln_scale: Array | None
    pre_ln_bias: Array | None
    ln_scale: Array | None
    ln_bias: Array | None

    def _initial(self, name: str, attr: Any, rng: np.random.Generator) -> Array:
        heads, width, columns = self.num_heads, self.head_dim, self.embed_dim
        inner = heads * width
        flat = self.transpose_qkv_wb
        shapes: dict[str, tuple[int, ...]] = {
            "qkv_weight": (columns, 3 * inner) if flat else (3, heads, width, columns),
            "qkv_bias": (3 * inner,) if flat else (3, heads, width), "linear_weight": (inner, columns),
        }  # fmt: skip
        shape = shapes.get(name, (columns,))
        if attr is not None:
            if np.shape(attr) != shape:
                raise ValueError(f"{name}_attr has shape {np.shape(attr)}, the parameter {shape}. Pass None or that.")
            return self._array(attr)
        if name.endswith("weight"):
            # The fans of four axes are those of a convolution: the first two axes, times the others.
            fans = (shape[0] + shape[1]) * int(np.prod(shape[2:]))
            bound = (6 / fans) ** 0.5
            return self._array(rng.uniform(-bound, bound, shape))
        return self._array(np.ones(shape) if name.endswith("scale") else np.zeros(shape))

    def _named(self) -> dict[str, Array | None]:
        names = ("qkv_weight", "qkv_bias", "linear_weight", "linear_bias", "pre_ln_scale", "pre_ln_bias", "ln_scale",
                 "ln_bias")  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def __call__(
        self,
        query: Array,
        key: Array | None = None,
        value: Array | None = None,
        attn_mask: Array | None = None,
        cache: Array | None = None,
    ) -> Any:
        """Run the layer; see `mha.compat.paddle.fused_multi_head_attention` for masks and errors.

        Parameters
        ----------
        query : (B, S, E) array
        key, value : None or the query
        attn_mask : array, optional
            Broadcastable to (B, H, S, C + S).
        cache : (2, B, H, C, D) array, optional

        Returns
        -------
        output : (B, S, E) array
        cache_out : (2, B, H, C + S, D) array, if a cache is given
        """
        for name, x in (("key", key), ("value", value)):
            if x is not None and x is not query:
                raise ValueError(
                    f"{name} {x.shape} is not the query {query.shape}: the layer is self-attention. Omit it."
                )
        parameters: dict[str, Any] = self._named()
        result, backward = fused_multi_head_attention_vjp(
            query, pre_layer_norm=self.normalize_before, cache_kv=cache, attn_mask=attn_mask,
            pre_ln_epsilon=self._epsilon, ln_epsilon=self._epsilon, dropout_rate=self.dropout_rate,
            attn_dropout_rate=self.attn_dropout_rate, training=self.training, ring_id=self._ring_id,
            num_heads=self.num_heads, transpose_qkv_wb=self.transpose_qkv_wb, **parameters,
        )  # fmt: skip
        self._keep(backward)
        return result

    forward = __call__

    def backward(self, grad_output: Array, *, mask_gradients: bool = False) -> ModuleGradients:
        """Gradients of this thread's latest call in training, which is used up.

        Raises
        ------
        RuntimeError
            Without a call in training since the last backward.
        TypeError, ValueError
            If the gradient does not fit the output.
        """
        gradients = self._latest.get()(grad_output, None, mask_gradients)
        self._keep(None)
        parameters = {name: gradients[name] for name in self.state_dict()}
        return ModuleGradients(gradients["x"], None, None, parameters, None, gradients.get("attn_mask"))

    def __repr__(self) -> str:
        listed = {name: getattr(self, name) for name in self._SETTINGS}
        listed |= {f"{name}_attr": False for name, x in self._named().items() if x is None and self._in_use(name)}
        listed |= {"epsilon": self._epsilon, "nranks": self._nranks, "ring_id": self._ring_id,
                   "transpose_qkv_wb": self.transpose_qkv_wb, "dtype": self._dtype.name}  # fmt: skip
        options = ", ".join(f"{name}={value!r}" for name, value in listed.items())
        return f"FusedMultiHeadAttention({self.embed_dim}, {self.num_heads * self._nranks}, {options})"

    def _in_use(self, name: str) -> bool:
        return not (name.startswith("ln_") if self.normalize_before else name.startswith("pre_ln_"))
