"""``python -m unikd_fast.config schema`` prints configs/schema.json, ``... reference`` prints docs/configuration.md."""

import argparse
import json

from unikd_fast.config.explain import reference
from unikd_fast.config.schema import Config

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("schema", "reference"))
    if parser.parse_args().what == "schema":
        print(json.dumps(Config.model_json_schema(by_alias=True), indent=2))
    else:
        print(reference(), end="")
