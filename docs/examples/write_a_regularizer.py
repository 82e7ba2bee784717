"""Defines a regulariser that keeps a block from attending to the first token, and trains with it.

Run it with: python docs/examples/write_a_regularizer.py
The model is tiny and has random weights, so nothing is downloaded.
"""

from typing import Any

import torch
import transformers

import ear_ops

STEPS = 40
torch.manual_seed(0)


class FirstTokenAttention(ear_ops.Regularizer):
    """The share of attention that the real tokens of a block pay to the first token."""

    def __init__(self, layer: int, weight: float) -> None:
        super().__init__(f"first_token_attention.{layer}", weight, reduction="mean")
        self.layer = layer

    def site(self, layout: Any) -> Any:
        """Says where to look. This place gives the queries, the keys and the masks of one block."""
        return layout.attention(self.layer)

    def term(self, reading: Any, reading_aug: Any) -> torch.Tensor:
        """Returns the scalar to minimise. After one forward, the reading holds all rows of the batch."""
        shares = reading.probabilities()[:, :, :, 0]  # [rows, heads, queries]
        if reading.query_mask is None:
            return shares.mean()
        real = reading.query_mask[:, None, :].expand_as(shares)  # Padding does not count.
        return shares[real].mean()


config = transformers.BertConfig(
    vocab_size=100,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=64,
    initializer_range=0.2,
    num_labels=3,
)
model = transformers.BertForSequenceClassification(config)
input_ids = torch.randint(5, 100, (8, 12))  # 4 texts and their changed versions
attention_mask = torch.ones_like(input_ids)
attention_mask[1, 9:] = 0  # Two texts are shorter than the others.
attention_mask[5, 8:] = 0
labels = torch.tensor([0, 2, 1, 1])

# A regulariser of your own is attached, weighted and logged like those of the package, also together with them.
regularizers = [FirstTokenAttention(layer=2, weight=5.0), ear_ops.AttentionPull(layer=3, weight=1.0)]
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
shares = []
with ear_ops.attach(model, regularizers) as ear:
    for _ in range(STEPS):
        logits = model(input_ids, attention_mask=attention_mask).logits
        loss = ear_ops.robust_cross_entropy(logits, labels) + ear.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        shares.append(ear.components()["first_token_attention.2"].item())

print(f"In the first step, block 2 paid {shares[0]:.1%} of its attention to the first token.")
print(f"In step {STEPS}, it paid {shares[-1]:.1%}.")
