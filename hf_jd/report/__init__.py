"""What happened in this run? Its own files -> pictures, and one page. Knows neither torch nor transformers."""
