"""What the tokens of a batch lose, unreduced, by the model's kind of loss."""

from hf_jd.losses.causal_lm import causal_lm

LOSSES = {"ForCausalLM": causal_lm}

__all__ = ["LOSSES", "causal_lm"]
