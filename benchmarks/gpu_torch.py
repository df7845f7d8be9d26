"""What `gpu.py` times in PyTorch: the quantizers in tensor operations, fused AdamW."""

import statistics
from collections.abc import Callable

import torch
from kernel_cases import Case

from cage_jax import formats, scale_types, scales
from cage_jax.arrays import hadamard
from cage_jax.arrays.adamw import AdamW, StepNumbers
from cage_jax.quantizers.quantizer import Quantizer


def available() -> bool:
    """Whether it sees a GPU."""
    return torch.cuda.is_available()


def fake_quant(quantizer: Quantizer, x: torch.Tensor) -> torch.Tensor:
    """`x` quantized and dequantized; float32, of two axes."""
    block, format = quantizer.hadamard, quantizer.format
    turned = x.mT if quantizer.axis == -2 else x
    size = quantizer.group_size or x.shape[quantizer.axis]
    groups = turned.reshape(*turned.shape[:-1], -1, size)
    if block is not None:
        matrix = torch.as_tensor(hadamard.hadamard_matrix(block) * block**-0.5)
        matrix = matrix.to(x)
        rotated = turned.reshape(*turned.shape[:-1], -1, block) @ matrix
        groups = rotated.reshape(groups.shape)
    if isinstance(quantizer.scale, scales.Gaussian):
        bound = groups.square().mean(-1, keepdim=True).sqrt() * format.gaussian_clip
    else:
        bound = groups.abs().amax(-1, keepdim=True)
    if isinstance(quantizer.scale_type, scale_types.PowerOfTwo):
        scale = torch.exp2(bound.log2().floor() - 2)  # e2m1 ends at 6
    else:
        scale = bound / format.half_range
    position = groups / scale
    if isinstance(format, formats.Float):
        position = position.clamp(format.low, format.high)
        step = torch.exp2(position.abs().clamp(min=1).log2().floor() - 1)
        values = (position / step).round() * step
    elif isinstance(format, formats.MidRise):
        values = ((position + 0.5).round() - 0.5).clamp(format.low, format.high)
    else:
        values = position.round().clamp(format.low, format.high)
    values = (values * scale).reshape(turned.shape)
    if block is not None:
        values = (values.reshape(rotated.shape) @ matrix).reshape(turned.shape)
    return values.mT if quantizer.axis == -2 else values


def timed(
    case: Case,
    shape: tuple[int, int],
    adamw: AdamW,
    numbers: StepNumbers,
    rounds: int,
    calls: int,
) -> dict[str, float]:
    """Milliseconds of a call, eager and compiled; {} for what has no peer."""
    quantize = {
        "PyTorch": fake_quant,
        "PyTorch compiled": torch.compile(fake_quant, dynamic=False),
    }
    if case.what == "forward and backward":
        return {}
    found = {}
    for name, function in quantize.items():
        x = torch.randn(shape, device="cuda")
        if case.what == "forward":
            found[name] = _median(
                lambda f=function, x=x: f(case.quantizer, x), rounds, calls
            )
            continue
        x = torch.nn.Parameter(x)
        x.grad = torch.randn_like(x)
        optimizer = torch.optim.AdamW(
            [x],
            lr=float(numbers.rate),
            betas=(adamw.b1, adamw.b2),
            eps=adamw.eps,
            weight_decay=adamw.weight_decay,
            fused=True,
        )

        @torch.no_grad()
        def step(f=function, x=x, optimizer=optimizer):
            error = x - f(case.quantizer, x)
            optimizer.step()
            x.add_(error, alpha=float(numbers.pull))

        found[name] = _median(step, rounds, calls)
    return found


def _median(function: Callable, rounds: int, calls: int) -> float:
    for _ in range(3):  # compiles
        function()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return statistics.median(times)
