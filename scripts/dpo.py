"""`hf-jd dpo` as a script, for `accelerate launch` and `torchrun`.

accelerate launch --num_processes 2 scripts/dpo.py --config dpo.yaml --output_dir runs/dpo
"""

import sys

from hf_jd.cli import main

if __name__ == "__main__":
    sys.exit(main(["dpo", *sys.argv[1:]]))
