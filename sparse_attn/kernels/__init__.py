"""Attention over lists of blocks: the reference, the CPU's and the Triton kernels."""
