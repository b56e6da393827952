"""The layer against the reference backend and by central differences: projections, masks, options, memory layouts."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from tolerance import DTYPES, spacing

import mha
from mha import PackedLayout
from mha.random import DropoutState, attention_keep, output_keep, seed

N, L, S, H = 2, 5, 7, 2
COMBINATIONS = list(itertools.product([False, True], repeat=4))


def normal(*shape: int, dtype: Any = np.float64, salt: int = 0) -> Any:
    return np.random.default_rng([*shape, salt]).standard_normal(shape).astype(dtype)


def layer_arguments(
    on: tuple[bool, ...] = (True,) * 4, bias: bool = True, dtype: Any = np.float64, **options: Any
) -> Any:
    """A call with these projections on; sizes chosen so that every combination is possible, and all differ if on."""
    q_on, k_on, v_on, o_on = on
    kdim = {(True, True): 10, (True, False): 6, (False, True): 14, (False, False): 8}[q_on, k_on]
    sizes = {"qproj_size": 12 if q_on else 0, "kproj_size": 0 if not k_on else (12 if q_on else 16),
             "vproj_size": 6 if v_on else 0, "oproj_size": 9 if o_on else 0}  # fmt: skip
    biases = {f"{x}bias": bias and flag for x, flag in zip("qkvo", on, strict=True)}
    layout = PackedLayout(8, H, kdim=kdim, vdim=5, **sizes, **biases)
    given = dict(
        query=normal(N, L, 8, dtype=dtype), key=normal(N, S, kdim, dtype=dtype), value=normal(N, S, 5, dtype=dtype),
        embed_dim=8, num_heads=H, attn_drop=0.0, out_drop=0.0,
        io_weight_bias=normal(layout.length, dtype=dtype) * dtype(0.5), need_weights=True,
    )  # fmt: skip
    return given | sizes | biases | options


def gradients_of(arguments: dict[str, Any], weights_too: bool = False, **keywords: Any) -> tuple[Any, Any]:
    result = mha.multi_head_attention(**arguments)
    grad = normal(*result.attn_output.shape, salt=1).astype(result.attn_output.dtype)
    grad_weights = None
    if weights_too:
        grad_weights = normal(*result.attn_output_weights.shape, salt=2).astype(result.attn_output.dtype)
    return result, mha.multi_head_attention_backward(grad, result, grad_weights, **keywords)


def assert_close(first: Any, second: Any, tolerance: float = 1e-12) -> None:
    for name, one, other in zip(type(first)._fields, first, second, strict=True):
        if isinstance(one, np.ndarray):
            np.testing.assert_allclose(one, other, atol=tolerance, rtol=tolerance, err_msg=name)
        else:
            assert (one is None) == (other is None), name


@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize(
    "on", COMBINATIONS, ids=lambda on: "".join(x if f else "-" for x, f in zip("qkvo", on, strict=True))
)
def test_every_combination_of_projections(on: tuple[bool, ...], bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = layer_arguments(on, bias, attn_mask=normal(L, S), key_padding_mask=np.arange(S) > [[4], [5]])
    arguments |= dict(add_zero_attn=True, is_causal=True)
    found = gradients_of(arguments, weights_too=True)
    monkeypatch.setenv("MHA_BACKEND", "reference")
    expected = gradients_of(arguments, weights_too=True)
    np.testing.assert_allclose(found[0].attn_output, expected[0].attn_output, atol=1e-13)
    np.testing.assert_allclose(found[0].attn_output_weights, expected[0].attn_output_weights, atol=1e-13)
    assert_close(found[1], expected[1])


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "reslink": dict(reslink=True, oproj_size=8),
    "bias_kv": dict(bias_k=normal(1, 1, 12, salt=3), bias_v=normal(1, 1, 6, salt=4), add_zero_attn=True),
    "dropout": dict(attn_drop=0.4, out_drop=0.3),
    "dropout_of_appended_keys": dict(
        attn_drop=0.5, add_zero_attn=True, bias_k=normal(1, 1, 12, salt=3), bias_v=normal(1, 1, 6, salt=4),
    ),
    "averaged": dict(average_attn_weights=True),
    "softcap": dict(softcap=2.0, window=(2, 1)),
    "masks": dict(attn_mask=normal(N * H, L, S, salt=5), key_padding_mask=normal(N, S, salt=6)),
    "mask_4d": dict(attn_mask=normal(N, 1, 1, S, salt=5)),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_by_central_differences(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of inputs, the vector, bias rows and float masks, through output and weights, to 1e-6."""
    monkeypatch.setenv("MHA_BACKEND", backend)
    arguments = layer_arguments(**OPTIONS[name])
    if name == "reslink":
        arguments["io_weight_bias"] = normal(PackedLayout(
            8, H, kdim=10, vdim=5, qproj_size=12, kproj_size=12, vproj_size=6, oproj_size=8, qbias=True, kbias=True,
            vbias=True, obias=True).length) * 0.5  # fmt: skip

    def loss(changed: dict[str, Any]) -> float:
        seed(11)
        result = mha.multi_head_attention(**changed)
        return float((result.attn_output * grad).sum() + (result.attn_output_weights * grad_weights).sum())

    seed(11)
    result = mha.multi_head_attention(**arguments)
    grad = normal(*result.attn_output.shape, salt=1)
    grad_weights = normal(*result.attn_output_weights.shape, salt=2)
    gradients = mha.multi_head_attention_backward(grad, result, grad_weights, mask_gradients=True)
    for field, gradient in gradients._asdict().items():
        if gradient is None:
            continue
        point = arguments[field]
        assert gradient.shape == point.shape
        direction = normal(*point.shape, salt=9)
        step = 1e-5
        up, down = (loss(arguments | {field: point + sign * step * direction}) for sign in (1, -1))
        slope, ours = (up - down) / (2 * step), float((gradient * direction).sum())
        assert abs(slope - ours) <= 1e-6 * max(1.0, abs(slope)), (field, slope, ours)
    given = {name for name in ("key_padding_mask", "attn_mask", "bias_k") if arguments.get(name) is not None}
    assert all(getattr(gradients, name) is not None for name in given)


def test_unbatched_inputs_equal_a_batch_of_one() -> None:
    arguments = layer_arguments(attn_mask=normal(L, S))
    single = arguments | {name: arguments[name][0] for name in ("query", "key", "value")}
    batch = arguments | {name: arguments[name][:1] for name in ("query", "key", "value")}
    one, many = gradients_of(single, weights_too=True), gradients_of(batch, weights_too=False)
    assert one[0].attn_output.shape == (L, 9)
    assert one[0].attn_output_weights.shape == (H, L, S)
    np.testing.assert_array_equal(one[0].attn_output, many[0].attn_output[0])
    averaged = mha.multi_head_attention(**single, average_attn_weights=True).attn_output_weights
    assert averaged.shape == (L, S)
    np.testing.assert_allclose(averaged, one[0].attn_output_weights.mean(0), atol=1e-15)
    padding = mha.multi_head_attention(**single, key_padding_mask=np.arange(S) > 3)
    assert (padding.attn_output_weights[..., 4:] == 0).all()


def test_dropout_is_the_random_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = layer_arguments(attn_drop=0.5, out_drop=0.25)
    seed(77)
    first = mha.multi_head_attention(**arguments)
    second = mha.multi_head_attention(**arguments)
    seed(77)
    again = mha.multi_head_attention(**arguments)
    np.testing.assert_array_equal(first.attn_output, again.attn_output)
    assert (first.attn_output != second.attn_output).any()
    assert first.mask_reservespace == (DropoutState(77, 0), DropoutState(77, 1))
    kept = attention_keep(DropoutState(77, 0), 0.5, N, H, L, S).reshape(N * H, L, S)
    np.testing.assert_array_equal(first.attn_output_weights != 0, kept)
    np.testing.assert_array_equal(first.attn_output != 0, output_keep(DropoutState(77, 1), 0.25, N, L, 9))
    monkeypatch.setenv("MHA_BACKEND", "reference")
    seed(77)
    np.testing.assert_allclose(first.attn_output, mha.multi_head_attention(**arguments).attn_output, atol=1e-13)


def test_evaluation_keeps_nothing_and_drops_nothing() -> None:
    arguments = layer_arguments(attn_drop=0.5, out_drop=0.5, training=False)
    result = mha.multi_head_attention(**arguments)
    plain = mha.multi_head_attention(**arguments | dict(attn_drop=0.0, out_drop=0.0))
    np.testing.assert_array_equal(result.attn_output, plain.attn_output)
    assert result.mask_reservespace is None
    assert result.othr_reservespace is None
    with pytest.raises(ValueError, match="training=True"):
        mha.multi_head_attention_backward(result.attn_output, result)


def test_grouped_heads_equal_repeated_ones() -> None:
    layout = PackedLayout(8, 4, num_kv_heads=2)
    vector = normal(layout.length)
    parts = layout.views(vector)
    wide = {name: np.repeat(parts[name].reshape(8, 2, 2), 2, axis=1).reshape(8, 8) for name in ("k_weight", "v_weight")}
    repeated = PackedLayout(8, 4).pack({**parts, **wide})
    inputs = dict(query=normal(N, L, 8), key=normal(N, S, 8), value=normal(N, S, 8), embed_dim=8, num_heads=4,
                  attn_drop=0.0, out_drop=0.0)  # fmt: skip
    one = mha.multi_head_attention(**inputs, io_weight_bias=vector, num_kv_heads=2)
    other = mha.multi_head_attention(**inputs, io_weight_bias=repeated)
    np.testing.assert_allclose(one.attn_output, other.attn_output, atol=1e-13)


def awkward(x: Any, how: str) -> Any:
    """The same values, laid out so that a careless kernel would misread or crash."""
    if how == "fortran":
        return np.asfortranarray(x)
    if how == "sliced":
        wide = np.full((*x.shape[:-1], 2 * x.shape[-1]), 99, x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    if how == "reversed":
        return x[..., ::-1].copy()[..., ::-1]
    if how == "swapped":
        return x.astype(x.dtype.newbyteorder())
    if how == "misaligned":
        memory = np.zeros(x.nbytes + 1, np.uint8)[1:]
        shifted = memory.view(x.dtype).reshape(x.shape)
        shifted[...] = x
        return shifted
    x = x.copy()
    x.flags.writeable = False
    return x


@pytest.mark.parametrize("how", ["fortran", "sliced", "reversed", "swapped", "misaligned", "read_only"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_any_memory_layout_and_nothing_is_modified(how: str, dtype: Any) -> None:
    arguments = layer_arguments(
        dtype=dtype, attn_mask=normal(L, S, dtype=dtype), key_padding_mask=normal(N, S, dtype=dtype)
    )
    names = ("query", "key", "value", "attn_mask", "key_padding_mask")
    laid_out = arguments | {name: awkward(arguments[name], how) for name in names}
    before = {name: laid_out[name].tobytes() for name in names}
    result, gradients = gradients_of(laid_out)
    plain, plain_gradients = gradients_of(arguments)
    np.testing.assert_array_equal(result.attn_output, plain.attn_output)
    for one, other in zip(gradients, plain_gradients, strict=True):
        if one is not None:
            np.testing.assert_array_equal(one, other)
    assert {name: laid_out[name].tobytes() for name in names} == before


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_leading_axes_broadcast(batch: tuple[int, ...]) -> None:
    q, k, v = normal(*batch, 2, 4, 6), normal(2, 5, 6), normal(1, 5, 3, salt=1)
    mask = normal(4, 5, salt=2)
    output, lse = mha.scaled_dot_product_attention(q, k, v, mask, return_lse=True)
    assert output.shape == (*batch, 2, 4, 3)
    grad = normal(*output.shape, salt=4)
    gradients = mha.scaled_dot_product_attention_backward(grad, q, k, v, output, lse, mask, mask_gradients=True)
    full_k, full_v = np.broadcast_to(k, (*batch, 2, 5, 6)), np.broadcast_to(v, (*batch, 2, 5, 3))
    full = mha.scaled_dot_product_attention_backward(grad, q, full_k.copy(), full_v.copy(), output, lse, mask)
    np.testing.assert_allclose(gradients.key, full.key.reshape(-1, 2, 5, 6).sum(0), atol=1e-13)
    np.testing.assert_allclose(gradients.value, full.value.reshape(-1, 1, 5, 3).sum(0), atol=1e-13)
    assert gradients.attn_mask.shape == mask.shape
    assert mha.scaled_dot_product_attention(q[..., 0, :, :] if not batch else q, k, v).shape[-1] == 3


@pytest.mark.parametrize("dtype", [name for name in DTYPES if name.endswith("16")])
def test_half_types_through_the_whole_layer(dtype: str) -> None:
    """Stored as such, summed in float32: as good as the reference backend, and within a few ulp of float64."""
    kind = DTYPES[dtype]
    arguments = layer_arguments(dtype=np.float32, attn_mask=normal(L, S, dtype=np.float32))
    half = {name: x.astype(kind) if isinstance(x, np.ndarray) else x for name, x in arguments.items()}
    exact = {name: x.astype(np.float64) if isinstance(x, np.ndarray) else x for name, x in half.items()}
    result, gradients = gradients_of(half)
    truth, right = gradients_of(exact)
    assert result.attn_output.dtype == kind
    pairs = [(result.attn_output, truth.attn_output), *zip(gradients[:4], right[:4], strict=True)]
    for found, expected in pairs:
        assert found.dtype == kind
        error = np.abs(found.astype(np.float64) - expected).max()
        assert error <= 6 * spacing(kind) * np.abs(expected).max()
