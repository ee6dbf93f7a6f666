"""`compile()` of an assistant: products built for this processor, for the calls of `generate` that it takes part in."""

from __future__ import annotations

from typing import Self

from transformers.utils import logging

from ..acceleration.products import Products, build_products

logger = logging.get_logger(__name__)


class CompilesProducts:
    """An assistant's part that says what its calls multiply with."""

    products: Products | None = None  # what compile() built

    def compile(self, enabled: bool = True) -> Self:
        """From now on, target and draft multiply on the CPU with products built for this processor.

        Args:
            enabled: False takes it back.

        Takes a second or two, once: the result stays in the user's cache folder. Results change by rounding only. It
        serves float32 weights; others compute as before, and `stats.not_compiled_because` says why. Undone by
        `compile(False)` or `detach()`.

        Returns:
            The assistant itself.

        Raises:
            ValueError: if there is no C++ compiler, or the processor is none with AVX2.
        """
        self.products = None
        if enabled:
            self.products = build_products()
            how = f"built in {self.products.seconds:.1f} s" if self.products.seconds else "built before"
            logger.warning_once(f"Compiled products: {self.products.path}, {how}.")
        return self
