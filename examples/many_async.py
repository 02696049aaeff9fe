"""Many requests at once with asyncio; answers come as they end.

python examples/many_async.py ipc:///tmp/ember.sock
"""

import asyncio
import sys

from ember_pp.client import AsyncClient

TOPICS = ("rivers", "planets", "music", "mathematics", "bread", "winter")


async def main() -> None:
    """Ask about each topic; the coordinator batches what is open together."""
    async with AsyncClient(sys.argv[1]) as client:

        async def ask(topic: str) -> str:
            messages = [{"role": "user", "content": f"Tell me about {topic}."}]
            answer = await client.chat(messages, sampling={"max_tokens": 48, "seed": 0})
            return f"{topic}: {answer.text}"

        for answer in asyncio.as_completed([ask(topic) for topic in TOPICS]):
            print(await answer)


if __name__ == "__main__":
    asyncio.run(main())
