"""What is bound by memory in a block, as one pass each way: a contract, torch's own operations for any device, Triton kernels for CUDA."""
