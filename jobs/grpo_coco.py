"""Fine-tune a captioner with GRPO (or another objective) on CIDEr-D.

python jobs/grpo_coco.py                                  the embedded default, on this machine
python jobs/grpo_coco.py --config jobs/coco.yaml --learner.lr 1e-5
ray job submit --working-dir . -- python jobs/grpo_coco.py
"""

import sys
from pathlib import Path

# A job's working directory is not on the path, and rayrl need not be installed on a cluster.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

try:
    from rayrl.commands import grpo
except ModuleNotFoundError as error:
    sys.exit(f"{error}: want the Python of `make setup`, .venv/bin/python {sys.argv[0]} …")

if __name__ == "__main__":
    grpo()
