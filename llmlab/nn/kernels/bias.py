"""Biases added to attention logits, evaluated one block at a time."""

import abc

from jaxtyping import Array, Float, Int

from llmlab.nn.masks import Index


class Bias(abc.ABC):
    """A term added to the logits, a function of query and key index; a pytree, so that its arrays can be learnt."""

    @abc.abstractmethod
    def block(self, query_index: Index, kv_index: Index) -> Float[Array, "B N S T"]:
        """The bias of these queries and keys in float32; B is 1 where all rows agree.

        Args:
            query_index: indices of the queries, (S,) or (B, S).
            kv_index: indices of the keys, (T,) or (B, T).
        """

    @abc.abstractmethod
    def heads(self, first: Int[Array, ""], count: int) -> "Bias":
        """The bias of `count` heads from `first` on, for a device that holds no others."""

    def slopes(self) -> Float[Array, "N"] | None:
        """One number per head where, for the keys up to a query's own, the bias is that slope times the key's index and
        something that is the same for all keys: a kernel can have it as an inner product. None for any other bias."""
        return None

    def by_distance(self, num_queries: int, num_keys: int) -> Float[Array, "N R"] | None:
        """The bias of every distance, key index minus query index, from 1 - num_queries to num_keys - 1, where it is a
        function of nothing else: a kernel can lay these numbers out along the diagonals. None for any other bias."""
        return None
