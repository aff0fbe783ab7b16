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
            case Load(model_id, beside=beside):
                self._check_load(lane, model_id, beside)
            case Wait():
                self._check_wait(lane)
        return decision

    def _check_load(self, lane: LaneSnapshot, model_id: str, beside: frozenset[str]) -> None:
        room = lane.room
        stay = beside if room.concurrent else frozenset()
        in_use = [it for it, use in lane.servers.items() if use.in_use and it not in stay and it != model_id]
        assert not in_use, f"{model_id} would be loaded while {in_use} is in use"
        assert len(beside) < room.max_models
        leaving = [it for it, use in lane.servers.items() if use.resident and it not in beside and it != model_id]
        assert not any(lane.servers[it].pinned for it in leaving)
        if room.free_bytes is not None and beside and model_id not in lane.servers:
            assert room.bytes_of(model_id) <= room.free_bytes + sum(map(room.bytes_of, leaving)), "too little memory"

    def _check_grant(self, lane: LaneSnapshot, index: int) -> None:
        model_id = lane.waiting[index].model_id
        server = lane.servers[model_id]
        assert server.ready
        assert not server.held
        assert server.in_flight + min(lane.waiting[index].slots, server.slots) <= server.slots
        stays = lane.loading in (None, model_id) or model_id in lane.staying
        assert stays, "granted while another load may be stopping its server"
        others = [it for it, use in lane.servers.items() if use.in_use and it != model_id]
        assert lane.room.concurrent or not others
        if isinstance(self.inner, SwapAware):
            bound_s = self.inner.swap_fairness_s
            overdue = [it.passed_since is not None and lane.now - it.passed_since >= bound_s for it in lane.waiting]
            for other, is_overdue in zip(lane.waiting, overdue, strict=True):
                in_its_way = not lane.room.concurrent or other.model_id == model_id
                assert overdue[index] or not (is_overdue and in_its_way), "passed for longer than the fairness bound"

    def _check_wait(self, lane: LaneSnapshot) -> None:
        """The device does not idle while requests are queued."""
        active = lane.loading is not None or any(use.in_use or use.held for use in lane.servers.values())
        assert active or not lane.waiting, "idle though requests are queued"
