"""Turn a run's files into pictures and one page. Needs neither torch nor transformers."""
