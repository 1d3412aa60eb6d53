"""TensorFlow's start-up notices are held back; what anyone else says is not."""

import os
import subprocess
import sys

from mtl_jax import quiet_tensorflow

NOTICES = [
    "WARNING: All log messages before absl::InitializeLog() is called are written to STDERR\n",
    "I0000 00:00:1795318018.004400   18671 port.cc:153] oneDNN custom operations are on.\n",
    "E0000 00:00:1795318025.396759   18671 cuda_platform.cc:52] failed call to cuInit\n",
]
OTHERS = [
    "W0000 00:00:1795318025.396759   18671 record_reader.cc:52] corrupted record\n",
    "a warning of a library\n",
]


def test_only_notices_are_dropped(capfd):
    with quiet_tensorflow._without_notices():
        os.write(2, "".join([NOTICES[0], OTHERS[0], *NOTICES[1:], OTHERS[1]]).encode())
    assert capfd.readouterr().err == "".join(OTHERS)
    os.write(2, NOTICES[0].encode())
    assert capfd.readouterr().err == NOTICES[0]


def test_loading_is_silent_and_leaves_gpus_alone():
    program = (
        "import sys\n"
        "from mtl_jax import quiet_tensorflow\n"
        "quiet_tensorflow.load()\n"
        "tf = sys.modules['tensorflow']\n"
        "assert tf.config.get_visible_devices('GPU') == []\n"
        "assert int(tf.constant(1) + 1) == 2\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
