"""Distils a teacher with 12 blocks into a student with 4 blocks, which learns where the teacher looks.

Run it with: python docs/examples/distil_a_teacher.py
Both models are tiny and have random weights, so nothing is downloaded. Take a trained teacher for real use.
"""

import torch
import transformers

import ear_ops

STEPS = 100
STUDENT_LAYERS = [1, 2, 3, 4]
torch.manual_seed(0)


def build_classifier(blocks: int, hidden_size: int) -> transformers.BertForSequenceClassification:
    """Returns a BERT without dropout. Head is compared with head, so teacher and student have the same number."""
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=hidden_size,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        intermediate_size=2 * hidden_size,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.05,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config)


def measure(ear: ear_ops.Attachment, input_ids: torch.Tensor) -> dict[str, float]:
    """Returns how much the attention of student and teacher differs in each layer of the student."""
    with torch.no_grad():
        teacher(input_ids)
    student(input_ids)
    ear.loss()
    return {name: term.item() for name, term in ear.components().items()}


teacher = build_classifier(blocks=12, hidden_size=32).eval()
student = build_classifier(blocks=4, hidden_size=24)

# With small random weights, attention is nearly flat. Larger ones let the teacher's attention depend on the text.
for layer in teacher.bert.encoder.layer:
    for projection in (layer.attention.self.query, layer.attention.self.key):
        torch.nn.init.normal_(projection.weight, std=0.25)

# The layers of the student are spread evenly over the teacher: 1, 2, 3 and 4 are compared with 3, 6, 9 and 12.
# Another choice is made by attach(..., layer_map={1: 2, 2: 4, 3: 8, 4: 12}).
pull = ear_ops.AttentionPull(STUDENT_LAYERS, weight=100.0)
ear = ear_ops.attach(student, [pull], teacher=teacher)
optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
test_ids = torch.randint(5, 50, (16, 10))
before = measure(ear, test_ids)

for _ in range(STEPS):
    # Each step takes new texts. The teacher runs first and without gradients, and its answers are the labels.
    input_ids = torch.randint(5, 50, (16, 10))
    with torch.no_grad():
        labels = teacher(input_ids).logits.argmax(-1)
    task_loss = student(input_ids, labels=labels).loss
    loss = task_loss + ear.loss()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

after = measure(ear, test_ids)
ear.detach()
print("Mean squared difference between the attention of student and teacher, on texts that were not trained on:")
for layer in STUDENT_LAYERS:
    name = f"attention_pull.{layer}"
    print(f"layer {layer} of the student, layer {3 * layer} of the teacher: {before[name]:.6f} -> {after[name]:.6f}")
