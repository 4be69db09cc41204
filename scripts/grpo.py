"""`hf-jd grpo` as a script, for `accelerate launch` and `torchrun`.

accelerate launch --num_processes 2 scripts/grpo.py --config grpo.yaml --output_dir runs/grpo
"""

import sys

from hf_jd.cli import main

if __name__ == "__main__":
    sys.exit(main(["grpo", *sys.argv[1:]]))
