"""A finished GGUF on trial: its header, perplexity, speed, memory and manners, measured in child processes."""
