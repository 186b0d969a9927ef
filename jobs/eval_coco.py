"""Score captions as COCO reports them: of a checkpoint, or of a results file.

python jobs/eval_coco.py --checkpoint runs/grpo_coco/checkpoints/latest
python jobs/eval_coco.py --results results.json --references dataset_coco.json --split test
python jobs/eval_coco.py --results results.json --references captions_val2014.json --subset
python jobs/eval_coco.py --compare one.json other.json --references captions_val2014.json
python jobs/eval_coco.py --self-test
ray job submit --working-dir . -- python jobs/eval_coco.py …
"""

import sys
from pathlib import Path

# A job's working directory is not on the path, and rayrl need not be installed on a cluster.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

try:
    from rayrl.commands import evaluate
except ModuleNotFoundError as error:
    sys.exit(f"{error}: want the Python of `make setup`, .venv/bin/python {sys.argv[0]} …")

if __name__ == "__main__":
    evaluate()
