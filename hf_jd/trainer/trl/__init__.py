"""TRL's trainers; needs `hf-jd[trl]`."""
