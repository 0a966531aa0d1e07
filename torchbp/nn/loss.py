"""Losses."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from torchbp import functional as F

Lengths = Tensor | Sequence[int]


class L1Loss(torch.nn.L1Loss):
    """:class:`torch.nn.L1Loss` with its backward written out."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Two tensors of one shape."""
        return F.l1_loss(input, target, reduction=self.reduction)


class MSELoss(torch.nn.MSELoss):
    """:class:`torch.nn.MSELoss` with its backward written out."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Two tensors of one shape."""
        return F.mse_loss(input, target, reduction=self.reduction)


class SmoothL1Loss(torch.nn.SmoothL1Loss):
    """:class:`torch.nn.SmoothL1Loss` with its backward written out."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Two tensors of one shape."""
        return F.smooth_l1_loss(input, target, reduction=self.reduction, beta=self.beta)


class HuberLoss(torch.nn.HuberLoss):
    """:class:`torch.nn.HuberLoss` with its backward written out."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Two tensors of one shape."""
        return F.huber_loss(input, target, reduction=self.reduction, delta=self.delta)


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """:class:`torch.nn.CrossEntropyLoss` with its backward written out."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Logits ``(N, C, *)``; target: classes ``(N, *)`` or probabilities ``(N, C, *)``."""
        return F.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class LinearCrossEntropyLoss(torch.nn.LinearCrossEntropyLoss):
    """:class:`torch.nn.LinearCrossEntropyLoss` with its backward written out."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """``(N, in_features)``; target as for :class:`CrossEntropyLoss`."""
        shape = (self.num_classes, *self.out_features)
        weight, bias = self.linear.weight, self.linear.bias
        return F.linear_cross_entropy(
            input,
            weight.reshape(*shape, weight.shape[-1]),
            target,
            linear_bias=None if bias is None else bias.reshape(shape),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
        )


class NLLLoss(torch.nn.NLLLoss):
    """:class:`torch.nn.NLLLoss` with its backward written out."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Log-probabilities ``(N, C, *)``; classes ``(N, *)``."""
        return F.nll_loss(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )


with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # of the name, which torch has given up

    class NLLLoss2d(torch.nn.NLLLoss2d):
        """:class:`torch.nn.NLLLoss2d`, an older name of :class:`NLLLoss`."""

        forward = NLLLoss.forward


class PoissonNLLLoss(torch.nn.PoissonNLLLoss):
    """:class:`torch.nn.PoissonNLLLoss` with its backward written out."""

    def forward(self, log_input: Tensor, target: Tensor) -> Tensor:
        """Logarithms of rates (or rates), and counts, of one shape."""
        return F.poisson_nll_loss(
            log_input,
            target,
            log_input=self.log_input,
            full=self.full,
            eps=self.eps,
            reduction=self.reduction,
        )


class GaussianNLLLoss(torch.nn.GaussianNLLLoss):
    """:class:`torch.nn.GaussianNLLLoss` with its backward written out."""

    def forward(self, input: Tensor, target: Tensor, var: Tensor | float) -> Tensor:
        """Expectations, samples and variances."""
        return F.gaussian_nll_loss(
            input, target, var, full=self.full, eps=self.eps, reduction=self.reduction
        )


class KLDivLoss(torch.nn.KLDivLoss):
    """:class:`torch.nn.KLDivLoss` with its backward written out."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Log-probabilities and probabilities of one shape."""
        return F.kl_div(input, target, reduction=self.reduction, log_target=self.log_target)


class BCELoss(torch.nn.BCELoss):
    """:class:`torch.nn.BCELoss` with its backward written out."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Two tensors of probabilities, of one shape."""
        return F.binary_cross_entropy(input, target, weight=self.weight, reduction=self.reduction)


class BCEWithLogitsLoss(torch.nn.BCEWithLogitsLoss):
    """:class:`torch.nn.BCEWithLogitsLoss` with its backward written out."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Logits and targets of one shape."""
        return F.binary_cross_entropy_with_logits(
            input,
            target,
            self.weight,
            pos_weight=self.pos_weight,
            reduction=self.reduction,
        )


class SoftMarginLoss(torch.nn.SoftMarginLoss):
    """:class:`torch.nn.SoftMarginLoss` with its backward written out."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Scores, and signs of the same shape."""
        return F.soft_margin_loss(input, target, reduction=self.reduction)


class MultiLabelSoftMarginLoss(torch.nn.MultiLabelSoftMarginLoss):
    """:class:`torch.nn.MultiLabelSoftMarginLoss` with its backward written out."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Logits ``(N, C)``, and zeros and ones of the same shape."""
        return F.multilabel_soft_margin_loss(
            input, target, weight=self.weight, reduction=self.reduction
        )


class MarginRankingLoss(torch.nn.MarginRankingLoss):
    """:class:`torch.nn.MarginRankingLoss` with its backward written out."""

    def forward(self, input1: Tensor, input2: Tensor, target: Tensor) -> Tensor:
        """Two tensors of scores, and which is to be the greater."""
        return F.margin_ranking_loss(
            input1, input2, target, margin=self.margin, reduction=self.reduction
        )


class HingeEmbeddingLoss(torch.nn.HingeEmbeddingLoss):
    """:class:`torch.nn.HingeEmbeddingLoss` with its backward written out."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Distances, and signs of the same shape."""
        return F.hinge_embedding_loss(input, target, margin=self.margin, reduction=self.reduction)


class MultiMarginLoss(torch.nn.MultiMarginLoss):
    """:class:`torch.nn.MultiMarginLoss` with its backward written out."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Scores ``(N, C)`` and classes ``(N,)``."""
        return F.multi_margin_loss(
            input,
            target,
            p=self.p,
            margin=self.margin,
            weight=self.weight,
            reduction=self.reduction,
        )


class MultiLabelMarginLoss(torch.nn.MultiLabelMarginLoss):
    """:class:`torch.nn.MultiLabelMarginLoss` with its backward written out."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Scores ``(N, C)``, and of every row the labels, then -1."""
        return F.multilabel_margin_loss(input, target, reduction=self.reduction)


class CosineEmbeddingLoss(torch.nn.CosineEmbeddingLoss):
    """:class:`torch.nn.CosineEmbeddingLoss` with its backward written out."""

    def forward(self, input1: Tensor, input2: Tensor, target: Tensor) -> Tensor:
        """Pairs ``(N, D)``, and whether they are alike ``(N,)``."""
        return F.cosine_embedding_loss(
            input1, input2, target, margin=self.margin, reduction=self.reduction
        )


class TripletMarginLoss(torch.nn.TripletMarginLoss):
    """:class:`torch.nn.TripletMarginLoss` with its backward written out."""

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """Three tensors ``(N, D)``."""
        return F.triplet_margin_loss(
            anchor,
            positive,
            negative,
            margin=self.margin,
            p=self.p,
            eps=self.eps,
            swap=self.swap,
            reduction=self.reduction,
        )


class TripletMarginWithDistanceLoss(torch.nn.TripletMarginWithDistanceLoss):
    """:class:`torch.nn.TripletMarginWithDistanceLoss` with its backward written out."""

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """Three tensors ``(N, *)``."""
        return F.triplet_margin_with_distance_loss(
            anchor,
            positive,
            negative,
            distance_function=self.distance_function,
            margin=self.margin,
            swap=self.swap,
            reduction=self.reduction,
        )


class CTCLoss(torch.nn.CTCLoss):
    """:class:`torch.nn.CTCLoss` with its backward written out."""

    def forward(
        self, log_probs: Tensor, targets: Tensor, input_lengths: Lengths, target_lengths: Lengths
    ) -> Tensor:
        """Log-probabilities ``(T, N, C)``; labels, padded or concatenated."""
        return F.ctc_loss(
            log_probs,
            targets,
            input_lengths,
            target_lengths,
            self.blank,
            self.reduction,
            self.zero_infinity,
        )
