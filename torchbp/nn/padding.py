"""Padding."""

from __future__ import annotations

import torch
from torch import Tensor

from torchbp import functional as F


class ConstantPad1d(torch.nn.ConstantPad1d):
    """:class:`torch.nn.ConstantPad1d` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """``([N,] C, W)``: a border of ``value``."""
        return F.pad(input, self.padding, "constant", self.value)


class ConstantPad2d(torch.nn.ConstantPad2d):
    """:class:`torch.nn.ConstantPad2d` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """``([N,] C, H, W)``: a border of ``value``."""
        return F.pad(input, self.padding, "constant", self.value)


class ConstantPad3d(torch.nn.ConstantPad3d):
    """:class:`torch.nn.ConstantPad3d` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """``([N,] C, D, H, W)``: a border of ``value``."""
        return F.pad(input, self.padding, "constant", self.value)


class ZeroPad1d(torch.nn.ZeroPad1d):
    """:class:`torch.nn.ZeroPad1d` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """``([N,] C, W)``: a border of zeros."""
        return F.pad(input, self.padding, "constant", self.value)


class ZeroPad2d(torch.nn.ZeroPad2d):
    """:class:`torch.nn.ZeroPad2d` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """``([N,] C, H, W)``: a border of zeros."""
        return F.pad(input, self.padding, "constant", self.value)


class ZeroPad3d(torch.nn.ZeroPad3d):
    """:class:`torch.nn.ZeroPad3d` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """``([N,] C, D, H, W)``: a border of zeros."""
        return F.pad(input, self.padding, "constant", self.value)


class ReflectionPad1d(torch.nn.ReflectionPad1d):
    """:class:`torch.nn.ReflectionPad1d` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """``([N,] C, W)``: a border that mirrors the input."""
        return F.pad(input, self.padding, "reflect")


class ReflectionPad2d(torch.nn.ReflectionPad2d):
    """:class:`torch.nn.ReflectionPad2d` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """``([N,] C, H, W)``: a border that mirrors the input."""
        return F.pad(input, self.padding, "reflect")


class ReflectionPad3d(torch.nn.ReflectionPad3d):
    """:class:`torch.nn.ReflectionPad3d` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """``([N,] C, D, H, W)``: a border that mirrors the input."""
        return F.pad(input, self.padding, "reflect")


class ReplicationPad1d(torch.nn.ReplicationPad1d):
    """:class:`torch.nn.ReplicationPad1d` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """``([N,] C, W)``: a border that repeats the edge."""
        return F.pad(input, self.padding, "replicate")


class ReplicationPad2d(torch.nn.ReplicationPad2d):
    """:class:`torch.nn.ReplicationPad2d` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """``([N,] C, H, W)``: a border that repeats the edge."""
        return F.pad(input, self.padding, "replicate")


class ReplicationPad3d(torch.nn.ReplicationPad3d):
    """:class:`torch.nn.ReplicationPad3d` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """``([N,] C, D, H, W)``: a border that repeats the edge."""
        return F.pad(input, self.padding, "replicate")


class CircularPad1d(torch.nn.CircularPad1d):
    """:class:`torch.nn.CircularPad1d` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """``([N,] C, W)``: a border that continues with the opposite end."""
        self._check_input_dim(input)
        return F.pad(input, self.padding, "circular")


class CircularPad2d(torch.nn.CircularPad2d):
    """:class:`torch.nn.CircularPad2d` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """``([N,] C, H, W)``: a border that continues with the opposite end."""
        self._check_input_dim(input)
        return F.pad(input, self.padding, "circular")


class CircularPad3d(torch.nn.CircularPad3d):
    """:class:`torch.nn.CircularPad3d` with its backward written out."""

    def forward(self, input: Tensor) -> Tensor:
        """``([N,] C, D, H, W)``: a border that continues with the opposite end."""
        self._check_input_dim(input)
        return F.pad(input, self.padding, "circular")
