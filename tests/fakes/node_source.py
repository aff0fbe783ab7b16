"""A node for the dispatcher's client to report on: it never changes and has no devices."""

from datetime import UTC, datetime

from nodeagent.dispatcher.wire import Heartbeat, Register


class FakeNodeSource:
    """Implements `dispatcher.client.NodeSource`."""

    def register_payload(self) -> Register:
        return Register(
            node_id="box",
            node_name="Box",
            base_url="http://127.0.0.1:1",
            agent_version="1",
            incarnation="i",
            started_at=datetime.now(UTC),
            heartbeat_interval_s=10,
            roles=[],
            devices=[],
            models=[],
        )

    def heartbeat_payload(self, sequence: int) -> Heartbeat:
        return Heartbeat(
            node_id="box",
            incarnation="i",
            sequence=sequence,
            sent_at=datetime.now(UTC),
            status="ready",
            reasons=[],
            reason_codes=[],
            devices=[],
            models=[],
        )
