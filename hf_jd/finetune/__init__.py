"""Fine-tuning runs: from flags and files to a trained model, its card, and a comparison of several runs."""
