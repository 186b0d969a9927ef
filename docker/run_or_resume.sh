#!/bin/sh
# Start a job, or continue it where an earlier attempt left a checkpoint:
#   sh run_or_resume.sh SCRIPT RUN_FOLDER [options of the script]
# For schedulers that retry a failed job by running the same command again.
set -eu
script=$1
folder=$2
shift 2
if [ -e "$folder/checkpoints/latest" ]; then
    exec python "$script" --run_folder "$folder" --resume "$@"
fi
exec python "$script" --run_folder "$folder" "$@"
