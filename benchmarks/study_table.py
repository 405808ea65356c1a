"""Write the study's tables of docs/defaults.md from its records, docs/study.json.

python benchmarks/study_table.py                        # the page alone
python benchmarks/study_table.py --runs runs/reproduce  # after the finished runs were added to the records
python benchmarks/study_table.py --costs                # after every row's step was timed
"""

import argparse
from pathlib import Path

from unikd_fast.io import write_file
from unikd_fast.recipes.study_results import Study, merged, parse_study, read_study, study_json, study_markdown

ROOT = Path(__file__).resolve().parents[1]
PAGE, RECORDS = ROOT / "docs" / "defaults.md", ROOT / "docs" / "study.json"
BEGIN, END = "<!-- study:begin -->", "<!-- study:end -->"
SEEDS = range(5)


def rewritten(page: str, study: Study) -> str:
    """Return the page with the study's tables between the marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"the page needs {BEGIN} and then {END}"
    return f"{before}{BEGIN}\n{study_markdown(study)}{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, metavar="FOLDER", help="add the finished runs in it to the records")
    parser.add_argument("--costs", action="store_true", help="time a step of every row, and add that to the records")
    options = parser.parse_args()
    study = parse_study(RECORDS.read_text()) if RECORDS.exists() else Study({}, {}, (), ())
    if options.runs is not None:
        study = merged(study, read_study(options.runs, SEEDS))
    if options.costs:
        from study_cost import measure_costs

        study = merged(study, Study({}, measure_costs(), (), ()))
    write_file(RECORDS, study_json(study))
    write_file(PAGE, rewritten(PAGE.read_text(), study))


if __name__ == "__main__":
    main()
