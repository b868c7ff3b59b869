"""Tell Ray's autoscaler on the head of a cluster of one's own hosts what it does not find out by itself (Ray 2.60, provider `local`).

    python -m diptych.cluster.on_ray.own_hosts ~/ray_bootstrap_config.yaml

That file is what `ray up` has made of its config. Three things are missing: that the head runs (without it the autoscaler starts nobody),
that the head counts among the hosts of the one node type (without it the last of `worker_ips` is left out), and, where the head runs
already, which addresses have come since.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def counting_the_head(config: dict[str, Any]) -> dict[str, Any]:
    """The config, wanting as many hosts as there are, the head included."""
    hosts = len(config["provider"]["worker_ips"]) + 1
    types = {name: {**of, "min_workers": hosts, "max_workers": hosts} for name, of in config["available_node_types"].items()}
    return {**config, "available_node_types": types, "max_workers": hosts}


def main() -> int:
    from ray.autoscaler._private.local.node_provider import LocalNodeProvider, record_local_head_state_if_needed

    path = Path(sys.argv[1]).expanduser()
    config = json.loads(path.read_text())
    provider = LocalNodeProvider(config["provider"], config["cluster_name"])  # type: ignore[no-untyped-call]
    record_local_head_state_if_needed(provider)
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(counting_the_head(config)))
    os.replace(draft, path)  # the autoscaler reads it every 5 s
    return 0


if __name__ == "__main__":
    sys.exit(main())
