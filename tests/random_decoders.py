"""Decoders of random weights that tests compare with others."""

from typing import Any

import torch

from plait.model.config import DecoderConfig
from plait.model.decoder import Decoder

VOCABULARY = 97


def random_decoder(seed: int = 0, **fields: Any) -> Decoder:
    """Every weight is random, the norms' too, and large enough that every part shows in the logits."""
    torch.manual_seed(seed)
    decoder = Decoder(DecoderConfig(vocabulary_size=VOCABULARY, **fields)).eval()
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.2)
    return decoder
