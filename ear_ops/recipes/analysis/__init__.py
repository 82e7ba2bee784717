"""How a model aligns sentences of different languages: measures by layer, and figures."""
