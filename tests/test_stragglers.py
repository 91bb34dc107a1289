"""A rank that lags is named, in the log and in the metrics."""

from __future__ import annotations

import json
import time

import pytest

from mpilm.parallel.pipeline import Pipeline
from tests import datasets, small_jobs

SERVERS = {"sync.kind": "parameter_server", "sync.servers": 2}


@pytest.mark.ranks(min=3, max=4)
def test_a_rank_that_lags_is_named_in_log_and_metrics(comm, tmp_path_all, monkeypatch):
    """The last of three replicas; of two workers beside two servers."""
    slow, run, compute = comm.size - 1, tmp_path_all / "run", Pipeline.run

    def slowed(*arguments):
        time.sleep(0.1 if comm.rank == slow else 0)
        return compute(*arguments)

    monkeypatch.setattr(Pipeline, "run", slowed)
    options = {"run.steps": 20, "run.hang_timeout_s": 2, "log.every": 1, "log.validate_every": 0}
    data = datasets.for_all(comm, tmp_path_all / "data")
    small_jobs.train_here(data, run, **options | (SERVERS if comm.size == 4 else {}))
    assert f"rank {slow} is a straggler" in (run / "log.txt").read_text()
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert "stragglers" not in records[0]
    assert list(records[-1]["stragglers"]) == [str(slow)]
    assert records[-1]["stragglers"][str(slow)] > 1.5
