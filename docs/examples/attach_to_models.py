"""Attaches the attention pull to a BERT classifier and to a causal language model with LoRA adapters.

Run it with: python docs/examples/attach_to_models.py
It needs peft. The models are tiny and have random weights, so nothing is downloaded.
"""

import peft
import torch
import transformers

import ear_ops

STEPS = 30
torch.manual_seed(0)

# A batch holds 4 texts and their changed versions. Rows 0 to 3 are the texts, and rows 4 to 7 are the changed ones in
# the same order. Here a changed text has another token at position 3.
texts = torch.randint(5, 100, (4, 12))
changed = texts.clone()
changed[:, 3] = torch.randint(5, 100, (4,))
input_ids = torch.cat([texts, changed])


def train_bert() -> None:
    """Trains a classifier. There is one label for each pair of a text and its changed version."""
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
    labels = torch.tensor([0, 2, 1, 1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    history = []
    with ear_ops.attach(model, [ear_ops.AttentionPull(layer=3, weight=100.0)]) as ear:
        for _ in range(STEPS):
            logits = model(input_ids).logits
            loss = ear_ops.robust_cross_entropy(logits, labels) + ear.loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(ear.components()["attention_pull.3"].item())
    print(f"BERT: the attention of the two views differed by {history[0]:.6f} and now by {history[-1]:.6f}.")


def train_causal_model_with_lora() -> None:
    """Trains the adapters of a causal language model. The labels of its tokens are the next tokens."""
    config = transformers.LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        initializer_range=0.2,
    )
    adapters = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "k_proj", "v_proj"])
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), adapters)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    history = []
    with ear_ops.attach(model, [ear_ops.AttentionPull(layer=3, weight=100.0)]) as ear:
        for _ in range(STEPS):
            logits = model(input_ids).logits
            loss = ear_ops.robust_cross_entropy(logits[:, :-1], input_ids[:, 1:]) + ear.loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(ear.components()["attention_pull.3"].item())
    print(f"Llama with LoRA: the attention differed by {history[0]:.6f} and now by {history[-1]:.6f}.")


train_bert()
train_causal_model_with_lora()
