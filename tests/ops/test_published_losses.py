"""Formulas that papers and other libraries compute, written out, and the functions that equal them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from support.cases import qk_case

import ear_ops

RAGGED = {"lengths": ([9, 6], [9, 6])}


def test_the_published_loss_of_minilm() -> None:
    """Wang et al. 2020: KL of the teacher's attention and the student's, a mean over heads and positions."""
    student, student_key, teacher, teacher_key = (t.float() for t in qk_case(9, None, 8, pairs=3).inputs())
    scores, scores_teacher = student @ student_key.mT / 8**0.5, teacher @ teacher_key.mT / 8**0.5
    flat = [scores.flatten(0, 2), scores_teacher.flatten(0, 2)]
    expected = F.kl_div(F.log_softmax(flat[0], -1), F.softmax(flat[1], -1), reduction="batchmean")
    torch.testing.assert_close(ear_ops.qk_attention_kl(student, student_key, teacher, teacher_key), expected)
    maps = [s.softmax(-1) for s in (scores, scores_teacher)]
    torch.testing.assert_close(ear_ops.attention_kl(*maps), expected)


def test_the_published_loss_of_tinybert() -> None:
    """Jiao et al. 2020 and their code: masked scores count as zero, and all B * H * L * S of them divide."""
    case = qk_case(9, None, 8, **RAGGED).to(torch.float32)
    query, key, query_aug, key_aug = case.inputs()
    masked = (1.0 - case.masks["attention_mask"][:, None, None].float()) * -10000.0
    student, teacher = query @ key.mT / 8**0.5 + masked, query_aug @ key_aug.mT / 8**0.5 + masked
    student, teacher = (torch.where(s <= -1e2, torch.zeros_like(s), s) for s in (student, teacher))
    expected = F.mse_loss(student, teacher)
    found = ear_ops.qk_scores_mse(query, key, query_aug, key_aug, **case.masks, reduction="padded_mean")
    torch.testing.assert_close(found, expected)


def test_the_published_loss_of_textbrewer() -> None:
    """Yang et al. 2020, ``att_mse_loss``: pairs of real tokens count and divide."""
    case = qk_case(9, None, 8, **RAGGED).to(torch.float32)
    query, key, query_aug, key_aug = case.inputs()
    scores, scores_aug = query @ key.mT / 8**0.5, query_aug @ key_aug.mT / 8**0.5
    mask = case.masks["attention_mask"][:, None].expand(-1, 2, -1).float()
    valid = torch.pow(mask.sum(dim=2), 2).sum()
    expected = (F.mse_loss(scores, scores_aug, reduction="none") * mask[..., None] * mask[:, :, None]).sum() / valid
    torch.testing.assert_close(ear_ops.qk_scores_mse(query, key, query_aug, key_aug, **case.masks), expected)
