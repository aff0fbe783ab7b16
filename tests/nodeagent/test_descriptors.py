import resource
import subprocess
import sys

import pytest

pytestmark = pytest.mark.real


def test_the_soft_limit_is_raised_to_the_hard_one() -> None:
    code = (
        "import resource; from nodeagent.descriptors import raise_limit;"
        "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1];"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard));"
        "print(raise_limit(), resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    raised, soft = map(int, done.stdout.split())
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert raised == soft == (10240 if hard == resource.RLIM_INFINITY else hard)
