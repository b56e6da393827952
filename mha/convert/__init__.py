"""Foreign attention weights to `PackedParameters` and back: pure functions that never guess a layout.

Square matrices do not show their orientation and fused ones do not show their order, so names decide, and names that
a format does not have are refused rather than dropped. Positions (rotary embeddings, biases of T5 and BLOOM) are no
weights of the layer: pass them on yourself.
"""

from mha.convert.auto import Probe, auto, find_layers
from mha.convert.files import load, load_tensors, save
from mha.convert.formats import FORMATS
from mha.convert.parameters import PackedParameters
from mha.convert.systems import FROM, TO, Reader, Writer

__all__ = ["FORMATS", "FROM", "TO", "PackedParameters", "Probe", "Reader", "Writer", "auto", "find_layers", "load",
           "load_tensors", "save"]  # fmt: skip

from_torch, to_torch = FROM["torch"], TO["torch"]
from_paddle, to_paddle = FROM["paddle"], TO["paddle"]
to_paddle_flat, to_paddle_nn = TO["paddle_flat"], TO["paddle_nn"]
from_ivy, to_ivy = FROM["ivy"], TO["ivy"]
from_keras, to_keras = FROM["keras"], TO["keras"]
from_flax, to_flax = FROM["flax"], TO["flax"]
from_hf_bert, to_hf_bert = FROM["hf_bert"], TO["hf_bert"]
from_hf_vit, to_hf_vit = FROM["hf_vit"], TO["hf_vit"]
from_hf_bart, to_hf_bart = FROM["hf_bart"], TO["hf_bart"]
from_timm, to_timm = FROM["timm"], TO["timm"]
from_gpt2, to_gpt2 = FROM["gpt2"], TO["gpt2"]
from_llama, to_llama = FROM["llama"], TO["llama"]
from_gpt_neo, to_gpt_neo = FROM["gpt_neo"], TO["gpt_neo"]
from_gpt_neox, to_gpt_neox = FROM["gpt_neox"], TO["gpt_neox"]
from_bloom, to_bloom = FROM["bloom"], TO["bloom"]
from_megatron, to_megatron = FROM["megatron"], TO["megatron"]
from_megatron_v0, to_megatron_v0 = FROM["megatron_v0"], TO["megatron_v0"]
from_megatron_v1, to_megatron_v1 = FROM["megatron_v1"], TO["megatron_v1"]
from_megatron_v2, to_megatron_v2 = FROM["megatron_v2"], TO["megatron_v2"]
from_falcon, to_falcon = FROM["falcon"], TO["falcon"]
from_falcon_mqa, to_falcon_mqa = FROM["falcon_mqa"], TO["falcon_mqa"]
from_phi3, to_phi3 = FROM["phi3"], TO["phi3"]
from_t5, to_t5 = FROM["t5"], TO["t5"]
from_onnx, to_onnx = FROM["onnx"], TO["onnx"]
