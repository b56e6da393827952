"""One table of calls per library: kind of job -> a function that makes the timed call from its arrays.

A call returns its result as the library has it; `plain` makes an array of that. A library that is not installed, or
has nothing for a kind, is passed over with a reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bench.cases import Job

Call = Callable[[], Any]


class NotOffered(Exception):
    """Why a library has no row."""


def mha_calls(threads: int) -> dict[str, Callable[[Job, dict[str, Any]], Call]]:
    """This package."""
    import mha
    from mha.cpu import product
    from mha.matrix import rows_of

    mha.set_num_threads(threads)

    def attention(job: Job, a: dict[str, Any]) -> Call:
        return lambda: mha.scaled_dot_product_attention(a["query"], a["key"], a["value"], **job.attention.options)

    def training(job: Job, a: dict[str, Any]) -> Call:
        inputs, options = (a["query"], a["key"], a["value"]), job.attention.options

        def call() -> Any:
            output, lse = mha.scaled_dot_product_attention(*inputs, **options, return_lse=True)
            mha.scaled_dot_product_attention_backward(a["grad_output"], *inputs, output, lse, **options)
            return output

        return call

    def layer(job: Job, a: dict[str, Any]) -> Call:
        module = mha.MultiHeadAttention(job.sizes[2], job.sizes[3])
        module.load_state_dict({"io_weight_bias": a["vector"]})
        module.freeze()
        return lambda: module(a["x"], a["x"], a["x"])[0]

    def products(job: Job, a: dict[str, Any]) -> Call:
        left, right = rows_of(a["left"]), rows_of(a["right"])
        left = left.T if job.kind == "product_of_transposed_left" else left
        right = right.T if job.kind == "product_of_transposed_right" else right
        out = np.empty((left.shape[0], right.shape[1]), np.float32)

        def call() -> Any:
            product(left, right, rows_of(out))
            return out

        return call

    def beside(job: Job, a: dict[str, Any]) -> Call:
        module, x = mha.MultiHeadAttention(256, 4).eval(), np.ones((1, 96, 256), np.float32)
        call = numpy_calls(threads)["product"](job, a)
        call.before = lambda: module(x, x, x)  # type: ignore[attr-defined]
        return call

    return {"attention": attention, "training": training, "layer": layer, "beside": beside} | dict.fromkeys(
        ("product", "product_of_transposed_left", "product_of_transposed_right"), products
    )


def numpy_calls(threads: int) -> dict[str, Callable[[Job, dict[str, Any]], Call]]:
    """Unfused NumPy, as one writes it."""

    def attention(job: Job, a: dict[str, Any]) -> Call:
        case = job.attention
        if job.dtype != "float32":
            raise NotOffered("NumPy has no fast float16")
        hidden = ~np.tri(case.queries, case.keys, dtype=bool) if case.options.get("is_causal") else None

        def call() -> Any:
            scores = a["query"] @ a["key"].swapaxes(-1, -2) * np.float32(case.head_dim**-0.5)
            if hidden is not None:
                scores[..., hidden] = -np.inf
            scores -= scores.max(axis=-1, keepdims=True)
            np.exp(scores, out=scores)
            scores /= scores.sum(axis=-1, keepdims=True)
            return scores @ a["value"]

        return call

    def layer(job: Job, a: dict[str, Any]) -> Call:
        n, length, width, heads = job.sizes
        weights = a["vector"][: 4 * width * width].reshape(4, width, width)
        biases = a["vector"][4 * width * width :].reshape(4, width)

        def call() -> Any:
            q, k, v = ((a["x"] @ weights[i] + biases[i]).reshape(n, length, heads, -1).swapaxes(1, 2) for i in range(3))
            scores = q @ k.swapaxes(-1, -2) * np.float32((width // heads) ** -0.5)
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            z = (scores / scores.sum(-1, keepdims=True)) @ v
            return z.swapaxes(1, 2).reshape(n, length, width) @ weights[3] + biases[3]

        return call

    def products(job: Job, a: dict[str, Any]) -> Call:
        left, right = a["left"], a["right"]
        left = left.T if job.kind == "product_of_transposed_left" else left
        right = right.T if job.kind == "product_of_transposed_right" else right

        def call() -> Any:
            return left @ right

        return call

    kinds = ("product", "product_of_transposed_left", "product_of_transposed_right", "beside")
    return {"attention": attention, "layer": layer} | dict.fromkeys(kinds, products)


def torch_calls(threads: int) -> dict[str, Callable[[Job, dict[str, Any]], Call]]:
    """PyTorch on the CPU."""
    import torch

    torch.set_num_threads(threads)
    core = torch.nn.functional.scaled_dot_product_attention

    def attention(job: Job, a: dict[str, Any]) -> Call:
        tensors = [torch.from_numpy(a[name]) for name in ("query", "key", "value")]

        def call() -> Any:
            with torch.inference_mode():
                return core(*tensors, **job.attention.options)

        return call

    def training(job: Job, a: dict[str, Any]) -> Call:
        tensors = [torch.tensor(a[name], requires_grad=True) for name in ("query", "key", "value")]
        grad = torch.from_numpy(a["grad_output"])

        def call() -> Any:
            output = core(*tensors, **job.attention.options)
            output.backward(grad)
            return output.detach()

        return call

    def layer(job: Job, a: dict[str, Any]) -> Call:
        width, heads = job.sizes[2:]
        from mha import PackedLayout, convert

        layout = PackedLayout(width, heads, qbias=True, kbias=True, vbias=True, obias=True)
        state = convert.to_torch(convert.PackedParameters(a["vector"], layout))
        module = torch.nn.MultiheadAttention(width, heads, batch_first=True).eval()
        module.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
        x = torch.from_numpy(a["x"])

        def call() -> Any:
            with torch.inference_mode():
                return module(x, x, x, need_weights=False)[0]

        return call

    return {"attention": attention, "training": training, "layer": layer}


def onnxruntime_calls(threads: int) -> dict[str, Callable[[Job, dict[str, Any]], Call]]:
    """onnxruntime's MultiHeadAttention, a model of one node."""
    import onnxruntime
    from onnx import TensorProto, helper

    def attention(job: Job, a: dict[str, Any]) -> Call:
        case = job.attention
        if case.options or job.dtype != "float32":
            raise NotOffered("only plain float32 attention is compared")
        flat = [np.ascontiguousarray(a[n].swapaxes(1, 2)).reshape(case.batch, -1, case.heads * case.head_dim)
                for n in ("query", "key", "value")]  # fmt: skip
        values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("q", "k", "v", "o")]
        node = helper.make_node("MultiHeadAttention", ["q", "k", "v"], ["o"], domain="com.microsoft",
                                num_heads=case.heads)  # fmt: skip
        graph = helper.make_graph([node], "attention", values[:3], values[3:])
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        feed = dict(zip(("q", "k", "v"), flat, strict=True))

        def call() -> Any:
            out = session.run(None, feed)[0]
            return out.reshape(case.batch, case.queries, case.heads, -1).swapaxes(1, 2)

        return call

    return {"attention": attention}


LIBRARIES = {"mha": mha_calls, "numpy": numpy_calls, "torch": torch_calls, "onnxruntime": onnxruntime_calls}


def plain(result: Any) -> Any:
    """A NumPy array of any library's result."""
    return result.numpy() if hasattr(result, "numpy") else np.asarray(result)
