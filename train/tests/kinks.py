"""Chooses weights at which a network's gradients are smooth: no value lies near a kink.

Rounding decides on which side of a ReLU's kink a very close value falls, or which of two nearly equal values is a window's
maximum, and gradients then change by far more than rounding. So weights are changed until, in float64, every value is further
from every kink than the error of float32.
"""

from collections.abc import Callable

import torch
from torch import nn

# Largest change of a normalisation's shift, in units of about a value's standard deviation.
REACH = 0.1
# Distance of values from 0 (and from 6 for ReLU6), times the number of values of a channel: few values lie far apart, and deep
# in a network, where the error of float32 is largest, channels have few.
MARGIN = 1.0
# Distance of the two largest values in a window, times the number of windows of a channel.
TIE = 0.02
# Change of a filter, in units of its standard deviation.
NUDGE = 0.05
PASSES = 40


class Changed(Exception):
    """A filter was changed: the forward pass has to be repeated."""


def settle(network: nn.Module, run: Callable[[], torch.Tensor]) -> None:
    """Changes a network's weights until `run`, its forward pass in float64, meets no kink. They stay float32 numbers."""
    with torch.no_grad():
        for _ in range(PASSES):
            watch = Watch(network)
            try:
                run()
            except Changed:
                continue
            finally:
                watch.end()
            return
    raise RuntimeError(f"values stand near a kink after {PASSES} passes")


class Watch:
    """Watches the values before every kink of a forward pass, and changes the weights that made them."""

    def __init__(self, network: nn.Module):
        self.convolution = self.norm = None
        self.made: list[tuple[nn.Conv2d, torch.Tensor]] = []
        self.hooks = []
        for module in network.modules():
            if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
                self.hooks.append(module.register_forward_hook(self.passed))
            elif isinstance(module, (nn.ReLU, nn.ReLU6)):
                self.hooks.append(module.register_forward_pre_hook(self.before_relu))
                self.hooks.append(module.register_forward_hook(self.after_relu))
            elif isinstance(module, nn.MaxPool2d):
                self.hooks.append(module.register_forward_pre_hook(self.before_maximum))

    def end(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def passed(self, module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            self.convolution = module
        else:
            self.norm = module

    def before_relu(self, module: nn.Module, inputs: tuple) -> tuple:
        """Shifts a channel with a value near a kink so that the kink is in the middle of the widest gap between values."""
        (x,) = inputs
        kinks = [0.0, 6.0] if isinstance(module, nn.ReLU6) else [0.0]
        bias, old = self.norm.bias, self.norm.bias.clone()
        margin = min(MARGIN / x[:, 0].numel(), REACH / 4)
        for channel, values in enumerate(x.transpose(0, 1).flatten(1)):
            # Shifts that would put a value on a kink.
            hits = torch.cat([kink - values for kink in kinks])
            if hits.abs().min() < margin:
                ends = hits.new_tensor([-REACH, REACH])
                hits = torch.cat([hits[hits.abs() < REACH], ends]).sort().values
                widest = hits.diff().argmax()
                bias[channel] += (hits[widest] + hits[widest + 1]) / 2
        bias.copy_(bias.float())
        return (x + (bias - old)[:, None, None],)

    def after_relu(self, module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        self.made.append((self.convolution, output.clone()))

    def before_maximum(self, module: nn.Module, inputs: tuple) -> None:
        """Changes the filters of channels in which a window's two largest values are positive and nearly equal."""
        (x,) = inputs
        kernel, stride, padding = (one(value) for value in (module.kernel_size, module.stride, module.padding))
        # Padding below every ReLU's output; windows may reach past the end.
        padded = nn.functional.pad(x, [padding, padding + kernel - 1] * 2, value=-1.0)
        largest = padded.unfold(2, kernel, stride).unfold(3, kernel, stride).flatten(4).topk(2, -1).values
        near = (largest[..., 1] > 0) & (largest[..., 0] - largest[..., 1] < TIE / largest[:, 0, ..., 0].numel())
        channels = near.any(3).any(2).any(0).nonzero().flatten().tolist()
        for channel in channels:
            filters = self.filter_of(x[:, channel])
            filters += NUDGE * filters.std() * torch.randn_like(filters)
            filters.copy_(filters.float())
        if channels:
            raise Changed

    def filter_of(self, plane: torch.Tensor) -> torch.Tensor:
        """The filter that made a channel, which may have been concatenated with others since."""
        for convolution, output in reversed(self.made):
            if output.shape[2:] == plane.shape[1:]:
                for channel in range(output.shape[1]):
                    if torch.equal(output[:, channel], plane):
                        return convolution.weight[channel]
        raise RuntimeError("no convolution made a channel that a maximum is taken of")


def one(value: int | tuple[int, int]) -> int:
    return value if isinstance(value, int) else value[0]
