"""How far tiled encoding and decoding are from one pass, on a smooth picture of 300×500.

    python tests/benchmarks/tiling.py [TOKENIZER]

Prints for each tile the share of equal codes, the mean and largest difference of decoded pixels (range 2), and both
PSNRs against the original. Nothing is asserted.
"""

import sys

import torch

import plait
from plait.tokenizers.metrics import psnr


def main() -> None:
    """Measure one tokenizer, tiny-vision by default."""
    tokenizer = plait.load_tokenizer(sys.argv[1] if len(sys.argv) > 1 else "tiny-vision", "image")
    y, x = torch.meshgrid(torch.arange(300) / 300, torch.arange(500) / 500, indexing="ij")
    picture = torch.stack([torch.sin(9 * x + 2 * y), torch.cos(7 * y - 3 * x), torch.sin(5 * x * y + 1)])[None] * 0.8
    whole = tokenizer.encode(picture)
    for tile in (64, 128, 256):
        same = (tokenizer.encode(picture, tile=tile).codes == whole.codes).double().mean()
        one, tiled = tokenizer.decode(whole), tokenizer.decode(whole, tile=tile)
        difference = (one - tiled).abs()
        print(
            f"tile {tile}: {same:.0%} codes equal, pixels differ by {difference.mean():.3f}, at most "
            f"{difference.max():.2f}, PSNR {psnr(tiled, picture).item():.1f} against {psnr(one, picture).item():.1f} dB"
        )


if __name__ == "__main__":
    main()
