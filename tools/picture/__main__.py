"""Draw README's picture and write its answer: `python -m tools.picture FOLDER`.

FOLDER is what `kvmmm bench crossover --out FOLDER` has left. `make picture` does both.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tools.picture.section import SectionError, run_name, section_of, with_section

HERE = Path(__file__).resolve().parent
PICTURE = HERE / "crossover.svg"
README = HERE.parents[1] / "README.md"


def main(argv: list[str] | None = None) -> int:
    """Do what this file says; returns an exit status."""
    from kvmmm.bench.crossover.answer import answer_of
    from kvmmm.bench.crossover.extras import MissingExtraError
    from kvmmm.bench.crossover.record import ResultsError, read_results
    from kvmmm.bench.crossover.report import readme_picture
    from kvmmm.bench.crossover.statistics import analyse

    parser = argparse.ArgumentParser(prog="python -m tools.picture", description=__doc__)
    parser.add_argument("folder", type=Path, help="what kvmmm bench crossover left")
    parser.add_argument("--readme", type=Path, default=README, help="the file to change")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="the picture to draw")
    options = parser.parse_args(argv)
    try:
        results = read_results(options.folder)
        analysis = analyse(results, seed=results.header.seed)
        answer = answer_of(results, analysis)
        section = section_of(results, answer)
        text = with_section(options.readme.read_text(encoding="utf-8"), section)
        readme_picture(options.folder, options.picture)
        _sign(options.picture, run_name(results))
        options.readme.write_text(text, encoding="utf-8")
    except (MissingExtraError, ResultsError, SectionError, OSError) as e:
        print(f"picture: {e}", file=sys.stderr)
        return 1
    print("\n".join(answer))
    print(f"\n{options.picture} and {options.readme} are of this run: look at them, commit both")
    return 0


def _sign(picture: Path, name: str) -> None:
    text = picture.read_text(encoding="utf-8")
    picture.write_text(f"{text.rstrip()}\n<!-- {name} -->\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
