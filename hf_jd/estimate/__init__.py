"""Estimate what a step costs: bytes, operations and time of an update, before anything is loaded or trained."""
