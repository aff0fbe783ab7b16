import re
from pathlib import Path

from nodeagent.config import ApiKeyConfig, DeviceConfig, ModelConfig, NodeConfig, markdown_reference
from nodeagent.config.keys import ActivityConfig
from nodeagent.config.model_keys import LoraConfig, RestartConfig

README = Path(__file__).parents[3] / "configs" / "README.md"
COMMAND = "rolemesh-node-agent schema --format markdown"


def test_the_reference_in_the_readme_is_fresh() -> None:
    text = README.read_text(encoding="utf-8")
    assert COMMAND in text
    written = text[text.index("### The node") :]
    assert written == markdown_reference(), f"replace the end of {README.name} by the output of: {COMMAND}"


def test_every_key_has_one_row_with_four_cells() -> None:
    rows = [line for line in markdown_reference().splitlines() if line.startswith("| `")]
    parts = (NodeConfig, ModelConfig, LoraConfig, DeviceConfig, ApiKeyConfig, ActivityConfig, RestartConfig)
    keys = [field for part in parts for field in part.model_fields]

    assert [row.split("`")[1] for row in rows] == keys
    for row in rows:
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]
        assert len(cells) == 4, row
        assert all(cells), row


def test_a_row_shows_unit_bounds_and_default() -> None:
    reference = markdown_reference()

    assert "| `heartbeat_interval_s` | seconds, at least 1, at most 300 | `10` |" in reference
    assert "| `path` | text | required |" in reference
    assert "| `preload` | `true`, `false` | `false` |" in reference
    assert "| `flash_attn` | `true`, `false` or `on`, `off`, `auto` | none |" in reference
    assert "| `devices` | list of mapping | empty |" in reference
