"""Whatever exports DLPack is taken without a copy and answered in kind."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import emulator
import exporters
import numpy as np
import pytest
from tolerance import DTYPES

import mha
from mha import exchange


@pytest.fixture(params=["own", "torch", "jax"])
def library(request: pytest.FixtureRequest) -> exporters.Library:
    """Each library that exports DLPack."""
    found = exporters.find(request.param)
    if isinstance(found, str):
        pytest.skip(found)
    return found


def torch() -> Any:
    return pytest.importorskip("torch", reason="torch is not installed")


def normal(*shape: int, dtype: Any = np.float32, salt: int = 0) -> Any:
    return np.random.default_rng([salt, *shape]).standard_normal(shape).astype(dtype)


def heads(dtype: Any = np.float32) -> list[Any]:
    return [normal(2, 3, 5, 8, dtype=dtype, salt=i) for i in range(3)]


def same(found: Any, expected: Any, library: exporters.Library) -> None:
    """Tuples of equal values; an array for each array, of the library's, and all else as it is."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert isinstance(one, library.kind) == isinstance(other, np.ndarray)
        if isinstance(other, np.ndarray):
            assert library.get(one).dtype == other.dtype
            np.testing.assert_array_equal(library.get(one), other)


@pytest.mark.parametrize("dtype", [name for name in DTYPES if name != "float64"])
def test_attention_and_its_gradients(library: exporters.Library, dtype: str) -> None:
    arrays = heads(DTYPES[dtype])
    mask, lengths = np.tri(5, dtype=bool), np.array([3, 5])
    options = dict(scale=0.3, key_lengths=lengths, window=(3, 0))
    expected = mha.scaled_dot_product_attention(*arrays, mask, return_lse=True, **options)
    there = list(map(library.put, arrays))
    given = options | {"key_lengths": library.put(lengths)}
    found = mha.scaled_dot_product_attention(*there, library.put(mask), return_lse=True, **given)
    assert type(found) is tuple
    same(found, expected, library)
    expected = mha.scaled_dot_product_attention_backward(expected[0], *arrays, *expected, mask, **options)
    found = mha.scaled_dot_product_attention_backward(found[0], *there, *found, library.put(mask), **given)
    assert type(found) is mha.AttentionGradients
    assert found.attn_mask is None
    same(found, expected, library)


def test_a_float_masks_gradient(library: exporters.Library) -> None:
    arrays, mask = heads(), normal(5, 5)
    expected = mha.scaled_dot_product_attention(*arrays, mask, return_lse=True)
    gradients = mha.scaled_dot_product_attention_backward(arrays[0], *arrays, *expected, mask, mask_gradients=True)
    put = library.put
    found = mha.scaled_dot_product_attention_backward(
        put(arrays[0]), *map(put, arrays), *map(put, expected), attn_mask=put(mask), mask_gradients=True
    )
    same(found, gradients, library)


def test_nothing_is_copied(library: exporters.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, int] = {}
    real = mha.cpu.attention_forward

    def spy(problem: Any, *args: Any) -> Any:
        output, *others = real(problem, *args)
        seen.update(query=problem.query.ctypes.data, key=problem.key.ctypes.data, output=output.ctypes.data)
        return output, *others

    monkeypatch.setattr(mha.cpu, "attention_forward", spy)
    monkeypatch.setattr("mha.core.repeat", lambda call, arrays, options: call(*arrays))
    for dtype in ("float32", "bfloat16"):
        query, key, value = (library.put(x) for x in heads(DTYPES[dtype]))
        output = mha.scaled_dot_product_attention(query, key, value)
        if not (library.views_copy and dtype == "bfloat16"):
            assert seen["query"] == library.address(query)
            assert seen["key"] == library.address(key)
        # JAX copies what does not begin at a multiple of 64 bytes.
        if library.name != "jax":
            assert seen["output"] == library.address(output)


def test_the_packed_layer_and_its_gradients(library: exporters.Library) -> None:
    x, vector = normal(2, 5, 8), normal(4 * 8 * 8)
    mask = normal(5, 5, salt=3)
    expected = mha.multi_head_attention(x, x, x, 8, 2, 0.0, 0.0, vector, attn_mask=mask, need_weights=True)
    put = library.put
    there = put(x)
    found = mha.multi_head_attention(there, there, there, 8, 2, 0.0, 0.0, put(vector), attn_mask=put(mask),
                                     need_weights=True)  # fmt: skip
    assert type(found) is mha.MultiHeadAttentionResult
    same(found[:2], expected[:2], library)
    assert found.othr_reservespace.call.query.ctypes.data == library.address(there)
    assert found.mask_reservespace == expected.mask_reservespace
    gradients = mha.multi_head_attention_backward(x, expected, expected[1], mask_gradients=True)
    again = mha.multi_head_attention_backward(there, found, found[1], mask_gradients=True)
    assert type(again) is mha.MultiHeadAttentionGradients
    same(again, gradients, library)


def test_evaluation_keeps_nothing(library: exporters.Library) -> None:
    x = library.put(normal(2, 5, 8))
    found = mha.multi_head_attention(x, x, x, 8, 2, 0.0, 0.0, library.put(normal(256)), training=False)
    assert found[1:] == (None, None, None)


def test_the_module_and_its_gradients(library: exporters.Library) -> None:
    layer, x = mha.MultiHeadAttention(8, 2), normal(2, 5, 8)
    there = library.put(x)
    output, weights = layer(x, x, x, is_causal=True)
    gradients = layer.backward(x)
    found, none = layer(there, there, value=there, is_causal=True)
    assert weights is None
    assert none is None
    same([found], [output], library)
    same(layer.backward(there), gradients, library)


def test_no_elements(library: exporters.Library) -> None:
    x = library.put(np.ones((2, 0, 8), np.float32))
    assert tuple(mha.scaled_dot_product_attention(x, x, x).shape) == (2, 0, 8)


def test_kinds_do_not_mix(library: exporters.Library) -> None:
    q, k, v = heads()
    with pytest.raises(TypeError, match=r"query .*\b\w+ on the CPU, key numpy.ndarray, value numpy.ndarray") as caught:
        mha.scaled_dot_product_attention(library.put(q), k, v)
    assert type(library.put(q)).__name__ in str(caught.value)
    with pytest.raises(TypeError, match=r"query numpy.ndarray.* attn_mask"):
        mha.scaled_dot_product_attention(q, k, v, attn_mask=library.put(np.ones((5, 5), bool)))
    x = normal(2, 5, 8)
    result = mha.multi_head_attention(x, x, x, 8, 2, 0.0, 0.0, normal(256))
    with pytest.raises(TypeError, match=r"grad_attn_output .*result\.attn_output numpy"):
        mha.multi_head_attention_backward(library.put(x), result)


def test_exporters_and_devices_do_not_mix() -> None:
    there = exporters.Tensor(heads()[0], (2, 1))
    here = exporters.Tensor(heads()[0])
    with pytest.raises(TypeError, match=r"query exporters.Tensor on CUDA device 1, key exporters.Tensor on the CPU"):
        mha.scaled_dot_product_attention(there, here, here)
    with pytest.raises(TypeError, match=r"query torch.Tensor on the CPU, key exporters.Tensor on the CPU"):
        mha.scaled_dot_product_attention(torch().ones(1, 2, 8), here, here)


def test_a_gradient_to_record_is_refused() -> None:
    x = exporters.Tensor(heads()[0])
    x.requires_grad = True  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match=r"query is a exporters.Tensor that requires a gradient.*query\.detach\(\)"):
        mha.scaled_dot_product_attention(x, x, x)


def test_what_pytorch_does_not_export() -> None:
    t = torch()
    x = t.ones(1, 2, 8)
    with pytest.raises(TypeError, match=r"value is a torch.Parameter that requires a gradient.*value\.detach\(\)"):
        mha.scaled_dot_product_attention(x, x, t.nn.Parameter(x))
    with pytest.raises(TypeError, match=r"key is a torch.Tensor \(1, 2, 8\) torch.float32 .*strided"):
        mha.scaled_dot_product_attention(x, x.to_sparse(), x)
    with pytest.raises(TypeError, match=r"key is a torch.Tensor .*meta"):
        mha.scaled_dot_product_attention(x, x.to("meta"), x)
    negative = t.complex(x, x).conj().imag
    assert negative.is_neg()
    with pytest.raises(TypeError, match=r"query\.resolve_neg\(\)"):
        mha.scaled_dot_product_attention(negative, x, x)
    np.testing.assert_array_equal(mha.scaled_dot_product_attention(x, x, t.nn.Parameter(x).detach()), x)


def test_pytorchs_own_gradients_of_what_follows() -> None:
    """The output may be a leaf of PyTorch's graph; its gradient is what the backward takes."""
    t = torch()
    x = t.from_numpy(normal(2, 5, 8))
    result = mha.multi_head_attention(x, x, x, 8, 2, 0.0, 0.0, t.from_numpy(normal(256)))
    output = result.attn_output.requires_grad_()
    (output**2).sum().backward()
    gradients = mha.multi_head_attention_backward(output.grad, result)
    expected = mha.multi_head_attention_backward(2 * output.detach(), result)
    assert t.equal(gradients.io_weight_bias, expected.io_weight_bias)


def test_strides_and_read_only_memory() -> None:
    q, k, v = (x.swapaxes(1, 2)[:, ::2] for x in heads())
    expected = mha.scaled_dot_product_attention(q, k, v)
    for x in (q, k, v):
        x.flags.writeable = False
    try:
        np.from_dlpack(exporters.Tensor(q))
    except BufferError:  # NumPy before 2.1
        with pytest.raises(TypeError, match=r"query is a exporters.Tensor \(2, 3, 3, 8\) float32 .*readonly"):
            mha.scaled_dot_product_attention(*map(exporters.Tensor, (q, k, v)))
        return
    found = mha.scaled_dot_product_attention(*map(exporters.Tensor, (q, k, v)))
    np.testing.assert_array_equal(found.host, expected)


def test_memory_of_another_kind() -> None:
    x = exporters.Tensor(heads()[0], (7, 0))
    with pytest.raises(TypeError, match=r"query is a exporters.Tensor in memory of DLPack's kind 7.*Move it"):
        mha.scaled_dot_product_attention(x, x, x)
    pinned = exporters.Tensor(heads()[0], (3, 0))
    assert isinstance(mha.scaled_dot_product_attention(pinned, pinned, exporters.Tensor(heads()[0])), exporters.Tensor)


def test_no_way_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(exporters.Tensor, "__array_namespace__")
    x = exporters.Tensor(heads()[0])
    with pytest.raises(TypeError, match=r"from_dlpack is not known.*numpy.from_dlpack"):
        mha.scaled_dot_product_attention(x, x, x)


def test_cuda_memory_without_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(exchange._LIBRARIES, 2, "no_such_library")
    x = exporters.Tensor(heads()[0], (2, 0))
    with pytest.raises(ImportError, match=r"arrays of own on CUDA device 0 need no_such_library.*Install"):
        mha.scaled_dot_product_attention(x, x, x)


@pytest.mark.skipif(emulator.compiler() is None, reason="g++, which compiles the emulated kernels, is not installed")
def test_cuda_memory_goes_to_the_library_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulated library in CuPy's place: taken and answered on the exporter's device, the kernels run there."""
    runtime = emulator.install()
    entered: list[int] = []

    def device(number: int) -> Any:
        entered.append(number)
        return nullcontext()

    monkeypatch.setitem(exchange._LIBRARIES, 2, "emulated")
    monkeypatch.setattr(emulator.library, "from_dlpack", lambda x: emulator.Array(x.host), raising=False)
    monkeypatch.setattr(emulator.library, "cuda", SimpleNamespace(Device=device), raising=False)
    monkeypatch.setattr(exporters.NAMESPACE, "from_dlpack", lambda x: exporters.Tensor(x.host, (2, 1)))
    runtime.launched.clear()
    for dtype in ("float32", "bfloat16"):
        arrays = heads(DTYPES[dtype])
        output = mha.scaled_dot_product_attention(*(exporters.Tensor(x, (2, 1)) for x in arrays))
        assert output.device == (2, 1)
        expected = mha.scaled_dot_product_attention(*arrays)
        assert output.host.dtype == expected.dtype
        np.testing.assert_allclose(output.host.astype(float), expected.astype(float), atol=1e-2)
    assert len(runtime.launched) >= 2
    assert entered == [1, 1]


def test_bfloat16_needs_ml_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "bfloat16", None)
    x = exporters.Tensor(heads(DTYPES["bfloat16"])[0])
    with pytest.raises(TypeError, match=r"query is bfloat16.*ml_dtypes"):
        mha.scaled_dot_product_attention(x, x, x)


def test_numpy_callers_pay_for_one_question(monkeypatch: pytest.MonkeyPatch) -> None:
    """Types once seen are known: no argument is looked at."""
    layer, x = mha.MultiHeadAttention(8, 2), normal(2, 5, 8)

    def calls() -> None:
        output, lse = mha.scaled_dot_product_attention(x, x, x, None, 0.5, return_lse=True, dropout_state=(1, 2))
        mha.scaled_dot_product_attention_backward(output, x, x, x, output, lse)
        mha.multi_head_attention_backward(x, mha.multi_head_attention(x, x, x, 8, 2, 0.5, 0.0, normal(256)))
        layer(x, x, x)
        layer.backward(x)

    calls()
    monkeypatch.setattr(exchange, "_members", None)
    calls()


def test_signatures_are_the_functions_own() -> None:
    assert list(inspect.signature(mha.scaled_dot_product_attention).parameters)[:4] == [
        "query",
        "key",
        "value",
        "attn_mask",
    ]
    assert mha.multi_head_attention.__doc__.startswith("Multi-head attention")
    with pytest.raises(TypeError, match="positional"):
        mha.scaled_dot_product_attention(*[exporters.Tensor(heads()[0])] * 20)
