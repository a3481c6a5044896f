"""The child process of :mod:`tbrm_theory.llm.boxed_answers`: one JSON pair a line in, one verdict a line out.

Run as a file, so that it loads math-verify and nothing else. Its timers are off: whoever started it ends it when it takes too long.
"""

from __future__ import annotations

import json
import logging
import sys

__all__: list[str] = []


def main() -> None:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)  # it warns that its timers are off
    read_as = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]

    def parsed(text: str) -> object:
        return parse(f"$\\boxed{{{text}}}$", extraction_config=read_as, parsing_timeout=None)

    verify(parsed("\\frac12"), parsed("x=0.5"), timeout_seconds=None)  # the first pair takes a second, and is not timed
    print("ready", flush=True)
    for line in sys.stdin:
        gold, answer = json.loads(line)
        print(json.dumps(bool(verify(parsed(gold), parsed(answer), timeout_seconds=None))), flush=True)


if __name__ == "__main__":
    main()
