"""Back-ends of grouped matmuls and of row moves, by platform; `triton` has the primitives of the GPU kernels."""
