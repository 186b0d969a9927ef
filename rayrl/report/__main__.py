"""``python -m rayrl.report RUN_FOLDER …`` writes the report of each run folder again."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rayrl.report import write_report
from rayrl.section import local_path


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="rayrl.report", description="Write report.html from what a run left in its folder."
    )
    parser.add_argument("folder", type=local_path, nargs="+", metavar="RUN_FOLDER")
    for folder in parser.parse_args(argv).folder:
        try:
            print(write_report(folder))
        except (OSError, ValueError) as error:
            raise SystemExit(f"rayrl.report: {error}") from None


if __name__ == "__main__":
    main()
