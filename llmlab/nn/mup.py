"""muP, the maximal update parametrisation (Yang et al. 2022, 2203.03466, Tensor Programs V): tune small, train wide.

In the standard parametrisation a step of given learning rate changes what a layer computes by more the wider the layer
is: the change of a matrix is correlated with its input, so n terms of one sign add up where n random ones would cancel.
The best learning rate therefore falls with width, and has to be found anew at every size. muP scales initial weights,
learning rates and two multipliers by powers of the width so that every layer's output changes by the same amount at all
widths, and as much as it can without growing. Then the best learning rate of a small model is that of a large one.

With r = fan-in over the base model's fan-in (Table 8 of the paper; the powers of other optimizers are in
`llmlab.optim.width`):

                     initial variance       factor in the forward pass    learning rate: Adam    SGD
    embedding, bias, norm    as in the base model     1                            1                      r
    hidden matrix            1 / fan-in               1                            1 / r                  1
    output matrix, router    as in the base model     1 / r                        1                      r
    attention                                         q k / head_dim instead of q k / sqrt(head_dim)

All is relative to a base model: at its width nothing differs from the standard parametrisation, to the bit, so a model
that works today is the base of a family. The table's embedding and output have the same scaling of weights and rates,
which is why they may be tied: only the factor 1 / r, applied to the head's input, tells the two uses apart.

What carries over: learning rate, its schedule, initial scales, Adam's betas. What does not: weight decay's and
dropout's best values (they regularise), and depth, batch size and training length, which move the best learning rate by
laws of their own. Cost: none in time or memory. Fan-in is taken to grow as embed_dim does: give the feed-forward a
constant ratio, and let either the number of heads (query and key/value heads alike) or their width grow.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MuP:
    """The base model, by the two widths that everything is relative to."""

    base_width: int
    """embed_dim of the model whose parametrisation is the standard one."""
    base_head_dim: int
    """Its width of a head; that of this model where wider models have more heads instead of wider ones."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if (value := getattr(self, field.name)) < 1:
                raise ValueError(f"mup.{field.name}={value} is not positive; give the base model's")

    def width_ratio(self, dim: int) -> float:
        """Width of a model over the base model's."""
        return dim / self.base_width

    def attention_scale(self, head_dim: int, scale: float | None) -> float:
        """Factor on q k^T: the base model's, falling as 1 / head_dim.

        After a step queries and keys are correlated, so q k grows as head_dim and no longer as its root.

        Args:
            head_dim: width of a head.
            scale: the base model's factor; None for 1 / sqrt(base_head_dim).
        """
        base = 1 / math.sqrt(self.base_head_dim) if scale is None else scale
        return base * (self.base_head_dim / head_dim)

    def growth(self, dim: int, heads: Mapping[str, tuple[int, int]]) -> dict[str, float]:
        """How many times as long as in the base model each logical axis is; axes that are not named do not grow.

        Args:
            dim: embed_dim.
            heads: number and width of the heads of each layer's attention, by what to call them in an error.

        Raises:
            ValueError: heads of several widths, or not a whole number of heads in the base model.
        """
        ratio = self.width_ratio(dim)
        widths = {head_dim for _, head_dim in heads.values()}
        if len(widths) > 1:
            raise ValueError(f"muP needs heads of one width, and there are {', '.join(map(str, sorted(widths)))}")
        wider = widths.pop() / self.base_head_dim if widths else 1.0
        for name, (number, head_dim) in heads.items():
            in_base = number * head_dim * self.base_width / (dim * self.base_head_dim)
            if in_base != round(in_base) or in_base < 1:
                raise ValueError(
                    f"{name}={number} of width {head_dim} in a model of width {dim} are {in_base:.3g} heads of width "
                    f"{self.base_head_dim} in the base model of width {self.base_width}; muP needs a whole number: "
                    "let query and key/value heads grow in number as the width does, or keep their number and let "
                    "head_dim grow"
                )
        more = ratio / wider
        return {"embed": ratio, "mlp": ratio, "heads": more, "kv_heads": more, "head_dim": wider}
