"""Solvers that several weightings share."""
