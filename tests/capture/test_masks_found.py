"""Masks of hidden states that are not where they are looked for first, and masks given to ``ear.loss()``."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from ear_ops import AttentionPull, EmbeddingPush, SentencePull, attach

TERMS = (EmbeddingPush(1.0), SentencePull(2, 1.0))


class Around(nn.Module):
    """A model around BERT's parts, which its hooks do not see."""

    def __init__(self, bert, parts):
        super().__init__()
        self.bert, self.parts = bert, parts

    def forward(self, input_ids, valid=None):
        if not self.parts:
            return self.bert.forward(input_ids, attention_mask=valid)
        additive = (1.0 - valid[:, None, None, :].float()) * torch.finfo(torch.float32).min
        return self.bert.encoder(self.bert.embeddings(input_ids), attention_mask=additive)


class Plain(nn.Module):
    """A list of blocks; the mask comes under the name that ``argument`` says, or by position."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(60, 16)
        self.blocks = nn.ModuleList([nn.Linear(16, 16) for _ in range(2)])

    def forward(self, ids, mask=None, *, padding_mask=None, key_padding_mask=None):
        hidden = self.embed(ids)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


class Encoder(nn.Module):
    """The encoder of torch.nn."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(60, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids, padded):
        return self.encoder(self.embed(ids), src_key_padding_mask=padded)


def pooled(states, mask):
    """Mean over pairs and features of the squared distance of the means of the real tokens."""
    mask = mask.to(states.dtype)[:, :, None]
    means = (states * mask).sum(1) / mask.sum(1)
    return (means[: len(means) // 2] - means[len(means) // 2 :]).square().mean()


def check(model, call, blocks, mask, **given):
    """The terms of ``call()`` are those of the hidden states at ``blocks`` that are real in ``mask``."""
    seen = {}
    handles = [
        blocks[0].register_forward_pre_hook(lambda module, args: seen.__setitem__("input", args[0])),
        blocks[1].register_forward_hook(lambda module, args, output: seen.__setitem__("output", output)),
    ]
    with attach(model, TERMS) as ear:
        call()
        ear.loss(**given)
        terms = ear.components()
    for handle in handles:
        handle.remove()
    output = seen["output"][0] if isinstance(seen["output"], tuple) else seen["output"]
    torch.testing.assert_close(terms["embedding_push"], -pooled(seen["input"], mask).detach())
    torch.testing.assert_close(terms["sentence_pull.2"], pooled(output, mask).detach())


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_model_that_passes_by_the_hooks_of_its_encoder(tools, parts, implementation):
    bert, batch = tools.build_model("bert", implementation).bert, tools.build_batch()
    model = Around(bert, parts)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    check(model, lambda: model(ids, mask), bert.encoder.layer, mask)


@pytest.mark.parametrize("convert", [lambda padded: padded, lambda padded: padded.float().mul(-1e30)])
def test_the_encoder_of_torch(tools, convert):
    batch, model = tools.build_batch(), Encoder()
    padded = batch["attention_mask"] == 0
    check(model, lambda: model(batch["input_ids"], convert(padded)), model.encoder.layers, ~padded)


def test_names_with_a_polarity_are_taken_and_others_refused(tools):
    batch, model = tools.build_batch(), Plain()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    check(model, lambda: model(ids, key_padding_mask=mask == 0), model.blocks, mask)
    for given in ({"mask": mask}, {"padding_mask": mask == 0}):
        with attach(model, TERMS) as ear:
            model(ids, **given)
            with pytest.raises(ValueError, match=rf"embedding_push: .* received {next(iter(given))} .*ear.loss\(att"):
                ear.loss()
        check(model, lambda given=given: model(ids, **given), model.blocks, mask, attention_mask=mask)
    for constant in (torch.ones_like(mask), torch.zeros_like(mask)):
        check(model, lambda constant=constant: model(ids, constant), model.blocks, torch.ones_like(mask))


def test_a_mask_given_to_the_loss_overrides_what_the_model_received(tools):
    model, batch = tools.build_model("bert"), tools.build_batch()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with attach(model, [*TERMS, AttentionPull(2)]) as ear:
        model(input_ids=ids, attention_mask=mask)
        expected = ear.loss()
        for given in (mask, mask.bool(), (mask[:3], mask[3:])):
            model(input_ids=ids, attention_mask=mask[:, None, None, :].expand(6, 1, 9, 9).bool())
            assert torch.equal(ear.loss(attention_mask=given), expected)
            for view, rows in (("original", slice(3)), ("augmented", slice(3, 6))):
                with ear.view(view):
                    model(input_ids=ids[rows], attention_mask=mask[rows])
            torch.testing.assert_close(ear.loss(attention_mask=given), expected)
        for wrong, message in (
            (mask[:, :4], r"\[6, 9\].* \[6, 4\]"),
            (mask[0], "expected a tensor .2B, L. of both views"),
            ("mask", "expected a tensor .2B, L. of both views"),
            ((mask[:3], mask[3:, :4]), "one length for both views"),
        ):
            model(input_ids=ids, attention_mask=mask)
            with pytest.raises(ValueError, match=message):
                ear.loss(attention_mask=wrong)


class Softmax(nn.Module):
    """An attention of its own, whose padding only the root's argument tells."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(60, 16)
        self.attn = SoftmaxAttention()

    def forward(self, ids, key_padding_mask=None, mask=None):
        return self.attn(self.embed(ids), key_padding_mask)


class SoftmaxAttention(nn.Module):
    def forward(self, hidden, padded):
        scores = hidden @ hidden.transpose(1, 2)
        if padded is not None:
            scores = scores.masked_fill(padded[:, None], -1e30)
        self.maps = torch.softmax(scores[:, None], -1)
        return self.maps[:, 0] @ hidden


def test_attention_matrices_of_a_module_of_its_own(tools):
    batch, model = tools.build_batch(), Softmax()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with attach(model, [AttentionPull("attn")]) as ear:
        model(ids, mask == 0)
        torch.testing.assert_close(ear.loss(), 0.1 * tools.attention_pull(model.attn.maps, mask))
        model(ids, mask=mask)
        with pytest.raises(ValueError, match=r"attention_pull\.attn: the model received mask"):
            ear.loss()


def test_a_mask_of_the_root_is_not_taken_for_a_model_inside_that_takes_none(tools):
    """The tokens of an image tower are others than those of the text, also where they are as many."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
            config = transformers.ViTConfig(**shape, image_size=8, patch_size=4, hidden_dropout_prob=0.0)
            self.vision = transformers.ViTModel(config, add_pooling_layer=False)

        def forward(self, pixel_values, attention_mask):
            return self.vision(pixel_values)

    model, mask = Both(), torch.ones(4, 5, dtype=torch.long).tril(2)
    images = torch.randn(4, 3, 8, 8)
    check(
        model,
        lambda: model(images, mask),
        model.vision.layers if hasattr(model.vision, "layers") else model.vision.encoder.layer,
        torch.ones_like(mask),
    )


@pytest.mark.parametrize("name", ["attention_mask", "mask", "key_padding_mask"])
def test_a_mask_of_the_root_is_not_taken_for_a_model_inside_whose_forward_has_none(name):
    class Tower(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig

        def __init__(self):
            super().__init__(transformers.PretrainedConfig(num_hidden_layers=2))
            self.blocks = nn.ModuleList([nn.Linear(16, 16) for _ in range(2)])

        def forward(self, patches):
            for block in self.blocks:
                patches = block(patches)
            return patches

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.vision = Tower()

        def forward(self, patches, attention_mask=None, mask=None, key_padding_mask=None):
            return self.vision(patches)

    model, mask = Both(), torch.ones(4, 5, dtype=torch.bool).tril(2)
    patches = torch.randn(4, 5, 16)
    check(model, lambda: model(patches, **{name: mask}), model.vision.blocks, torch.ones_like(mask))
