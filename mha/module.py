"""`MultiHeadAttention`: a layer that holds its packed vector."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mha.convert.constructors import FromFormats
from mha.convert.parameters import PackedParameters
from mha.dispatch import backend_of, checked_library
from mha.exchange import in_kind
from mha.front import LatestCall
from mha.functional import MultiHeadAttentionGradients
from mha.matrix import rows_of
from mha.optional import array_module, library_named
from mha.packed_call import PackedCall
from mha.packing import PackedLayout
from mha.problem import checked_probability
from mha.random import next_generator, xavier_uniform

Array = NDArray[Any]


class MultiHeadAttention(FromFormats):
    """Multi-head attention with its parameters in one packed vector, batch first.

    Parameters
    ----------
    embed_dim, num_heads : int
        E and H; E must be divisible by H.
    attn_dropout, out_dropout : float
        Dropout of the attention weights and of the output, in training.
    bias : bool
        Whether the four projections have biases.
    add_bias_kv : bool
        Learn one key and value appended to every sample's.
    add_zero_attn : bool
        Append a key and value of zeros.
    kdim, vdim : int, optional
        Widths of key and value; None is embed_dim.
    num_kv_heads : int, optional
        Grouped-query attention: Hk heads of key and value.
    scale : float, optional
        Factor on the scores; None is (E // H) ** -0.5.
    dtype : dtype
        Of the parameters and inputs: float16, bfloat16, float32 or float64.
    xp : module
        The array library of the parameters.

    Attributes
    ----------
    io_weight_bias : array, shape (layout.length,)
    layout : PackedLayout
    bias_k, bias_v : (1, 1, width) arrays or None
    training : bool
        True at first.

    Notes
    -----
    After MegEngine 1.13's module of this name. Each matrix starts Xavier-uniform, biases at 0, drawn from `mha.seed`.
    Calls from several threads are safe; each thread has its own latest call for `backward`.
    """

    _OPTIONS: ClassVar[tuple[str, ...]] = (
        "embed_dim", "num_heads", "attn_dropout", "out_dropout", "bias", "add_bias_kv", "add_zero_attn", "kdim", "vdim",
        "num_kv_heads", "scale", "dtype",
    )  # fmt: skip

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        attn_dropout: float = 0.0,
        out_dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        *,
        num_kv_heads: int | None = None,
        scale: float | None = None,
        dtype: DTypeLike = np.float32,
        xp: ModuleType = np,
    ) -> None:
        layout = PackedLayout(
            embed_dim, num_heads, kdim=kdim, vdim=vdim, num_kv_heads=num_kv_heads,
            qbias=bias, kbias=bias, vbias=bias, obias=bias,
        )  # fmt: skip
        self._set_up(layout, attn_dropout, out_dropout, add_bias_kv, add_zero_attn, scale, dtype, xp)
        self.reset_parameters()

    def _set_up(
        self,
        layout: PackedLayout,
        attn_dropout: float = 0.0,
        out_dropout: float = 0.0,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        scale: float | None = None,
        dtype: DTypeLike = np.float32,
        xp: ModuleType = np,
    ) -> None:
        self.layout = layout
        self.attn_dropout = checked_probability("attn_dropout", attn_dropout)
        self.out_dropout = checked_probability("out_dropout", out_dropout)
        self.add_bias_kv, self.add_zero_attn = bool(add_bias_kv), bool(add_zero_attn)
        self.scale, self.dtype, self.xp = scale, np.dtype(dtype), checked_library(xp)
        self.training = True
        self._latest = LatestCall()
        self._frozen = False
        self._packed: dict[str, Any] = {}

    def reset_parameters(self) -> None:
        """Draw the parameters anew."""
        layout, xp, rng = self.layout, self.xp, next_generator()
        self.io_weight_bias = xp.zeros(layout.length, self.dtype)
        for name, view in layout.views(self.io_weight_bias).items():
            if name.endswith("weight"):
                view[...] = xp.asarray(xavier_uniform(rng, *view.shape)).astype(self.dtype)
        self.bias_k = self.bias_v = None
        if self.add_bias_kv:
            shapes = (1, 1, layout.kproj_size), (1, 1, layout.vproj_size)
            rows = (xp.asarray(xavier_uniform(rng, *shape)).astype(self.dtype) for shape in shapes)
            self.bias_k, self.bias_v = rows

    @in_kind
    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        key_padding_mask: Array | None = None,
        attn_mask: Array | None = None,
        need_weights: bool = False,
        average_attn_weights: bool = False,
        is_causal: bool = False,
        maybe_cudnn_style_mask: bool = False,
    ) -> tuple[Array, Array | None]:
        """Run the layer; see `multi_head_attention` for shapes, masks and errors.

        Returns
        -------
        attn_output : (N, L, E) array
        attn_output_weights : (N*H, L, T) array, averaged (N, L, T), or None
        """
        layout = self.layout
        parameters = dict(
            query=query, key=key, value=value, embed_dim=layout.embed_dim, num_heads=layout.num_heads,
            attn_drop=self.attn_dropout, out_drop=self.out_dropout, io_weight_bias=self.io_weight_bias,
            qproj_size=layout.qproj_size, kproj_size=layout.kproj_size, vproj_size=layout.vproj_size,
            oproj_size=layout.oproj_size, qbias=layout.qbias, kbias=layout.kbias, vbias=layout.vbias,
            obias=layout.obias,
            bias_k=self.bias_k, bias_v=self.bias_v, add_zero_attn=self.add_zero_attn,
            key_padding_mask=key_padding_mask, attn_mask=attn_mask, need_weights=need_weights,
            average_attn_weights=average_attn_weights, is_causal=is_causal,
            maybe_cudnn_style_mask=maybe_cudnn_style_mask, reslink=False, training=self.training,
            num_kv_heads=layout.num_kv_heads, scale=self.scale, window=None, softcap=None, causal_offset=0,
        )  # fmt: skip
        if not self.training:
            self._latest.keep(None)
            return PackedCall.evaluate(self._packed, **parameters)
        call = PackedCall.build(**parameters)
        result = call.forward()
        self._latest.keep(call)
        return result

    @in_kind
    def backward(
        self, grad_attn_output: Array, grad_attn_output_weights: Array | None = None
    ) -> MultiHeadAttentionGradients:
        """Gradients of this thread's latest call, which is used up.

        Raises
        ------
        RuntimeError
            Without a call in training since the last backward.
        TypeError, ValueError
            If the gradients do not fit what the call returned.
        """
        gradients = self._latest.get().backward(grad_attn_output, grad_attn_output_weights, mask_gradients=False)
        self._latest.keep(None)
        return MultiHeadAttentionGradients(*gradients)

    def train(self) -> Self:
        """Training mode: dropout applies, a backward may follow, the parameters may be written."""
        self._writeable(True)
        self.training = True
        return self

    def eval(self) -> Self:
        """Evaluation mode: no dropout, nothing kept."""
        self.training = False
        return self

    def freeze(self) -> Self:
        """Evaluation mode with the parameters read-only and laid out for the kernels, until `train` or a load.

        Costs the memory of the weights once more and saves packing them in every call.
        """
        self._writeable(False)
        backend = backend_of(self.io_weight_bias)
        views = self.layout.views(self.io_weight_bias)
        self._packed = {name: backend.pack(rows_of(x)) for name, x in views.items() if name.endswith("weight")}
        return self.eval()

    def _writeable(self, flag: bool) -> None:
        self._frozen = not flag
        self._packed = {}
        if self.xp is np:
            for x in (self.io_weight_bias, self.bias_k, self.bias_v):
                if x is not None:
                    x.flags.writeable = flag

    def state_dict(self) -> dict[str, Array]:
        """The parameters themselves: io_weight_bias, and bias_k and bias_v if there are any."""
        parameters = {"io_weight_bias": self.io_weight_bias, "bias_k": self.bias_k, "bias_v": self.bias_v}
        return {name: x for name, x in parameters.items() if x is not None}

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Copy parameters in.

        Raises
        ------
        ValueError
            If names or shapes differ from those of `state_dict`.
        """
        own = self.state_dict()
        listed = {name: np.shape(x) for name, x in state.items()}
        expected = {name: x.shape for name, x in own.items()}
        sizes = {name: int(np.prod(shape)) for name, shape in listed.items()}
        if sizes != {name: x.size for name, x in own.items()}:
            raise ValueError(f"state has {listed} where {expected} is expected. Build the layer with the same options.")
        self._writeable(True)
        for name, x in own.items():
            x[...] = self.xp.asarray(state[name]).reshape(x.shape)

    @classmethod
    def from_parameters(cls, parameters: PackedParameters, *, xp: ModuleType | None = None, **options: Any) -> Self:
        """A layer with converted parameters, of any layout; see `mha.convert`.

        Parameters
        ----------
        parameters : PackedParameters
        xp : module, optional
            The library to hold a copy of them in; None is their own.
        **options
            attn_dropout, out_dropout, add_zero_attn, scale.
        """
        xp = array_module(parameters.io_weight_bias) if xp is None else xp
        made = cls.__new__(cls)
        given: dict[str, Any] = {"scale": parameters.scale} | options
        made._set_up(
            parameters.layout, add_bias_kv=parameters.bias_k is not None, dtype=parameters.io_weight_bias.dtype, xp=xp,
            **given,
        )  # fmt: skip
        parameters.layout.views(parameters.io_weight_bias)  # raises if it does not fit
        made.io_weight_bias = xp.array(parameters.io_weight_bias).reshape(-1)
        made.bias_k, made.bias_v = (None if x is None else xp.array(x) for x in (parameters.bias_k, parameters.bias_v))
        return made

    @property
    def bias(self) -> bool:
        """Whether projections have biases."""
        layout = self.layout
        return layout.qbias or layout.kbias or layout.vbias or layout.obias

    def __repr__(self) -> str:
        layout = self.layout
        values: dict[str, Any] = {name: getattr(layout, name) for name in ("embed_dim", "num_heads")}
        values |= {name: getattr(self, name) for name in self._OPTIONS[2:7]}
        values |= {name: getattr(layout, name) for name in ("kdim", "vdim", "num_kv_heads")}
        values |= {"scale": self.scale, "dtype": self.dtype.name}
        usual = {f"{letter}bias": self.bias for letter in "qkvo"}
        if layout != PackedLayout(
            layout.embed_dim, layout.num_heads, kdim=layout.kdim, vdim=layout.vdim, num_kv_heads=layout.num_kv_heads,
            **usual,
        ):  # fmt: skip
            values["layout"] = layout
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in values.items())})"

    def __getstate__(self) -> dict[str, Any]:
        state = {name: x for name, x in self.__dict__.items() if name != "_packed"}
        return state | {"xp": self.xp.__name__}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.xp = library_named(state["xp"])
        self._packed = {}
        if self._frozen:
            self.freeze()
