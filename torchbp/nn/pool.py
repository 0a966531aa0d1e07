"""Pooling."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from torchbp import functional as F

Pooled = Tensor | tuple[Tensor, Tensor]


class MaxPool1d(nn.MaxPool1d):
    """:class:`torch.nn.MaxPool1d` with its backward written out."""

    def forward(self, input: Tensor) -> Pooled:
        """``([N,] C, L)`` to ``([N,] C, L_out)``."""
        return F.max_pool1d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            self.return_indices,
        )


class MaxPool2d(nn.MaxPool2d):
    """:class:`torch.nn.MaxPool2d` with its backward written out."""

    def forward(self, input: Tensor) -> Pooled:
        """``([N,] C, H, W)`` to ``([N,] C, H_out, W_out)``."""
        return F.max_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            self.return_indices,
        )


class MaxPool3d(nn.MaxPool3d):
    """:class:`torch.nn.MaxPool3d` with its backward written out."""

    def forward(self, input: Tensor) -> Pooled:
        """``([N,] C, D, H, W)`` to ``([N,] C, D_out, H_out, W_out)``."""
        return F.max_pool3d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            self.return_indices,
        )


class AdaptiveMaxPool1d(nn.AdaptiveMaxPool1d):
    """:class:`torch.nn.AdaptiveMaxPool1d` with its backward written out."""

    def forward(self, input: Tensor) -> Pooled:
        """``([N,] C, L)`` to ``([N,] C, output_size)``."""
        return F.adaptive_max_pool1d(input, self.output_size, self.return_indices)


class AdaptiveMaxPool2d(nn.AdaptiveMaxPool2d):
    """:class:`torch.nn.AdaptiveMaxPool2d` with its backward written out."""

    def forward(self, input: Tensor) -> Pooled:
        """``([N,] C, H, W)`` to ``([N,] C, *output_size)``."""
        return F.adaptive_max_pool2d(input, self.output_size, self.return_indices)


class AdaptiveMaxPool3d(nn.AdaptiveMaxPool3d):
    """:class:`torch.nn.AdaptiveMaxPool3d` with its backward written out."""

    def forward(self, input: Tensor) -> Pooled:
        """``([N,] C, D, H, W)`` to ``([N,] C, *output_size)``."""
        return F.adaptive_max_pool3d(input, self.output_size, self.return_indices)


class FractionalMaxPool2d(nn.FractionalMaxPool2d):
    """:class:`torch.nn.FractionalMaxPool2d` with its backward written out."""

    def forward(self, input: Tensor) -> Pooled:
        """``([N,] C, H, W)`` to ``([N,] C, H_out, W_out)``."""
        return F.fractional_max_pool2d(
            input,
            self.kernel_size,
            self.output_size,
            self.output_ratio,
            self.return_indices,
            self._random_samples,  # type: ignore[arg-type]
        )


class FractionalMaxPool3d(nn.FractionalMaxPool3d):
    """:class:`torch.nn.FractionalMaxPool3d` with its backward written out."""

    def forward(self, input: Tensor) -> Pooled:
        """``([N,] C, D, H, W)`` to ``([N,] C, D_out, H_out, W_out)``."""
        return F.fractional_max_pool3d(
            input,
            self.kernel_size,
            self.output_size,
            self.output_ratio,
            self.return_indices,
            self._random_samples,  # type: ignore[arg-type]
        )


class MaxUnpool1d(nn.MaxUnpool1d):
    """:class:`torch.nn.MaxUnpool1d` with its backward written out."""

    def forward(
        self, input: Tensor, indices: Tensor, output_size: Sequence[int] | None = None
    ) -> Tensor:
        """``([N,] C, L)`` to ``([N,] C, L_out)``."""
        return F.max_unpool1d(
            input, indices, self.kernel_size, self.stride, self.padding, output_size
        )


class MaxUnpool2d(nn.MaxUnpool2d):
    """:class:`torch.nn.MaxUnpool2d` with its backward written out."""

    def forward(
        self, input: Tensor, indices: Tensor, output_size: Sequence[int] | None = None
    ) -> Tensor:
        """``([N,] C, H, W)`` to ``([N,] C, H_out, W_out)``."""
        return F.max_unpool2d(
            input, indices, self.kernel_size, self.stride, self.padding, output_size
        )


class MaxUnpool3d(nn.MaxUnpool3d):
    """:class:`torch.nn.MaxUnpool3d` with its backward written out."""

    def forward(
        self, input: Tensor, indices: Tensor, output_size: Sequence[int] | None = None
    ) -> Tensor:
        """``([N,] C, D, H, W)`` to ``([N,] C, D_out, H_out, W_out)``."""
        return F.max_unpool3d(
            input, indices, self.kernel_size, self.stride, self.padding, output_size
        )


class AvgPool1d(nn.AvgPool1d):
    """:class:`torch.nn.AvgPool1d` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """``([N,] C, L)`` to ``([N,] C, L_out)``."""
        return F.avg_pool1d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
        )


class AvgPool2d(nn.AvgPool2d):
    """:class:`torch.nn.AvgPool2d` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """``([N,] C, H, W)`` to ``([N,] C, H_out, W_out)``."""
        return F.avg_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class AvgPool3d(nn.AvgPool3d):
    """:class:`torch.nn.AvgPool3d` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """``([N,] C, D, H, W)`` to ``([N,] C, D_out, H_out, W_out)``."""
        return F.avg_pool3d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class AdaptiveAvgPool1d(nn.AdaptiveAvgPool1d):
    """:class:`torch.nn.AdaptiveAvgPool1d` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """``([N,] C, L)`` to ``([N,] C, output_size)``."""
        return F.adaptive_avg_pool1d(input, self.output_size)


class AdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """:class:`torch.nn.AdaptiveAvgPool2d` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """``([N,] C, H, W)`` to ``([N,] C, *output_size)``."""
        return F.adaptive_avg_pool2d(input, self.output_size)


class AdaptiveAvgPool3d(nn.AdaptiveAvgPool3d):
    """:class:`torch.nn.AdaptiveAvgPool3d` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """``([N,] C, D, H, W)`` to ``([N,] C, *output_size)``."""
        return F.adaptive_avg_pool3d(input, self.output_size)


class LPPool1d(nn.LPPool1d):
    """:class:`torch.nn.LPPool1d` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """``([N,] C, L)`` to ``([N,] C, L_out)``."""
        return F.lp_pool1d(
            input, float(self.norm_type), self.kernel_size, self.stride, self.ceil_mode
        )


class LPPool2d(nn.LPPool2d):
    """:class:`torch.nn.LPPool2d` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """``([N,] C, H, W)`` to ``([N,] C, H_out, W_out)``."""
        return F.lp_pool2d(
            input, float(self.norm_type), self.kernel_size, self.stride, self.ceil_mode
        )


class LPPool3d(nn.LPPool3d):
    """:class:`torch.nn.LPPool3d` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """``([N,] C, D, H, W)`` to ``([N,] C, D_out, H_out, W_out)``."""
        return F.lp_pool3d(
            input, float(self.norm_type), self.kernel_size, self.stride, self.ceil_mode
        )
