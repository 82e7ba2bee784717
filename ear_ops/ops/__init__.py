"""The operators: what each computes, in plain PyTorch and in compiled kernels, and which backend runs a call."""
