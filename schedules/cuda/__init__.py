"""What CUDA schedules share: instructions of the tensor cores and of the memory pipeline."""
