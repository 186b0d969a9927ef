"""Turn COCO or Karpathy annotations and an image folder into Parquet shards.

    python jobs/prepare_coco.py --source karpathy --path dataset_coco.json --images coco \
        --image-size 512 --output datasets/coco
    ray job submit --working-dir . -- python jobs/prepare_coco.py …
"""

import sys
from pathlib import Path

# A job's working directory is not on the path, and rayrl need not be installed on a cluster.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

try:
    from rayrl.prepare import main
except ModuleNotFoundError as error:
    sys.exit(f"{error}: want the Python of `make setup`, .venv/bin/python {sys.argv[0]} …")

if __name__ == "__main__":
    main()
