"""The parametric scaling law and the best use of a budget (Hoffmann et al. 2022, 2203.15556, approach 3).

    L(N, D) = E + A / N^alpha + B / D^beta

N parameters and D tokens give the loss L: what no model can know (E), what a model of N parameters cannot express, and
what D tokens do not teach. The fit minimises the Huber loss of log L, where log L is a log-sum-exp, from many starts:

    min sum_i Huber_delta( LSE(a - alpha log N_i, b - beta log D_i, e) - log L_i ),    A, B, E = exp(a), exp(b), exp(e)

A replication (Besiroglu et al. 2024, 2404.10102) found that the published fit had stopped early, because the losses
were averaged instead of summed and so fell under the optimiser's tolerance, and that its intervals were far too narrow
for its number of runs. Hence here: the sum, logs of N and D centred (which takes the fit's long narrow valley away),
bounds far outside of what is plausible, gradients by hand, and intervals by a bootstrap over the runs.

A budget of C FLOPs is spent where C = kappa N^gamma D, the cost law of the family (6 N D for large transformers whose
embeddings are negligible; measured, not assumed, for small ones). On that curve the loss is least at

    N*(C) = G (C / kappa)^(beta / (alpha + gamma beta)),   G = (alpha A / (gamma beta B))^(1 / (alpha + gamma beta))
    D*(C) = C / (kappa N*^gamma)

which is the paper's equation 4 with gamma = 1, kappa = 6. One fit costs some milliseconds; a bootstrap of 1000 some
seconds.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

Vector = Float64[np.ndarray, " n"]
Theta = Float64[np.ndarray, "5"]

DELTA = 1e-3
"""Where Huber's loss turns linear, in log loss: the paper's. A run that is off by more pulls no harder."""
NUM_PARAMETERS = 5

# Bounds of alpha and beta, and of log A / N^alpha etc. at the centre relative to the mean log loss.
_EXPONENTS, _TERMS = (0.01, 3.0), (-12.0, 2.0)
_STARTS = 5
_LARGEST_LOG = 200.0


@dataclass(frozen=True, kw_only=True)
class Cost:
    """FLOPs of training: C = kappa N^gamma D, fitted to the family's own counts."""

    kappa: float = 6.0
    gamma: float = 1.0
    error: float = 0.0
    """Largest relative deviation of a model of the family from this law."""

    @classmethod
    def fit(cls, parameters: Vector, flops_per_token: Vector) -> "Cost":
        """Least squares of log FLOPs per token on log N; with one size, gamma is 1."""
        x, y = np.log(parameters), np.log(flops_per_token)
        if len(np.unique(x)) == 1:
            return cls(kappa=float(np.exp(np.mean(y - x))))
        gamma, intercept = np.polyfit(x, y, 1)
        error = np.max(np.abs(np.expm1(intercept + gamma * x - y)))
        return cls(kappa=float(np.exp(intercept)), gamma=float(gamma), error=float(error))

    def tokens(self, flops: float, parameters: float) -> float:
        """Tokens that a budget pays for."""
        return flops / (self.kappa * parameters**self.gamma)


@dataclass(frozen=True, kw_only=True)
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta, in nats."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, parameters: Vector | float, tokens: Vector | float) -> Vector | float:
        """The loss of models of N parameters after D tokens."""
        return self.E + self.A * parameters**-self.alpha + self.B * tokens**-self.beta

    def exponents(self, cost: Cost) -> tuple[float, float]:
        """a and b of N* ~ C^a and D* ~ C^b."""
        a = self.beta / (self.alpha + cost.gamma * self.beta)
        return a, 1 - cost.gamma * a

    def optimum(self, flops: float, cost: Cost) -> tuple[float, float, float]:
        """N*, D* and the loss there: the best use of a budget."""
        power = self.alpha + cost.gamma * self.beta
        log_g = math.log(self.alpha * self.A / (cost.gamma * self.beta * self.B)) / power
        log_n = log_g + self.beta / power * math.log(flops / cost.kappa)
        # A resample may leave both exponents undetermined, near zero: then N* is anything, but still a float.
        parameters = math.exp(min(max(log_n, -_LARGEST_LOG), _LARGEST_LOG))
        tokens = cost.tokens(flops, parameters)
        return parameters, tokens, float(self.loss(parameters, tokens))


@dataclass(frozen=True)
class Fit:
    """A law fitted to runs, and how well."""

    law: Law
    residuals: Vector
    """log of the loss that was measured minus that of the law."""
    objective: float
    """Sum of Huber losses."""
    theta: Theta
    """The fit's own coordinates, from which another fit of similar runs starts."""

    @property
    def spread(self) -> float:
        """Standard deviation of the residuals, for the parameters that were fitted."""
        free = max(len(self.residuals) - NUM_PARAMETERS, 1)
        return float(np.sqrt(np.sum(self.residuals**2) / free))


class Fitter:
    """Fits laws to subsets (with repetition) of the same runs.

    Args:
        parameters: N of every run.
        tokens: D of every run.
        losses: L of every run, in nats.
        delta: of Huber's loss.

    Raises:
        ValueError: too few runs, or too few different N or D, for five parameters; losses that are not positive.
    """

    def __init__(self, parameters: Vector, tokens: Vector, losses: Vector, *, delta: float = DELTA) -> None:
        check_runs(parameters, tokens, losses)
        self.log_n, self.log_d = np.log(parameters), np.log(tokens)
        self.log_l = np.log(losses)
        self.centre = (float(np.mean(self.log_n)), float(np.mean(self.log_d)), float(np.mean(self.log_l)))
        self.delta = delta
        self._n, self._d = self.log_n - self.centre[0], self.log_d - self.centre[1]
        self._l = self.log_l - self.centre[2]

    def fit(self, weights: Vector | None = None, starts: list[Theta] | None = None) -> Fit:
        """The best fit.

        Args:
            weights: how often each run counts; None for once.
            starts: where to begin; None for the best of a grid.
        """
        from scipy.optimize import minimize

        counts = np.ones_like(self._l) if weights is None else weights
        bounds = [_TERMS, _TERMS, _TERMS, _EXPONENTS, _EXPONENTS]
        best = None
        for start in self._grid(counts) if starts is None else starts:
            found = minimize(
                self._objective,
                start,
                args=(counts,),
                jac=True,
                # The minima of the paper's L-BFGS (a test compares them) at a thirtieth of the time: with five unknowns
                # that one's linear algebra does little but wake threads.
                method="SLSQP",
                bounds=bounds,
                # A loose tolerance is what stopped the published fit early.
                options={"ftol": 1e-13, "maxiter": 500},
            )
            if best is None or found.fun < best.fun:
                best = found
        assert best is not None
        theta = np.asarray(best.x, np.float64)
        return Fit(
            law=self._law(theta),
            residuals=self._l - self._terms(theta)[0],
            objective=float(best.fun),
            theta=theta,
        )

    def bootstrap(self, fit: Fit, resamples: int, *, seed: int = 0) -> "Bootstrap":
        """Laws of so many resamples of the runs, drawn with replacement, and a residual drawn for each."""
        random = np.random.default_rng(seed)
        laws, noise = [], []
        number = len(self._l)
        inflation = math.sqrt(number / max(number - NUM_PARAMETERS, 1))
        for counts in _resamples(random, self.log_n, self.log_d, resamples):
            laws.append(self.fit(counts, starts=[fit.theta]).law)
            noise.append(inflation * float(random.choice(fit.residuals)))
        return Bootstrap(tuple(laws), np.asarray(noise, np.float64))

    def _law(self, theta: Theta) -> Law:
        a, b, e, alpha, beta = map(float, theta)
        n0, d0, l0 = self.centre
        return Law(
            E=math.exp(e + l0), A=math.exp(a + l0 + alpha * n0), B=math.exp(b + l0 + beta * d0), alpha=alpha, beta=beta
        )

    def _terms(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """log of the law relative to the mean loss, and the share of each of its three terms."""
        a, b, e, alpha, beta = theta
        terms = np.stack([a - alpha * self._n, b - beta * self._d, np.full_like(self._n, e)])
        top = np.max(terms, axis=0)
        shares = np.exp(terms - top)
        total = np.sum(shares, axis=0)
        return top + np.log(total), shares / total

    def _objective(self, theta: np.ndarray, counts: np.ndarray) -> tuple[float, np.ndarray]:
        # Plain annotations here and above: checking shapes at run time would take longer than the arithmetic.
        value, shares = self._terms(theta)
        r = value - self._l
        small = np.abs(r) <= self.delta
        huber = np.where(small, 0.5 * r**2, self.delta * (np.abs(r) - 0.5 * self.delta))
        slope = counts * np.where(small, r, self.delta * np.sign(r))
        gradient = np.array(
            [
                slope @ shares[0],
                slope @ shares[1],
                slope @ shares[2],
                -slope @ (shares[0] * self._n),
                -slope @ (shares[1] * self._d),
            ]
        )
        # In units of delta, so that tolerances mean the same for every delta.
        return float(counts @ huber) / self.delta, gradient / self.delta

    def _grid(self, counts: Vector) -> list[Theta]:
        """The most promising starts: shares of the three terms at the centre, times exponents."""
        shares = np.log([0.05, 0.25, 0.7])
        exponents = [0.12, 0.25, 0.5, 1.0]
        scored = []
        for a in shares:
            for b in shares:
                for e in shares:
                    for alpha in exponents:
                        for beta in exponents:
                            theta = np.array([a, b, e, alpha, beta])
                            scored.append((self._objective(theta, counts)[0], len(scored), theta))
        return [theta for _, _, theta in sorted(scored)[:_STARTS]]


@dataclass(frozen=True)
class Bootstrap:
    """Laws of resampled runs."""

    laws: tuple[Law, ...]
    noise: Vector
    """For each law the deviation, in log loss, that one more run might have."""

    def interval(self, values: list[float] | Vector, level: float) -> tuple[float, float]:
        """Percentile interval of a statistic of each law."""
        tail = 50 * (1 - level)
        low, high = np.percentile(np.asarray(values, np.float64), [tail, 100 - tail])
        return float(low), float(high)

    def of(self, name: str, level: float) -> tuple[float, float]:
        """Interval of E, A, B, alpha or beta."""
        return self.interval([getattr(law, name) for law in self.laws], level)

    def exponents(self, cost: Cost, level: float) -> tuple[tuple[float, float], tuple[float, float]]:
        """Intervals of a and b."""
        pairs = np.array([law.exponents(cost) for law in self.laws])
        return self.interval(pairs[:, 0], level), self.interval(pairs[:, 1], level)

    def optimum(self, flops: float, cost: Cost, level: float) -> list[tuple[float, float]]:
        """Intervals of N*, D* and the loss there."""
        triples = np.array([law.optimum(flops, cost) for law in self.laws])
        return [self.interval(triples[:, i], level) for i in range(3)]

    def prediction(self, parameters: float, tokens: float, level: float) -> tuple[float, float]:
        """Interval in which the loss of one more run lies: the law's uncertainty and the runs' own spread."""
        means = np.log(np.array([law.loss(parameters, tokens) for law in self.laws], np.float64))
        return self.interval(np.exp(means + self.noise), level)


def check_runs(parameters: Vector, tokens: Vector, losses: Vector) -> None:
    """Raise ValueError for runs that no law can be fitted to."""
    if not (np.all(np.isfinite(losses)) and np.all(losses > 0)):
        raise ValueError(f"losses must be positive numbers, and there are {losses[~(losses > 0)][:3].tolist()}")
    for name, values, least in (("sizes", parameters, 3), ("token counts", tokens, 3)):
        if (found := len(np.unique(values))) < least:
            raise ValueError(f"a law in N and D needs at least {least} different {name}, and there are {found}")
    if len(losses) <= NUM_PARAMETERS:
        raise ValueError(
            f"{len(losses)} runs cannot determine the law's {NUM_PARAMETERS} parameters; at least "
            f"{NUM_PARAMETERS + 1} are needed, and 15 or more for intervals that mean something"
        )


def _resamples(random: np.random.Generator, log_n: Vector, log_d: Vector, number: int) -> Iterator[Vector]:
    """How often each run counts in each resample; resamples without three sizes and token counts are drawn again."""
    runs = len(log_n)
    while number:
        drawn = random.integers(0, runs, runs)
        if min(len(np.unique(log_n[drawn])), len(np.unique(log_d[drawn]))) < 3:
            continue
        yield np.bincount(drawn, minlength=runs).astype(np.float64)
        number -= 1
