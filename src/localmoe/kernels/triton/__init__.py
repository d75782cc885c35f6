"""Triton kernels for CUDA devices; `kernels.gpu` puts them behind the operations of `kernels.base`."""
