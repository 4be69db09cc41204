def pytest_configure(config):
    # PEFT 0.21 reads a name that transformers 5 has replaced.
    config.addinivalue_line("filterwarnings", "ignore:.*is_gradient_checkpointing:FutureWarning")
