import os

# Before anything of Hugging Face is imported: no test reaches for a network, and none counts as a user of TRL's.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
