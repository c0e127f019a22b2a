"""Back-ends of grouped matmuls and of moving rows, by platform; `triton` is what kernels for GPUs are written with."""
