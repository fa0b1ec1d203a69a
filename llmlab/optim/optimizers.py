"""The optimizers, as configs.

    state per parameter   rule                                                                   source
    SGD        0          g
    Momentum   1          v = b v + g;  v                                                        Polyak 1964
    Nesterov   1          v = b v + g;  g + b v                                                  Sutskever et al. 2013
    Adam, AdamW 2         m^ / (sqrt(v^) + eps)                                                  1412.6980, 1711.05101
    LAMB       2          AdamW's, scaled to the norm of each layer's weights                    1904.00962
    Lion       1          sign(b1 m + (1 - b1) g);  m = b2 m + (1 - b2) g                        2302.06675
    Adafactor  ~0         g / sqrt(rank-one estimate of v), clipped, times RMS(x)                1804.04235
    Muon       1          momentum with all singular values near 1; AdamW for what is no matrix  2502.16982

"State per parameter" counts numbers kept for each number of the model. Layers that are stored stacked get the update
that they would get apart.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmlab.optim.config import Optimizer, check_decay_rate, check_positive
from llmlab.optim.parameters import flatten, matches

if TYPE_CHECKING:
    from llmlab.optim.parameters import Parameter
    from llmlab.optim.rules import Rule
    from llmlab.optim.width import Fans


@dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    """Stochastic gradient descent: the gradient itself."""

    def rule(self, parameters: dict[str, Any], decay: Any) -> "Rule":
        from llmlab.optim import rules

        return rules.then(rules.sgd(), decay)

    def width_multiplier(self, parameter: "Parameter", fans: "Fans") -> float:
        from llmlab.optim import width

        return width.gradient(fans)


@dataclass(frozen=True, kw_only=True)
class Momentum(Optimizer):
    """Heavy ball: a running sum of gradients, so the step is up to 1 / (1 - beta) times as long as SGD's."""

    beta: float = 0.9
    """How much of the sum remains after a step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_decay_rate("beta", self.beta)

    def rule(self, parameters: dict[str, Any], decay: Any) -> "Rule":
        from llmlab.optim import rules

        return rules.then(rules.momentum(self.beta, nesterov=False), decay)

    def width_multiplier(self, parameter: "Parameter", fans: "Fans") -> float:
        from llmlab.optim import width

        return width.gradient(fans)


@dataclass(frozen=True, kw_only=True)
class Nesterov(Momentum):
    """Momentum that looks one step ahead."""

    def rule(self, parameters: dict[str, Any], decay: Any) -> "Rule":
        from llmlab.optim import rules

        return rules.then(rules.momentum(self.beta, nesterov=True), decay)


@dataclass(frozen=True, kw_only=True)
class Adam(Optimizer):
    """Adam (Kingma and Ba 2015): each number's mean gradient over the root of its mean square."""

    beta1: float = 0.9
    """Decay rate of the mean of gradients."""
    beta2: float = 0.999
    """Decay rate of the mean of squared gradients."""
    epsilon: float = 1e-8
    """Added to the root."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_decay_rate("beta1", self.beta1)
        check_decay_rate("beta2", self.beta2)
        check_positive("epsilon", self.epsilon)

    def rule(self, parameters: dict[str, Any], decay: Any) -> "Rule":
        from llmlab.optim import rules

        return rules.then(rules.adam(self.beta1, self.beta2, self.epsilon), decay)

    def width_multiplier(self, parameter: "Parameter", fans: "Fans") -> float:
        from llmlab.optim import width

        return width.entrywise(fans)

    def at_width(self, ratio: float) -> "Optimizer":
        return self if ratio == 1.0 else self.with_scalars({"epsilon": self.epsilon / ratio})


@dataclass(frozen=True, kw_only=True)
class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019): the default choice for language models."""

    beta2: float = 0.95
    """Decay rate of the mean of squared gradients; language models use 0.95 (GPT-3, Llama), the paper 0.999."""
    weight_decay: float = 0.1
    """Decoupled weight decay: each step shrinks a parameter by learning rate x weight_decay."""


@dataclass(frozen=True, kw_only=True)
class LAMB(Adam):
    """LAMB (You et al. 2020): AdamW's update, scaled to the norm of each layer's weights; for very large batches."""

    epsilon: float = 1e-6
    """Added to the root."""
    weight_decay: float = 0.01
    """Decoupled weight decay, added before the update is scaled."""

    def rule(self, parameters: dict[str, Any], decay: Any) -> "Rule":
        from llmlab.optim import rules

        adam = rules.adam(self.beta1, self.beta2, self.epsilon)
        return rules.then(adam, decay, rules.trust_ratio(parameters))

    def width_multiplier(self, parameter: "Parameter", fans: "Fans") -> float:
        from llmlab.optim import width

        return width.relative(fans)


@dataclass(frozen=True, kw_only=True)
class Lion(Optimizer):
    """Lion (Chen et al. 2023): the sign of a momentum. Rates are 3 to 10 times lower than AdamW's, decay higher."""

    beta1: float = 0.9
    """Weight of the old momentum in the update."""
    beta2: float = 0.99
    """Decay rate of the momentum."""
    weight_decay: float = 1.0
    """Decoupled weight decay: each step shrinks a parameter by learning rate x weight_decay."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_decay_rate("beta1", self.beta1)
        check_decay_rate("beta2", self.beta2)

    def rule(self, parameters: dict[str, Any], decay: Any) -> "Rule":
        from llmlab.optim import rules

        return rules.then(rules.lion(self.beta1, self.beta2), decay)

    def width_multiplier(self, parameter: "Parameter", fans: "Fans") -> float:
        from llmlab.optim import width

        return width.entrywise(fans)


@dataclass(frozen=True, kw_only=True)
class Adafactor(Optimizer):
    """Adafactor (Shazeer and Stern 2018): squared gradients by row and column sums only, so almost no memory.

    A matrix of R rows and C columns keeps R + C numbers. The learning rate is relative to each layer's own root mean
    square, so useful rates are about 100 times Adam's: 0.01 is the paper's.
    """

    decay_exponent: float = 0.8
    """c of the decay rate 1 - t^-c of squared gradients: an ever longer memory."""
    epsilon: float = 1e-30
    """Added to squared gradients."""
    clip_threshold: float | None = 1.0
    """Largest root mean square of a layer's update; None for no bound."""
    scale_by_parameter: bool = True
    """Whether the learning rate is relative to the root mean square of each layer's weights."""
    min_parameter_scale: float = 1e-3
    """Least root mean square that weights are taken to have, so that zeros can move."""
    min_dim_to_factor: int = 128
    """Matrices with fewer rows or columns keep all their squared gradients, as vectors do."""
    beta: float | None = None
    """Decay rate of a mean of updates; None for none, which saves its memory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("decay_exponent", self.decay_exponent)
        check_positive("epsilon", self.epsilon)
        check_positive("min_parameter_scale", self.min_parameter_scale)
        if self.clip_threshold is not None:
            check_positive("clip_threshold", self.clip_threshold)
        if self.beta is not None:
            check_decay_rate("beta", self.beta)

    def rule(self, parameters: dict[str, Any], decay: Any) -> "Rule":
        from llmlab.optim import rules

        adafactor = rules.adafactor(
            parameters,
            decay_exponent=self.decay_exponent,
            epsilon=self.epsilon,
            clip_threshold=self.clip_threshold,
            min_scale=self.min_parameter_scale if self.scale_by_parameter else None,
            min_dim_to_factor=self.min_dim_to_factor,
            beta=self.beta,
        )
        return rules.then(adafactor, decay)

    def width_multiplier(self, parameter: "Parameter", fans: "Fans") -> float:
        from llmlab.optim import width

        return width.relative(fans) if self.scale_by_parameter else width.entrywise(fans)


@dataclass(frozen=True, kw_only=True)
class Muon(Optimizer):
    """Muon (Jordan et al. 2024): momentum with all its singular values brought near 1; AdamW for what is no matrix.

    Every matrix inside the layers takes a step of equal size in all directions. Embeddings, heads, norms and biases
    are no maps between hidden spaces and go to AdamW. With the default update_rms a Muon step is as long as an AdamW
    step (Liu et al. 2025, section 2.2), so one peak_lr and weight decay, those known from AdamW, serve both parts.
    """

    weight_decay: float = 0.1
    """Decoupled weight decay: each step shrinks a parameter by learning rate x weight_decay."""
    beta: float = 0.95
    """Decay rate of the momentum."""
    nesterov: bool = True
    """Whether the momentum looks one step ahead."""
    iterations: int = 5
    """Newton-Schulz iterations, three matrix products each."""
    epsilon: float = 1e-8
    """Added to the norm that a matrix is divided by first."""
    update_rms: float | None = 0.2
    """Root mean square of a matrix's update; None for sqrt(max(1, columns / rows)) instead, Jordan's original."""
    adamw_lr: float = 1.0
    """Learning rate of AdamW's part, relative to peak_lr."""
    adamw_beta1: float = 0.9
    """Decay rate of AdamW's mean of gradients."""
    adamw_beta2: float = 0.95
    """Decay rate of AdamW's mean of squared gradients."""
    adamw_epsilon: float = 1e-8
    """Added to the root in AdamW's part."""
    adamw_match: tuple[str, ...] = ()
    """Dotted paths (as in groups) of further parameters for AdamW."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta", "adamw_beta1", "adamw_beta2"):
            check_decay_rate(name, getattr(self, name))
        for name in ("epsilon", "adamw_epsilon", "adamw_lr"):
            check_positive(name, getattr(self, name))
        if self.update_rms is not None:
            check_positive("update_rms", self.update_rms)
        if self.iterations < 1:
            raise ValueError(f"iterations={self.iterations} must be at least 1; 5 is usual")

    def orthogonalises(self, parameter: "Parameter") -> bool:
        """Whether a parameter is Muon's; AdamW's otherwise."""
        matrix = parameter.kind == "weight" and len(parameter.own_axes) > 1 and "vocab" not in parameter.axes
        return matrix and not any(matches(parameter.path, pattern) for pattern in self.adamw_match)

    def lr_multiplier(self, parameter: "Parameter") -> float:
        return 1.0 if self.orthogonalises(parameter) else self.adamw_lr

    def width_multiplier(self, parameter: "Parameter", fans: "Fans") -> float:
        from llmlab.optim import width

        if not self.orthogonalises(parameter):
            return width.entrywise(fans)
        return width.orthogonal(fans, scaled_to_rms=self.update_rms is not None)

    def at_width(self, ratio: float) -> "Optimizer":
        return self if ratio == 1.0 else self.with_scalars({"adamw_epsilon": self.adamw_epsilon / ratio})

    def rule(self, parameters: dict[str, Any], decay: Any) -> "Rule":
        from llmlab.optim import rules

        known = dict(flatten(parameters))
        matrices = {path for path, p in known.items() if self.orthogonalises(p)}
        if unclear := [f"{path} {known[path].axes}" for path in sorted(matrices) if known[path].matrix_dims is None]:
            raise ValueError(
                f"Muon cannot tell rows from columns of {', '.join(unclear)}; put embed first or last among the axes, "
                "or give their paths to adamw_match"
            )
        muon = rules.muon(
            parameters,
            lambda path: path in matrices,
            beta=self.beta,
            nesterov=self.nesterov,
            iterations=self.iterations,
            epsilon=self.epsilon,
            update_rms=self.update_rms,
            adamw=rules.adam(self.adamw_beta1, self.adamw_beta2, self.adamw_epsilon),
        )
        return rules.then(muon, decay)
