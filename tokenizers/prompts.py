"""How models from elsewhere are prompted and sampled: what ``generation.json`` of their bundles holds.

By target modality, besides how tokens are drawn:

- ``prompt``: the ids before what is generated. ``{prompt}`` stands for the parts that the user gives, ``{media}`` for
  those that are not text; a special token stands by its name or its part, ``<bos>``; the rest is text.
- ``unconditional``: the same for guidance, without its condition; ``image_only``: with what is not text alone.
- ``grid``: rows and columns of codes. Without it the model chooses them.
- ``pixels``: the least and the most that an image in the prompt has; it is scaled to lie between.
"""

from typing import Any

_NEGATIVE = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality, "
    "low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)


def text_prompts(begins: bool, sampling: dict[str, Any]) -> dict[str, Any]:
    """Of a language model: ``begins`` says whether its tokenizer puts <bos> before a text."""
    return {"text": {"prompt": "<bos>{prompt}" if begins else "{prompt}", **sampling}}


def emu3_prompts(grid: list[int] | None, pixels: list[int] | None) -> dict[str, Any]:
    """Of Emu3: questions as Emu3-Chat was trained to answer them, images as Emu3-Gen draws them."""
    image = {"prompt": "<bos>{prompt} masterpiece, film grained, best quality.", "unconditional": f"<bos>{_NEGATIVE}"}
    draw = {"top_k": 2048, "guidance": 3.0, "guidance_domain": "log_softmax"}
    text = {"prompt": "<bos>You are a helpful assistant. USER: {prompt}. ASSISTANT:", "temperature": 0.0}
    return {
        "text": text | ({"pixels": pixels} if pixels else {}),
        "image": image | draw | ({"grid": grid} if grid else {}),
    }


def emu3_5_prompts(has_turns: bool) -> dict[str, Any]:
    """Of Emu3.5, which chooses the size of its images; ``has_turns``: whether it has the mark before an answer."""
    ask = "<bos>You are a helpful assistant{task}. USER: {parts} ASSISTANT: " + "<|extra_100|>" * has_turns

    def of(task: str, parts: str = "{prompt}") -> str:
        return ask.replace("{task}", task).replace("{parts}", parts)

    image = {"prompt": of(" for t2i task"), "unconditional": of("", "{media}")}
    return {
        "text": {"prompt": of(""), "top_k": 1024, "top_p": 0.9},
        "image": image | {"top_k": 5120, "guidance": 5.0, "guidance_domain": "log_softmax"},
        "interleaved": {"prompt": of(" for story task")},
    }


def chameleon_prompts(has_turns: bool) -> dict[str, Any]:
    """Of Chameleon and Anole; ``has_turns``: whether there is a mark for the end of the user's turn."""
    prompt = "<bos>{prompt}" + "<turn>" * has_turns
    guidance = {"guidance": 3.0, "guidance_image": 1.2, "guidance_domain": "logits"}
    draw = {"temperature": 0.7, "top_p": 0.9}
    return {
        "text": {"prompt": prompt, **draw},
        "image": {"prompt": prompt, "unconditional": "<bos>", "image_only": "<bos>{media}", **draw, **guidance},
        "interleaved": {"prompt": prompt},
    }
