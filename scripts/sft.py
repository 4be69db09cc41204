"""`hf-jd sft` as a script, for `accelerate launch` and `torchrun`.

accelerate launch --num_processes 2 scripts/sft.py --config sft.yaml --output_dir runs/sft
"""

import sys

from hf_jd.cli import main

if __name__ == "__main__":
    sys.exit(main(["sft", *sys.argv[1:]]))
