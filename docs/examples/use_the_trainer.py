"""Trains a classifier of sentence pairs with the Trainer of transformers and two regularisers.

Run it with: python docs/examples/use_the_trainer.py
It needs accelerate. The texts are embedded in the package, and the model is tiny and has random weights.
"""

import tempfile

import tokenizers
import transformers

import ear_ops
from ear_ops.data import XNLI, PairCollator, PairViews, SynonymAugmenter, load_split, load_synonyms
from ear_ops.data.mini import mini_data_dir

EPOCHS = 3
transformers.set_seed(0)

# Each training item has two views: the sentence pair, and the same pair with some words replaced by synonyms.
# An evaluation item has one view. Each epoch draws other synonyms, because the Trainer calls train_views.set_epoch.
# It does not do so with every data loader; docs/trainers.md shows a callback for the other cases.
synonyms = load_synonyms(mini_data_dir() / "synonyms.json")
examples = load_split(mini_data_dir(), XNLI, "train", "en")[:96]
train_views = PairViews(examples, SynonymAugmenter(synonyms, match="normalised"), seed=0)
dev_pairs = PairViews(load_split(mini_data_dir(), XNLI, "dev", "en"))

# This tokenizer treats every word as a token. A pretrained model has a tokenizer of its own.
words = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="[UNK]"))
words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
texts = [text for example in examples for text in (example.text1, example.text2)]
texts += [neighbour for neighbours in synonyms.values() for neighbour in neighbours]
words.train_from_iterator(texts, tokenizers.trainers.WordLevelTrainer(special_tokens=special))
words.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
)
config = transformers.BertConfig(
    vocab_size=len(tokenizer),
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=64,
    initializer_range=0.2,
    num_labels=3,
)


class Trainer(ear_ops.RegularizedTrainerMixin, transformers.Trainer):
    """The Trainer of transformers. The mixin adds the regularisers to its loss and to its log."""


arguments = transformers.TrainingArguments(
    output_dir=tempfile.mkdtemp(),
    num_train_epochs=EPOCHS,
    per_device_train_batch_size=16,
    learning_rate=2e-3,
    logging_strategy="epoch",
    save_strategy="no",
    remove_unused_columns=False,  # The collator needs both views of an item.
    report_to="none",
    disable_tqdm=True,
    use_cpu=True,
)
trainer = Trainer(
    transformers.BertForSequenceClassification(config),
    arguments,
    train_dataset=train_views,
    eval_dataset=dev_pairs,
    data_collator=PairCollator(tokenizer),
    regularizers=[ear_ops.EmbeddingPush(weight=0.1), ear_ops.AttentionPull(layer=3, weight=100.0)],
)
trainer.remove_callback(transformers.PrinterCallback)  # The lines of the log are printed below.
trainer.train()
for line in trainer.state.log_history[:EPOCHS]:
    print(f"Epoch {line['epoch']:.0f}: ", end="")
    print(", ".join(f"{name} {line[name]:.6f}" for name in ("task_loss", "embedding_push", "attention_pull.3")))
print(f"The loss on the development pairs is {trainer.evaluate()['eval_loss']:.3f}.")
