"""Started once by the tests with an output folder: all fits on two processes (gloo), one after the other."""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from integration import same_noise, train_on_two_processes

if __name__ == "__main__":
    folder, only = Path(sys.argv[1]), sys.argv[2:]
    runs = {
        **{
            case: partial(train_on_two_processes.main, case)
            for case in train_on_two_processes.CASES
        },
        **{case: partial(same_noise.on_each_process, case) for case in same_noise.CASES},
        **{
            f"fsdp2-{case}": partial(same_noise.on_each_process, case, strategy="fsdp2")
            for case in same_noise.SHARDED
        },
    }
    runs["reentrant"] = runs.pop("reentrant")  # ends with an error inside a backward pass
    for name in only or runs:
        (folder / name).mkdir(parents=True, exist_ok=True)
        runs[name](folder / name)
