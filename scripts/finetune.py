"""`hf-jd finetune` as a script, for `accelerate launch` and `torchrun`.

accelerate launch --num_processes 2 scripts/finetune.py examples/multitask.yaml --output_dir runs/multitask
"""

import sys

from hf_jd.cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
