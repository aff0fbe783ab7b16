"""A policy that is watched: each of its decisions is held against what every policy promises."""

import math
from dataclasses import dataclass

from nodeagent.scheduling.queueing import Decision, Grant, LaneNow, Load, Policy, Wait
from nodeagent.scheduling.swap_aware import SwapAware


@dataclass
class CheckedPolicy:
    """Passes on what `inner` decides, and fails the test where that breaks a promise."""

    inner: Policy

    def decide(self, lane: LaneNow) -> Decision:
        decision = self.inner.decide(lane)
        match decision:
            case Grant(index):
                self._check_grant(lane, index)
            case Load(model_id):
                in_use = [it for it, use in lane.servers.items() if use.in_flight and it != model_id]
                assert not in_use, f"{model_id} would be loaded while {in_use} is in use"
            case Wait(until=until):
                self._check_wait(lane, until)
        return decision

    def _check_grant(self, lane: LaneNow, index: int) -> None:
        model_id = lane.waiting[index].model_id
        server = lane.servers[model_id]
        assert server.ready
        assert not server.held
        assert server.in_flight < server.slots
        assert lane.loading in (None, model_id), "granted while another load may be stopping its server"
        assert not [it for it, use in lane.servers.items() if use.in_flight and it != model_id]
        if isinstance(self.inner, SwapAware):
            bound_s = self.inner.swap_fairness_s
            overdue = [it.passed_since is not None and lane.now - it.passed_since >= bound_s for it in lane.waiting]
            assert overdue[index] or not any(overdue), "passed for longer than the fairness bound"

    def _check_wait(self, lane: LaneNow, until: float) -> None:
        """Nothing idles while somebody waits, but for what is going on, and for the linger."""
        going_on = lane.loading is not None or any(use.in_flight or use.held for use in lane.servers.values())
        if not lane.waiting or going_on:
            return
        assert isinstance(self.inner, SwapAware), "idle though somebody waits"
        assert lane.now < until <= lane.now + self.inner.residency_linger_s
        assert not math.isinf(until)
