"""``python -m unikd_fast.config`` prints the JSON schema that configs/schema.json holds."""

import json

from unikd_fast.config.schema import Config

if __name__ == "__main__":
    print(json.dumps(Config.model_json_schema(by_alias=True), indent=2))
