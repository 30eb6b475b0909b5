"""Who is connected: Flower's nodes in a fixed order, and the wait for them."""

import logging
import time
from collections.abc import Callable
from datetime import datetime

from flwr.common.constant import HEARTBEAT_INTERVAL_INF
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.5


def connected(grid: Grid) -> list[NodeInfo]:
    """Return the connected nodes in the order in which they registered, the same in each simulation; ids are random."""
    return sorted(grid.get_nodes(), key=lambda node: (_instant(node.registered_at), node.node_id))


def ids(nodes: list[NodeInfo]) -> list[int]:
    """Return the nodes' ids."""
    return [node.node_id for node in nodes]


def are_simulated(nodes: list[NodeInfo]) -> bool:
    """Tell whether these are the nodes of a simulation: they alone have no heartbeat.

    A simulation registers its partitions 0, 1, … in this order, under new ids in each run.
    """
    return bool(nodes) and all(node.heartbeat_interval == HEARTBEAT_INTERVAL_INF for node in nodes)


def wait_for(
    grid: Grid, count: int, timeout: float, select: Callable[[list[NodeInfo]], list[NodeInfo]] = list
) -> list[NodeInfo]:
    """Return the selected ones of the connected nodes, once they are `count` or `timeout` seconds have passed."""
    deadline = time.monotonic() + timeout
    nodes = select(connected(grid))
    if len(nodes) < count:
        _log.info("waiting up to %gs for %d nodes; %d are there", timeout, count, len(nodes))
    while len(nodes) < count and time.monotonic() < deadline:
        time.sleep(min(_POLL_SECONDS, timeout))
        nodes = select(connected(grid))
    return nodes


def _instant(text: str) -> float:
    return datetime.fromisoformat(text).timestamp() if text else 0.0
