"""How long a person waits for help: median of seven starts, beside `import torch`.

python benchmarks/startup.py
"""

import subprocess
import sys
import time
from statistics import median

from machine import write_result

COMMANDS = {
    "vitrail --help": ["-m", "vitrail", "--help"],
    "vitrail train --help": ["-m", "vitrail", "train", "--help"],
    "vitrail train demo --help": ["-m", "vitrail", "train", "demo", "--help"],
    "python -c 'import torch'": ["-c", "import torch"],
}


def seconds(arguments: list[str]) -> float:
    """Median wall time of seven runs, after one to warm the disk cache."""
    times = []
    for _ in range(8):
        began = time.perf_counter()
        subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
        times.append(time.perf_counter() - began)
    return median(times[1:])


def main() -> None:
    rows = [f"| `{name}` | {seconds(arguments):.2f} |" for name, arguments in COMMANDS.items()]
    body = "| command | seconds |\n|---|---|\n" + "\n".join(rows)
    print(body)
    print(write_result("startup", "python benchmarks/startup.py", body))


if __name__ == "__main__":
    main()
