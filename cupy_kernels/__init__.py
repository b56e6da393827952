"""CUDA C++ kernels, read as text by `mha.gpu.load`."""
