"""A policy whose decisions are checked against what every policy promises."""

from dataclasses import dataclass

from nodeagent.scheduling.queueing import Decision, Grant, LaneSnapshot, Load, Policy, Wait
from nodeagent.scheduling.swap_aware import SwapAware


@dataclass
class CheckedPolicy:
    """Passes on what `inner` decides, and fails the test where that breaks a promise."""

    inner: Policy

    def decide(self, lane: LaneSnapshot) -> Decision:
        decision = self.inner.decide(lane)
        match decision:
            case Grant(index):
                self._check_grant(lane, index)
            case Load(model_id):
                in_use = [it for it, use in lane.servers.items() if use.in_flight and it != model_id]
                assert not in_use, f"{model_id} would be loaded while {in_use} is in use"
            case Wait():
                self._check_wait(lane)
        return decision

    def _check_grant(self, lane: LaneSnapshot, index: int) -> None:
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

    def _check_wait(self, lane: LaneSnapshot) -> None:
        """The device does not idle while requests are queued."""
        active = lane.loading is not None or any(use.in_flight or use.held for use in lane.servers.values())
        assert active or not lane.waiting, "idle though requests are queued"
