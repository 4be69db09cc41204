"""Jacobian descent for Hugging Face training."""
