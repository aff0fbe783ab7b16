from nodeagent.scheduling.affinity import Conversations


def test_the_last_device_of_a_conversation_is_remembered_and_old_ones_are_forgotten() -> None:
    conversations = Conversations()
    conversations.served("a", "gpu:0")
    conversations.served("a", "gpu:1")
    conversations.served(None, "gpu:0")
    assert conversations.device_of("a") == "gpu:1"
    assert conversations.device_of(None) is None
    for number in range(5000):
        conversations.served(str(number), "gpu:0")
    assert conversations.device_of("a") is None
    assert conversations.device_of("4999") == "gpu:0"
