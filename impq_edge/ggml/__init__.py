"""ggml's block formats as values, and llama.cpp's own encoder for them."""
