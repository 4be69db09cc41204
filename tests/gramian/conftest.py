import transformers


def pytest_configure(config):
    # PEFT 0.21 reads a name that transformers 5 has replaced.
    config.addinivalue_line("filterwarnings", "ignore:.*is_gradient_checkpointing:FutureWarning")
    # Tiny configs leave some tables empty.
    config.addinivalue_line("filterwarnings", "ignore:Initializing zero-element tensors:UserWarning")
    # FRoD builds sparse tensors.
    config.addinivalue_line("filterwarnings", "ignore:Sparse invariant checks:UserWarning")
    transformers.logging.set_verbosity_error()
