"""One process with a contiguous slice of the decoder layers and its KV cache."""
