"""Child process of the memory test: predicts one volume and prints its peak memory in MiB.

`ru_maxrss` is the largest resident set the process ever had: anonymous memory, libraries and mapped files together.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path


def main() -> None:
    """Arguments: model folder, image, output folder, memory_mb."""
    import torch

    import medssl.inference.predict as predicting

    torch.set_num_threads(2)
    from medssl.transfer.nnunet import nnunet_environment

    with nnunet_environment():
        import nnunetv2.inference.predict_from_raw_data  # noqa: F401  (part of what any nnU-Net prediction needs)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    began = time.monotonic()
    model, image, out = (Path(argument) for argument in sys.argv[1:4])
    summary = predicting.predict(model, image, out, device="cpu", step_size=1.0, memory_mb=int(sys.argv[4]), quiet=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    sys.stdout.write(
        json.dumps(
            {
                "libraries_mb": before,
                "peak_mb": peak,
                "seconds": time.monotonic() - began,
                "volumes_ml": summary.predictions[0].volumes_ml,
            }
        )
    )


if __name__ == "__main__":
    main()
