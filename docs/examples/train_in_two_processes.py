"""Takes a training step in two processes (DDP) and compares its gradients with those of one process.

Run it with: python docs/examples/train_in_two_processes.py
It starts both processes itself, on the CPU and with the backend gloo. With torchrun, call
torch.distributed.init_process_group() without arguments in place of train_part's first line.
"""

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
import transformers

import ear_ops

PROCESSES = 2
REGULARIZERS = [ear_ops.EmbeddingPush(weight=0.1), ear_ops.AttentionPull(layer=2, weight=10.0)]


def build_model() -> torch.nn.Module:
    """Returns a model without dropout, which has the same random weights in every process."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config)


def build_pairs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns 8 texts, their changed versions, and one label for each of these pairs."""
    generator = torch.Generator().manual_seed(1)
    texts = torch.randint(5, 100, (8, 10), generator=generator)
    changed = texts.clone()
    changed[:, 4] = torch.randint(5, 100, (8,), generator=generator)
    return texts, changed, torch.randint(0, 3, (8,), generator=generator)


def compute_gradients(model: torch.nn.Module, pairs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Returns all gradients of one step as one vector. Both views of a pair are in one batch."""
    texts, changed, labels = pairs
    with ear_ops.attach(model, REGULARIZERS) as ear:
        logits = model(torch.cat([texts, changed])).logits
        loss = ear_ops.robust_cross_entropy(logits, labels) + ear.loss()
        loss.backward()
    return torch.cat([weight.grad.flatten() for weight in model.parameters()])


def train_part(rank: int, rendezvous: Path) -> None:
    """Runs in each process. It takes every second pair, and DDP averages the gradients of the processes."""
    dist.init_process_group("gloo", init_method=rendezvous.as_uri(), rank=rank, world_size=PROCESSES)
    model = torch.nn.parallel.DistributedDataParallel(build_model())
    pairs = tuple(tensor[rank::PROCESSES] for tensor in build_pairs())
    gradients = compute_gradients(model, pairs)
    if rank == 0:
        expected = compute_gradients(build_model(), build_pairs())
        difference = (gradients - expected).norm() / expected.norm()
        print(f"{PROCESSES} processes computed {len(gradients)} gradients from 4 pairs each.")
        print(f"The relative difference to one process with all 8 pairs is {difference:.1e}.")
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rendezvous"
        torch.multiprocessing.spawn(train_part, args=(file,), nprocs=PROCESSES)
