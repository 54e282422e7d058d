"""What nvcc makes of csrc/cuda: sources that are compiled by themselves, and never run."""
