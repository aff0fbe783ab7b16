import pytest

from nodeagent.scheduling.queueing import Grant, Load, ServerUse, Wait, decide

READY = ServerUse(ready=True, slots=1, in_flight=0)
BUSY = ServerUse(ready=True, slots=1, in_flight=1)
STARTING = ServerUse(ready=False, slots=1, in_flight=0)


@pytest.mark.parametrize(
    ("waiting", "servers", "loading", "expected"),
    [
        ([], {"a": READY}, None, Wait),
        (["a"], {"a": READY}, None, Grant),
        (["a"], {"a": BUSY}, None, Wait),
        (["a"], {"a": ServerUse(True, 4, 3)}, None, Grant),
        (["a"], {"a": ServerUse(True, 4, 4)}, None, Wait),
        (["a"], {}, None, Load),
        (["a"], {"a": STARTING}, None, Load),
        (["a"], {"a": STARTING}, "a", Wait),
        (["b"], {"a": READY}, None, Load),
        (["b"], {"a": BUSY}, None, Wait),
        (["b", "a"], {"a": BUSY}, None, Wait),
        (["b"], {"a": STARTING}, "a", Load),
    ],
)
def test_the_head_of_the_queue_decides(
    waiting: list[str], servers: dict[str, ServerUse], loading: str | None, expected: type
) -> None:
    decision = decide(waiting, servers, loading)
    assert isinstance(decision, expected), decision
    if isinstance(decision, Load):
        assert decision.model_id == waiting[0]
    if isinstance(decision, Grant):
        assert decision.index == 0


def test_a_server_whose_own_requests_are_broken_but_not_yet_back_does_not_block_its_restart() -> None:
    assert isinstance(decide(["a"], {"a": ServerUse(ready=False, slots=4, in_flight=2)}, None), Load)
