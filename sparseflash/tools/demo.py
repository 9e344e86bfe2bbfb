"""``sparseflash demo``: a tour of the library that prints what it does."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console

from sparseflash import parse, reference
from sparseflash.cli.mask_summary import MaskSummary
from sparseflash.functional.attention import attention
from sparseflash.models import PixelTransformer
from sparseflash.pathfinder import draw as drawn
from sparseflash.pathfinder import marker_distance_baseline
from sparseflash.patterns.atomic_write import remove_tree, write_text
from sparseflash.train import evaluate, figures, held_out, recipe, train

PATTERN = "local(512) | butterfly(unit=256)"
GOAL = 0.85
MARK = ".sparseflash-demo"
FRESH = 1_000_003  # a seed that no set of images has
WEIGHTS = Path(__file__).parents[1] / "weights" / "path256"


@dataclass(frozen=True)
class Size:
    """The sizes of the tour, which the quick form reduces.

    Attributes:
        exact_tokens: tokens of the comparison with float64.
        timed_tokens: tokens at which both attentions are timed.
        learning_steps: training steps of part 3; None for the whole recipe, to which the goal applies.
        fresh: test images of part 3.
        answered: number of images of 65,536 tokens classified in part 4.
        long_steps: training steps at 65,536 tokens.
    """

    exact_tokens: int
    timed_tokens: int
    learning_steps: int | None
    fresh: int
    answered: int
    long_steps: int


FULL = Size(exact_tokens=1_000, timed_tokens=16_384, learning_steps=None, fresh=2_000, answered=4, long_steps=2)
QUICK = Size(exact_tokens=500, timed_tokens=8_192, learning_steps=150, fresh=500, answered=1, long_steps=1)


def run(out: Path, seed: int = 0, size: Size = FULL) -> None:
    """Show, check, time, train, evaluate; then classify and train at 65,536 tokens.

    Args:
        out: folder for pictures and checkpoints.
        seed: seed of weights and images.
        size: sizes of the parts.

    Raises:
        ValueError: a negative seed; or ``out`` is a file, or holds runs that are not from a demo.
    """
    console = Console(highlight=False)
    recipe("demo", seed=seed)  # raises for a bad seed before anything is written
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, but {str(out)!r} is a file")
    runs = {"small": out / "run", "long": out / "run-65536"}
    for folder in runs.values():
        if folder.exists() and not (out / MARK).exists():
            raise ValueError(f"{folder} exists and is not the demo's; choose another --out")
        remove_tree(folder)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / MARK, "What lies beside this file is replaced by the next `sparseflash demo`.\n")
    started = time.perf_counter()
    with _part(console, f"1. A mask for 65,536 tokens: {PATTERN}"):
        _mask(console, out / "mask-65536.png")
    with _part(console, "2. Attention through the mask, against dense attention"):
        _exactness(console, size.exact_tokens)
        _speed(console, size.timed_tokens)
    with _part(console, "3. Learning Pathfinder: do the two discs lie on one dashed curve?"):
        _learning(console, runs["small"], out / "pathfinder.png", seed, size)
    with _part(console, "4. The real thing: 256 x 256 pixels, 65,536 tokens, one token a pixel"):
        _answers(console, out, seed, size.answered)
        _long(console, runs["long"], seed, size.long_steps)
    console.rule("Done")
    console.print(
        f"{time.perf_counter() - started:.0f} s in all. In {out}/ you find\n"
        f"  mask-65536.png          the mask of part 1\n"
        f"  pathfinder.png          images of part 3 with the model's answers\n"
        f"  path256.png             images of part 4 with the answers\n"
        f"  attention-65536.png     what one of their pixels attends to, in each layer\n"
        f"  run/checkpoints/        the model of part 3\n"
        f"  run-65536/checkpoints/  the model of part 4\n"
        f"  run*/tensorboard/       curves: tensorboard --logdir {out}\n"
        f"Next: sparseflash --help, or a longer run:\n"
        f"  sparseflash train path256 --preset path256-last --tokens all --batch 1 --init {WEIGHTS}",
        markup=False,
        soft_wrap=True,
    )


@contextmanager
def _part(console: Console, title: str) -> Iterator[None]:
    console.rule(f"[bold]{title}", align="left")
    started = time.perf_counter()
    yield
    console.print(f"[dim]({time.perf_counter() - started:.0f} s)[/dim]\n")


def _mask(console: Console, picture: Path) -> None:
    pattern = parse(PATTERN)
    started = time.perf_counter()
    mask = pattern.compile(65_536, block=128)
    seconds = time.perf_counter() - started
    mask.plot(picture, title=str(pattern))
    MaskSummary.of(pattern, mask, seconds).print(console, picture=picture)


def _qkv(tokens: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 2, tokens, 32, generator=generator).requires_grad_() for _ in range(3)]


def _exactness(console: Console, tokens: int) -> None:
    """Errors of sparseflash and of eager attention in fp32 against eager attention in float64: output and gradients."""
    pattern = parse("causal() & (local(100) | butterfly(unit=64))")
    mask = pattern.compile(tokens, block=64)
    allowed = torch.from_numpy(mask.to_dense())

    def error(single: list[torch.Tensor], masked: bool) -> float:
        exact = [x.detach().double().requires_grad_() for x in single]
        truth = reference.attention(exact[0], exact[1], exact[2], allowed)
        eager = reference.attention(single[0], single[1], single[2], allowed)
        assert isinstance(truth, torch.Tensor)
        assert isinstance(eager, torch.Tensor)
        out = attention(single[0], single[1], single[2], mask) if masked else eager
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        gradients = torch.autograd.grad((out * weights).sum(), single)
        exact_gradients = torch.autograd.grad((truth * weights).sum(), exact)
        pairs = zip((out, *gradients), (truth, *exact_gradients), strict=True)
        return max(float((ours - theirs).detach().abs().max()) for ours, theirs in pairs)

    ours, eager = error(_qkv(tokens), True), error(_qkv(tokens), False)
    if ours > 2 * eager + torch.finfo(torch.float32).eps:
        raise ValueError(f"attention is off: its error is {ours:.1e}, that of eager attention {eager:.1e}")
    console.print(
        f"{pattern} on {tokens:,} tokens, fp32 against float64, output and gradients: largest error "
        f"{ours:.1e}; dense masked attention in plain torch, fp32: {eager:.1e}."
    )


def _speed(console: Console, tokens: int) -> None:
    """Times of forward and backward of sparseflash and of dense attention at one length."""
    mask = parse(PATTERN).compile(tokens, block=128)
    qkv = _qkv(tokens)

    def seconds(call: str) -> float:
        best = float("inf")
        for _ in range(2):
            started = time.perf_counter()
            q, k, v = qkv
            out = attention(q, k, v, mask) if call == "ours" else F.scaled_dot_product_attention(q, k, v)
            torch.autograd.grad(out.sum(), qkv)
            best = min(best, time.perf_counter() - started)
        return best

    ours, dense = seconds("ours"), seconds("dense")
    console.print(
        f"{tokens:,} tokens, 2 heads of 32, forward and backward, better of two runs: through the mask "
        f"({mask.density:.1%} of the blocks) {ours:.2f} s; dense, by torch's scaled_dot_product_attention, "
        f"{dense:.2f} s. At 65,536 tokens dense attention would do {(65_536 // tokens) ** 2} times as much: it is "
        f"not run here."
    )


def _learning(console: Console, folder: Path, picture: Path, seed: int, size: Size) -> None:
    config = recipe("demo", seed=seed)
    stage = config.pixel_stages[0]
    side = stage.geometry.size
    every = config.schedule_steps * config.batch
    steps = config.schedule_steps if size.learning_steps is None else size.learning_steps
    seen = steps * config.batch
    tile_height, tile_width = config.pixel_model.tile
    console.print(
        f"{config.model.layers} layers of attention, no convolution; all {side * side:,} pixels of a {side} x {side} "
        f"image are tokens, ordered in {tile_height} x {tile_width} tiles, and see each other through "
        f"{config.model.pattern}. Two contours of {stage.geometry.contour_length} dashes. "
        f"Trained from labels [bold]and a dense loss[/bold]: each lit pixel also predicts how many discs lie on its "
        f"curve, from the generator's ground truth. {seen:,} images, each seen once."
    )
    # Steps this small cannot use two threads: one thread trains, another process draws the images.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    result = train(config, folder, steps=steps, save_every=steps, workers=1)
    torch.set_num_threads(threads)
    if result.interrupted:
        raise KeyboardInterrupt
    baseline = marker_distance_baseline(geometry=stage.geometry, match_distance=stage.match_distance)
    score = evaluate(result.model, held_out(stage, size.fresh))
    assert isinstance(result.model, PixelTransformer)
    figures.draw_answers(result.model, stage, picture)
    verdict = f"Goal {GOAL:.0%}: " + ("[green]reached[/green]" if score.accuracy >= GOAL else "[red]missed[/red]") + "."
    if seen < every:
        verdict = f"A quick run: {seen:,} images instead of {every:,}, too few to learn the task."
    console.print(
        f"Test images: {score}.\nA rule that looks only at the distance between the discs: {baseline:.1%}. {verdict}"
    )


def _answers(console: Console, out: Path, seed: int, count: int) -> None:
    """Classify fresh images of 256 x 256 pixels with the weights of the library."""
    model = PixelTransformer.from_pretrained(WEIGHTS).over_all_pixels().eval()
    stage = recipe("path256", preset="path256-last").pixel_stages[-1]
    images, labels, _ = drawn(stage.geometry, FRESH + seed, range(count), stage.match_distance)
    started = time.perf_counter()
    mask = model.masks((stage.size, stage.size))[0]
    compiling = time.perf_counter() - started
    console.print(
        f"Trained weights ({sum(p.numel() for p in model.parameters()):,} numbers, {model.config.layers} layers of "
        f"width {model.config.width}) through {model.config.patterns((stage.size, stage.size))[0]}: {mask.density:.2%} "
        f"of the blocks of {mask.block[0]} x {mask.block[1]}, compiled in {1e3 * compiling:.0f} ms. Black pixels are "
        f"tokens like the others; a gate that depends on a key's grey value has lit pixels leave them out."
    )
    chances, seconds = list[float](), list[float]()
    for image in torch.from_numpy(images).split(1):
        started = time.perf_counter()
        with torch.no_grad():
            chances.append(float(model(image).logits.softmax(-1)[0, 1]))
        seconds.append(time.perf_counter() - started)
    right = sum((chance > 0.5) == bool(label) for chance, label in zip(chances, labels, strict=True))
    figures.save(figures.answers(torch.from_numpy(images), torch.from_numpy(labels), chances), out / "path256.png")
    figures.save(figures.attention(model, stage), out / "attention-65536.png")
    console.print(
        f"{right} of {count} fresh images answered right, {min(seconds):.1f} s an image on {torch.get_num_threads()} "
        f"threads. (These weights learned with the lit pixels alone as tokens: docs/path256.md.)"
    )


def _long(console: Console, folder: Path, seed: int, steps: int) -> None:
    """Real training steps from these weights."""
    config = recipe("path256", preset="path256-last", tokens="all", init=str(WEIGHTS), batch=1, seed=seed)
    started = time.perf_counter()
    result = train(config, folder, steps=steps)
    if result.interrupted:
        raise KeyboardInterrupt
    seconds = (time.perf_counter() - started) / len(result.losses)
    losses = ", ".join(f"{loss:.4f}" for loss in result.losses)
    console.print(
        f"From there, {steps} true training step{'s' * (steps > 1)} on all 65,536 pixels of an image: "
        f"losses {losses}; {seconds:.1f} s a step.\nCheckpoint: {result.checkpoint}",
        markup=False,
        soft_wrap=True,
    )
