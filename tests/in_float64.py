"""Run a script in double precision, once for each list of flags: python in_float64.py SCRIPT FLAGS.json

In single precision two runs that add the same numbers in another order drift apart by rounding, which Adam scales up
wherever a true gradient is near zero. In double precision that is too small to see, so what differs here would be a
difference of the runs themselves.
"""

import importlib
import json
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState

torch.set_default_dtype(torch.float64)
torch.Tensor.float = torch.Tensor.double
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
script = importlib.import_module(sys.argv[1])
for flags in json.loads(Path(sys.argv[2]).read_text()):
    script.main(script.parse_args(flags))
    AcceleratorState._reset_state()
    GradientState._reset_state()
