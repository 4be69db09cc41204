"""What a fine-tuning run is: from flags and files to a trained model, its card, and a comparison of several runs."""
