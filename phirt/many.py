"""Many prompts at once: their requests share the model's steps."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from phirt.stream import Generation, TokenStream

__all__ = ["run_streams"]


def run_streams(streams: Sequence[TokenStream], *, most: int) -> list[Generation]:
    """Run streams to their ends, and return what they generated, in their order.

    Args:
        streams: None of them has begun.
        most: Most that run at once.

    Raises:
        Exception: What the first that failed raised; the others are closed.
    """
    if not streams:
        return []
    with ThreadPoolExecutor(min(most, len(streams)), thread_name_prefix="phirt-many") as pool:
        futures = [pool.submit(_run, stream) for stream in streams]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            return [future.result() for future in futures]
        except BaseException:
            # Ctrl-C too: nothing goes on behind the caller's back.
            for future in futures:
                future.cancel()
            for stream in streams:
                stream.close()
            raise


def _run(stream: TokenStream) -> Generation:
    with stream:
        for _ in stream:
            pass
        return stream.result
