"""The text tower on ImageNet's 80,000 prompts, trimmed and whole: python benchmarks/heads.py [--prompts N | --all]

The real architecture (ViT-B/32) with random weights, in float32. A sample is drawn evenly over the prompts sorted by
length and dealt into slices alike; every slice is encoded both ways, in turns, in batches of as many tokens. Prints
seconds on the wall and of the processor so far, their ratio, and the largest difference of a feature.
"""

import argparse
import time

import open_clip
import torch
from torch import Tensor

from clip_robustness.inference import heads

SLICE = 1000  # prompts


def imagenet_prompts(architecture: str) -> Tensor:
    """Token ids [80000, context], sorted by length."""
    templates = [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    tokens = heads.tokenize(open_clip.get_tokenizer(architecture), templates, open_clip.IMAGENET_CLASSNAMES)
    tokens = tokens.flatten(0, 1)
    return tokens[torch.argsort(tokens.argmax(dim=-1), stable=True)]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=4000, help="size of the sample")
    parser.add_argument("--all", action="store_true", help="all 80,000 (over an hour)")
    parser.add_argument("--architecture", default="ViT-B-32-quickgelu")
    parser.add_argument("--threads", type=int, default=1, help="one is disturbed least by what else runs")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokens = imagenet_prompts(arguments.architecture)
    if not arguments.all:
        tokens = tokens[torch.linspace(0, len(tokens) - 1, arguments.prompts).round().long()]
    torch.manual_seed(0)
    clip = open_clip.create_model(arguments.architecture).eval()

    def whole(rows: Tensor) -> Tensor:
        batches = rows.split(heads.BATCH_TOKENS // rows.shape[1])
        return torch.cat([clip.encode_text(batch, normalize=True) for batch in batches])

    ways = {"trimmed": lambda rows: heads.encode_tokens(clip, rows), "whole": whole}
    lengths = tokens.argmax(dim=-1) + 1.0
    print(
        f"{arguments.architecture}: {len(tokens):,} prompts, {lengths.mean():.1f} tokens (at most {lengths.max():.0f})"
    )
    print(f"{torch.get_num_threads()} threads; the trimmed way's share of the time: goal 0.25; difference: goal 1e-5")
    print("prompts  trimmed s (CPU)      whole s (CPU)    share (CPU)  difference")
    wall, used = dict.fromkeys(ways, 0.0), dict.fromkeys(ways, 0.0)
    done, difference = 0, 0.0
    slices = -(-len(tokens) // SLICE)
    for way in ways.values():  # the first call of a process is slow
        way(tokens[:50])
    for i in range(slices):
        rows = tokens[i::slices]
        features = {}
        for way in sorted(ways, reverse=bool(i % 2)):
            start, start_used = time.perf_counter(), time.process_time()
            features[way] = ways[way](rows)
            wall[way] += time.perf_counter() - start
            used[way] += time.process_time() - start_used
        done += len(rows)
        difference = max(difference, float((features["trimmed"] - features["whole"]).abs().max()))
        shares = [seconds["trimmed"] / seconds["whole"] for seconds in (wall, used)]
        seconds = "  ".join(f"{wall[way]:8.1f} ({used[way]:6.1f})" for way in ways)
        print(f"{done:7,} {seconds}   {shares[0]:.3f} ({shares[1]:.3f})  {difference:.1e}", flush=True)


if __name__ == "__main__":
    main()
