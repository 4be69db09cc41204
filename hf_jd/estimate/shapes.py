"""A configuration -> the sizes that a step's cost depends on, read from the model on the meta device: no weights."""

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
    """A linear map y = W x that tokens pass.

    Attributes:
        outputs: p.
        inputs: d.
        trainable: Whether W is trained.
        share: Of the tokens that pass it: less than 1 for an expert.
        count: How many such maps one parameter holds: more than 1 for experts in one tensor.
    """

    outputs: int
    inputs: int
    trainable: bool
    share: float = 1.0
    count: int = 1

    @property
    def elements(self) -> int:
        """Numbers in W, of all maps together."""
        return self.count * self.outputs * self.inputs

    def tokens(self, tokens: int) -> float:
        """How many of the tokens pass one of the maps, each time counted."""
        return tokens * self.share * self.count


@dataclass(frozen=True)
class Table:
    """A trained embedding table.

    Attributes:
        entries: V.
        width: d.
        positions: Whether it is looked up by position instead of by token.
        head: The linear map that is the same parameter, if there is one.
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
        vectors: Trained numbers in norms and biases.
        parameters: Numbers in all parameters.
        trainable: Numbers in the trained ones, n.
        layers: Blocks, of encoder and decoder where there are two.
        hidden: Width of the residual stream.
        vocabulary: Outputs of the head, 0 without one.
        attention: Width of all heads of all attentions together, 0 without attention.
        fused: Whether adapters are fused with the experts that they adapt, so that their rows take a backward pass for
            each objective.
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
        """The linear maps that are trained."""
        return [matrix for matrix in self.matrices if matrix.trainable]


def read_shape(config: str, lora: int | None) -> Shape:
    """Return the sizes of the model that a configuration describes.

    Args:
        config: A folder with a config.json, such a file, or the name of a model of the Hub.
        lora: The rank of adapters on all linear layers but the head; None: all parameters are trained.

    Raises:
        ValueError: There is no such configuration, or no such model can be built, or nothing in it can be adapted.
    """
    return shape_of(build_on_meta(read_config(config), lora))


def read_config(config: str) -> PretrainedConfig:
    """Read a configuration; see `read_shape`."""
    path = Path(config)
    if path.is_dir() and not (path / "config.json").exists():
        raise ValueError(f"The folder {config} holds no config.json.")
    if not path.exists() and (config.endswith(".json") or config.startswith((".", "/", "~")) or config.count("/") > 1):
        raise ValueError(f"--model {config}: there is no such file or folder.")
    try:
        if not path.is_file():
            return AutoConfig.from_pretrained(config)
        settings = json.loads(path.read_text("utf-8"))
        if not isinstance(settings, dict) or "model_type" not in settings:
            raise ValueError("it names no `model_type`.")
        return AutoConfig.for_model(**settings)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"--model {config} is no configuration of transformers: {_first_line(error)}") from error


def build_on_meta(config: PretrainedConfig, lora: int | None) -> nn.Module:
    """Return the model without storage, by its own class, or as a language model; with adapters where asked for."""
    cls = getattr(transformers, (config.architectures or ["-"])[0], None)
    generator = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    builders = [cls._from_config] if cls is not None else [generator.from_config, AutoModel.from_config]
    for build in builders:
        try:
            with torch.device("meta"):
                model = build(config)
            model.tie_weights()  # transformers 5.0 leaves this out on the meta device.
            break
        except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
            reason = error
    else:
        raise ValueError(f"No model can be built from the configuration: {_first_line(reason)}") from reason
    if lora is None:
        return model
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's, on what it sets by itself.
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
        raise ValueError(f"{type(model).__name__} has no `hidden_size`: the cost model is one of transformers.")
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
    """(blocks, width of the heads of a block's attentions) of each stack: a decoder attends to its encoder, too."""

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
    """Each parameter of two dimensions or more that isn't only a table: a kernel [p, c, ...] is a map to p outputs."""
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
    """How many experts a layer has, and to how many of them a token goes; 0 and 0 without experts."""
    text = config.get_text_config()
    count = next(
        (n for key in ("num_local_experts", "num_experts", "n_routed_experts") if (n := getattr(text, key, 0))), 0
    )
    return (count, getattr(text, "num_experts_per_tok", None) or 1) if count else (0, 0)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
