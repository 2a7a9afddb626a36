"""Every operator that Triton serves, forward and backward, at odd sizes on a card: what compute-sanitizer watches."""

from __future__ import annotations

import torch

from aletheia_kernels.triton import DTYPES
from tests.triton.contract.calls import calls


def main() -> None:
    for dtype in DTYPES:
        for name, call in calls("cuda", dtype).items():
            outputs = getattr(torch.ops.aletheia, name)(*call.arguments)
            if call.backward:
                getattr(torch.ops.aletheia, f"{name}_backward")(*call.backward(outputs))
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
