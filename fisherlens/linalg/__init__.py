"""Linear algebra on plain tensors and callables; knows nothing of networks."""
