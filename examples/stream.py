"""Stream one answer from a running coordinator.

Start it first:  ./launch.sh job=serve coordinator.address=ipc:///tmp/ember.sock
Then:            python examples/stream.py ipc:///tmp/ember.sock "The sea is"
"""

import sys

from ember_pp.client import Client


def main() -> None:
    """Print an answer as it is made."""
    address, prompt = sys.argv[1], sys.argv[2]
    with Client(address) as client:
        for delta in client.stream(prompt, sampling={"max_tokens": 64, "seed": 1}):
            print(delta.text, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
