"""A configuration -> the sizes that a step's cost depends on, read from the model on the meta device."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PretrainedConfig

_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class Matrix:
    """A linear map y = W x applied to tokens.

    Attributes:
        outputs: p.
        inputs: d.
        trainable: Whether W is trained.
        share: The share of tokens that it sees: less than 1 for an expert.
        count: The number of such maps in one parameter: more than 1 for experts in one tensor.
    """

    outputs: int
    inputs: int
    trainable: bool
    share: float = 1.0
    count: int = 1

    @property
    def elements(self) -> int:
        """The number of elements of W, over all maps."""
        return self.count * self.outputs * self.inputs

    def tokens(self, tokens: int) -> float:
        """Return how many times the maps are applied to one of the tokens."""
        return tokens * self.share * self.count


@dataclass(frozen=True)
class Table:
    """A trained embedding table.

    Attributes:
        entries: V.
        width: d.
        positions: Whether it is looked up by position, not by token.
        head: The linear map that shares the parameter, if any.
    """

    entries: int
    width: int
    positions: bool
    head: Matrix | None


@dataclass(frozen=True)
class Shape:
    """The sizes of a model.

    Attributes:
        name: The architecture.
        matrices: All linear maps.
        tables: The trained embedding tables.
        vectors: The number of trained elements in norms and biases.
        parameters: The number of elements of all parameters.
        trainable: n, the number of trained elements.
        layers: The number of blocks, of encoder and decoder together.
        hidden: The width of the residual stream.
        vocabulary: The outputs of the head; 0 without one.
        attention: The total width of all heads of all attentions; 0 without attention.
        fused: Whether adapters are fused with the experts that they adapt, so that their rows take one backward pass
            per objective.
    """

    name: str
    matrices: tuple[Matrix, ...]
    tables: tuple[Table, ...]
    vectors: int
    parameters: int
    trainable: int
    layers: int
    hidden: int
    vocabulary: int
    attention: int
    fused: bool

    @property
    def trained(self) -> list[Matrix]:
        """The trained linear maps."""
        return [matrix for matrix in self.matrices if matrix.trainable]


def read_shape(config: str, lora: int | None) -> Shape:
    """Return the sizes of the model that a configuration describes.

    Args:
        config: A folder with a config.json, such a file, or the name of a model on the Hub.
        lora: The rank of adapters on all linear layers except the head; None: train all parameters.

    Raises:
        ValueError: There is no such configuration, the model can't be built, or nothing in it can be adapted.
    """
    return shape_of(build_on_meta(read_config(config), lora))


def read_config(config: str) -> PretrainedConfig:
    """Read a configuration; see `read_shape`."""
    path = Path(config)
    if path.is_dir() and not (path / "config.json").exists():
        raise ValueError(f"The folder {config} has no config.json: give a folder with one, or the name of a model.")
    if not path.exists() and (config.endswith(".json") or config.startswith((".", "/", "~")) or config.count("/") > 1):
        raise ValueError(f"--model {config}: there is no such file or folder.")
    try:
        if not path.is_file():
            return AutoConfig.from_pretrained(config)
        settings = json.loads(path.read_text("utf-8"))
        if not isinstance(settings, dict) or "model_type" not in settings:
            raise ValueError("it has no `model_type`.")
        return AutoConfig.for_model(**settings)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"--model {config} is no transformers configuration: {_first_line(error)}") from error


def build_on_meta(config: PretrainedConfig, lora: int | None) -> nn.Module:
    """Build the model without storage, by its own class or as a language model; add adapters if `lora` is set."""
    cls = getattr(transformers, (config.architectures or ["-"])[0], None)
    generator = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    builders = [cls._from_config] if cls is not None else [generator.from_config, AutoModel.from_config]
    for build in builders:
        try:
            with torch.device("meta"):
                model = build(config)
            model.tie_weights()  # transformers 5.0 skips this on the meta device
            break
        except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
            reason = error
    else:
        raise ValueError(f"No model can be built from the configuration: {_first_line(reason)}") from reason
    if lora is None:
        return model
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns about settings of its own
            return get_peft_model(model, LoraConfig(r=lora, target_modules="all-linear"))
    except ValueError as error:
        raise ValueError(f"LoRA can't be added to {type(model).__name__}: {_first_line(error)}") from error


def shape_of(model: nn.Module) -> Shape:
    """Return the sizes of a model; its parameters may be on the meta device.

    Raises:
        ValueError: It is no transformer.
    """
    whole: Any = model
    config = whole.config.get_text_config()
    if not hasattr(config, "hidden_size"):
        raise ValueError(f"{type(model).__name__} has no `hidden_size`: costs can only be estimated for transformers.")
    try:
        head, words = whole.get_output_embeddings(), whole.get_input_embeddings()
        outputs = getattr(head, "weight", None)
    except NotImplementedError:
        head = words = outputs = None
    tables = _tables(model, head, words)
    stacks = _stacks(config)
    parameters = list(model.parameters())
    return Shape(
        name=type(whole.get_base_model() if hasattr(whole, "get_base_model") else model).__name__,
        matrices=tuple(_matrices(model, whole.config)),
        tables=tuple(tables),
        vectors=sum(p.numel() for p in parameters if p.requires_grad and p.dim() < 2),
        parameters=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        layers=sum(blocks for blocks, _ in stacks),
        hidden=config.hidden_size,
        vocabulary=0 if outputs is None else outputs.shape[0],
        attention=sum(blocks * width for blocks, width in stacks),
        fused=any(isinstance(module, ParamWrapper) for module in model.modules()),
    )


def _stacks(config: PretrainedConfig) -> list[tuple[int, int]]:
    """Return (blocks, width of a block's attention heads) per stack; a decoder also attends to its encoder."""

    def first(*names: str) -> int:
        return next((value for name in names if (value := getattr(config, name, None))), 0)

    def width(heads: int) -> int:
        return heads * (first("head_dim", "d_kv") or config.hidden_size // max(1, heads))

    if not config.is_encoder_decoder:
        return [(config.num_hidden_layers, width(first("num_attention_heads")))]
    encoder, decoder = (
        width(first(f"{side}_attention_heads", "num_attention_heads")) for side in ("encoder", "decoder")
    )
    layers = first("encoder_layers", "num_hidden_layers"), first("decoder_layers", "num_decoder_layers")
    return [(layers[0], encoder), (layers[1], 2 * decoder)]


def _matrices(model: nn.Module, config: PretrainedConfig) -> Iterator[Matrix]:
    """Yield parameters of two or more dimensions that aren't only tables; a kernel [p, c, ...] maps to p outputs."""
    experts, chosen = _experts(config)
    for module_name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            continue
        for name, p in module.named_parameters(recurse=False):
            if p.dim() < 2:
                continue
            if p.dim() == 3 and experts and len(p) == experts:
                share, count, (outputs, inputs) = chosen / experts, experts, p.shape[1:]
            else:
                share, count, outputs, inputs = 1.0, 1, len(p), math.prod(p.shape[1:])
                if experts and _EXPERT.search(f"{module_name}.{name}"):
                    share = chosen / experts
            yield Matrix(outputs, inputs, p.requires_grad, share, count)


def _tables(model: nn.Module, head: Any, words: Any) -> Iterator[Table]:
    seen: set[Tensor] = set()
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight.requires_grad and module.weight not in seen:
            seen.add(module.weight)
            entries, width = module.weight.shape
            tied = getattr(head, "weight", None) is module.weight
            yield Table(entries, width, module is not words, Matrix(entries, width, True) if tied else None)


def _experts(config: PretrainedConfig) -> tuple[int, int]:
    """Return the number of experts per layer, and of experts per token; 0 and 0 without experts."""
    text = config.get_text_config()
    count = next(
        (n for key in ("num_local_experts", "num_experts", "n_routed_experts") if (n := getattr(text, key, 0))), 0
    )
    return (count, getattr(text, "num_experts_per_tok", None) or 1) if count else (0, 0)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
