"""From checkpoints to artifacts: readers, graph writers, quantization."""
