"""Write the dashboard, the alert rules and their tests: `python -m diptych.cluster.dashboards [--check]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

from .alerts import rule_tests, rules
from .grafana import dashboard
from .made import make

HERE = Path(__file__).parent
MADE = "# Made by `python -m diptych.cluster.dashboards` from core/metrics.py and cluster/dashboards/alerts.py; change it there.\n"


def files() -> dict[str, str]:
    """The text of every file, by its name in this folder."""
    return {
        "grafana.json": json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n",
        "alerts.yaml": MADE + _yaml(rules()),
        "alerts_test.yaml": MADE + _yaml(rule_tests()),
    }


def _yaml(values: Any) -> str:
    return yaml.safe_dump(values, sort_keys=False, width=10_000, allow_unicode=True)


def main() -> int:
    return make({HERE / name: text for name, text in files().items()}, "python -m diptych.cluster.dashboards", sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
