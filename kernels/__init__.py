"""Triton kernels, and nothing else: this package imports torch, triton and itself only.

This version holds none yet: every op runs its plain-PyTorch meaning (`alexnet_triton.reference`).
A kernel that arrives here is entered in `alexnet_triton.ops.KERNELS` under its op's name.
"""
