"""How tensors are taken out of a running model: hooks, the attention interface, torch functions in a module."""
