"""A checkpoint and the types of its tensors in, one GGUF file out."""
