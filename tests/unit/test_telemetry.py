"""What Prometheus is told, and that the dashboard draws exactly that."""

from __future__ import annotations

import json
import math
import re
import threading
from pathlib import Path

from rayrl.actors import telemetry
from rayrl.metrics import RunLog
from rayrl.telemetry import SERIES, samples

ROOT = Path(__file__).resolve().parents[2]
ROW = {
    "reward/mean": 0.5,
    "groups/dropped": 2.0,
    "seconds/rollout": 1.5,
    "seconds/sync": 0.25,
    "workers/rollout": 4.0,
    "staleness/max": 1.0,
    "kl": math.nan,
    "entropy": 3.0,
}


def test_a_row_becomes_series_with_labels_and_what_is_not_finite_is_left_out():
    got = {(s.series.name, *s.labels.items()): s.value for s in samples(7, ROW)}
    assert got == {
        ("rayrl_step",): 7.0,
        ("rayrl_reward_mean",): 0.5,
        ("rayrl_staleness_max",): 1.0,
        ("rayrl_groups_dropped_total",): 2.0,
        ("rayrl_phase_seconds", ("phase", "rollout")): 1.5,
        ("rayrl_phase_seconds", ("phase", "sync")): 0.25,
        ("rayrl_workers", ("state", "rollout")): 4.0,
    }


def test_names_are_valid_and_unique_and_only_counters_end_in_total():
    names = [series.name for series in SERIES]
    assert len(set(names)) == len(names)
    for series in SERIES:
        assert re.fullmatch(r"rayrl_[a-z_]+", series.name)
        assert series.name.endswith("_total") == (series.kind == "counter")
        assert series.source.endswith("/") == bool(series.label)


def dashboard() -> dict:
    return json.loads((ROOT / "cluster" / "grafana.json").read_text())


def test_the_dashboard_draws_every_series_and_no_other():
    expressions = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    drawn = {name for text in expressions for name in re.findall(r"ray_rayrl_\w+", text)}
    assert drawn == {series.exported for series in SERIES}
    assert all('{run=~"$run"}' in text for text in expressions)


def test_the_dashboard_names_labels_that_the_series_have():
    labels = {series.exported: {"run", series.label} for series in SERIES}
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            (name,) = re.findall(r"ray_rayrl_\w+", target["expr"])
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= labels[name]


def test_panels_tile_the_grid_without_overlap():
    cells = set()
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in cells
                cells.add((x, y))


def test_a_run_log_tells_its_sinks_each_step_once(tmp_path):
    heard = []

    class Sink:
        def step(self, step, metrics):
            heard.append((step, dict(metrics)))

    log = RunLog(tmp_path, total_steps=2, tensorboard=False, also=[Sink()])
    log.step(0, {"eval/cider_d": 10.0})
    log.step(1, {"kl": 0.5})
    assert heard == [(0, {"eval/cider_d": 10.0}), (1, {"kl": 0.5})]


def test_the_page_names_every_series():
    page = (ROOT / "docs" / "observability.md").read_text()
    for series in SERIES:
        assert series.exported in page
        assert series.source.rstrip("/") in page


class Metric:
    """A gauge or counter that remembers what it was told."""

    def __init__(self, name, description, tag_keys):
        self.name, self.told = name, []
        self.again = threading.Event()

    def set(self, value, tags):
        self.told.append((value, tags))
        if len(self.told) >= 4:
            self.again.set()

    def inc(self, value, tags):
        self.told.append((value, tags))


def test_gauges_are_kept_until_the_next_step_and_counters_grow_once(monkeypatch):
    monkeypatch.setattr(telemetry, "Gauge", Metric)
    monkeypatch.setattr(telemetry, "Counter", Metric)
    monkeypatch.setattr(telemetry, "_AGAIN_S", 0.01)
    exported = telemetry.RayMetrics("here")
    exported.step(7, ROW)
    reward = exported._metrics["rayrl_reward_mean"]
    assert reward.again.wait(30)
    # A step without this number leaves it as it was.
    exported.step(8, {"seconds/sync": 0.5})
    exported.close()
    assert set(map(str, reward.told)) == {str((0.5, {"run": "here"}))}
    phases = exported._metrics["rayrl_phase_seconds"].told
    assert {(tags["phase"], value) for value, tags in phases} == {
        ("rollout", 1.5),
        ("sync", 0.25),
        ("sync", 0.5),
    }
    assert exported._metrics["rayrl_groups_dropped_total"].told == [(2.0, {"run": "here"})]
    told = len(reward.told)
    assert not exported._thread.is_alive() and len(reward.told) == told
