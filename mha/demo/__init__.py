"""A vision transformer, trained with PyTorch on real handwritten digits, running on NumPy arrays."""

from mha.demo.run import main

__all__ = ["main"]
